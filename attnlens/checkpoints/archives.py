"""Untrusted zip archives: what a member says of its size is held against the size of the file before it is read."""

from __future__ import annotations

import io
import math
import re
import struct
import tokenize
import zipfile
import zlib
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXPANDS = 32
"""Bytes of content an archive may hold for each byte on disk: weights shrink by a tenth, bombs by a thousand."""
ALLOWANCE = 1 << 20
"""Bytes of content any archive may hold beside that: a small array of zeros shrinks well."""

DAMAGED_ARRAY = (
    *(ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, struct.error, TypeError, LookupError),
    *(SyntaxError, tokenize.TokenError, MemoryError, RuntimeError, OverflowError),
)
"""What zipfile, zlib and numpy raise for a damaged array; numpy parses a header as Python literals."""

_SHAPE = rb"\((\d{1,20}L?(, ?\d{1,20}L?){0,63})?,?\)"
_ENTRY = rb"'(descr': '[<>|=]?[a-zA-Z]\d{0,9}'|fortran_order': (True|False)|shape': %b)" % _SHAPE
_HEADER = re.compile(rb"\{(%b, ?){2}%b,? ?\}[ ]*\n?" % (_ENTRY, _ENTRY))
_LONG = re.compile(rb"(?<=[( ])(\d+)L(?=[,)])")
"""A whole number as Python 2 wrote it"""
_LONGEST_HEADER = 10_000
"""Bytes of an array's header; numpy reads no longer one without being told to."""

_DAMAGE = (ValueError, EOFError, OSError, NotImplementedError, RuntimeError, OverflowError, struct.error)


def check_archive(file: IO[bytes], *, stored: bool = False) -> list[zipfile.ZipInfo]:
    """Return the members of a zip archive whose content is bounded by `EXPANDS` times the file, plus `ALLOWANCE`.

    Python's reader never returns more of a member than its entry declares, so the sum of the entries bounds what can
    come out. With ``stored`` nothing may be compressed. Raises `zipfile.BadZipFile` for anything else: encrypted
    members, two of one name, methods other than stored and deflated.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except _DAMAGE as error:
        raise zipfile.BadZipFile(f"its directory cannot be read: {error}") from error
    methods = {zipfile.ZIP_STORED} if stored else {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in methods:
            raise zipfile.BadZipFile(f"{member.filename!r} is encrypted or compressed in a way that is not used here")
    if len({member.filename for member in members}) < len(members):
        raise zipfile.BadZipFile("two members have one name")
    content, size = sum(member.file_size for member in members), file.seek(0, io.SEEK_END)
    if content > (size if stored else EXPANDS * size + ALLOWANCE):
        raise zipfile.BadZipFile(f"{size} bytes on disk claim to hold {content}")
    return members


def array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type off the header of a stored array of one plain type. Raises `ValueError`."""
    shape, _, kind = _header(file)
    return shape, kind


def read_array(file: IO[bytes]) -> NDArray[Any]:
    """Return a stored array of one plain type. Raises `ValueError`."""
    import numpy as np

    shape, by_columns, kind = _header(file)
    content = np.empty(math.prod(shape) * kind.itemsize, np.uint8)
    if file.readinto(content) != content.size:  # type: ignore[attr-defined]
        raise ValueError("its numbers are cut off")
    return content.view(kind).reshape(shape, order="F" if by_columns else "C")


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether columns are stored one behind the other, and type.

    numpy parses headers as Python; of what is no literal, the parser looks for the source, as a file of the name
    ``<string>``. So a header is held against what numpy writes before numpy is asked. Raises `ValueError`.
    """
    from numpy.lib import format as stored

    version = stored.read_magic(file)
    width = 2 if version == (1, 0) else 4
    prefix = file.read(width)
    length = int.from_bytes(prefix, "little")
    content = file.read(min(length, _LONGEST_HEADER + 1))
    if len(prefix) < width or len(content) != length or not _HEADER.fullmatch(content):
        raise ValueError(f"its header is {content[:60]!r}")
    plain = _LONG.sub(rb"\1", content)
    read = stored.read_array_header_1_0 if version == (1, 0) else stored.read_array_header_2_0
    shape, by_columns, kind = read(io.BytesIO(len(plain).to_bytes(width, "little") + plain))
    return tuple(shape), by_columns, kind


def data_offset(file: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Return where in the file a member's content begins: behind its local header."""
    file.seek(member.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return int(member.header_offset + 30 + name + extra)
