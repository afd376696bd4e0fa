"""Images out of untrusted folders and tars: nothing outside is followed, nothing small becomes large, nothing runs.

Bound: for each byte of file at most `DECODED` bytes of pixels, and `ALLOWANCE` beside that; of a compressed tar at most
`EXPANDS` bytes, and `ALLOWANCE`. ``--image-size`` adds the pixels of that size, image by image.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from attnlens.checkpoints.tars import bounded_members, members
from attnlens.errors import AttnlensError
from attnlens.printable import printable
from attnlens.strict_json import there, within

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".webp", ".gif")
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "GIF")
"""The only decoders that are tried, whatever a file is called: others start programs (EPS) or follow paths."""
LARGEST_FILE = 64 << 20
DECODED = 64
"""Bytes of pixels an image, and a data set, may have for each byte of file: photographs have some 10 to 30."""
EXPANDS = 32
"""Bytes a compressed tar may hold for each byte on disk: images are compressed already."""
ALLOWANCE = 64 << 20
_ENDS = 3
"""Times a tar may be read at its end: once for each of a header, and what stands in front of and behind it."""
_DAMAGE = (
    *(EOFError, OSError, ValueError, OverflowError, RuntimeError, MemoryError, LookupError, TypeError),
    *(tarfile.TarError, lzma.LZMAError, zlib.error),
)

Read = tuple[str, bytes]
_COMPRESSIONS: dict[bytes, Callable[[IO[bytes]], Any]] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}


class DatasetError(AttnlensError):
    """A data set is missing, unsafe or does not hold what training needs."""


class UnreadableError(DatasetError):
    """One image is damaged, or none."""

    def __init__(self, name: str, path: str, reason: object) -> None:
        self.path, self.reason = path, printable(str(reason))
        super().__init__(f"{name}: {path} is not an image that can be read ({reason})")


class Budget:
    """Bytes of pixels all images of a data set may have together; shared by threads."""

    def __init__(self, name: str) -> None:
        self.name, self.left = name, ALLOWANCE
        self._lock = threading.Lock()

    def take(self, path: str, pixels: int, size: int) -> None:
        """Take off what an image of so many bytes decodes to, and add what its file allows. Raises `DatasetError`."""
        with self._lock:
            self.left += DECODED * size - 3 * pixels
            if self.left < 0:
                raise DatasetError(
                    f"{self.name}: {path} has {pixels} pixels in {size} bytes, and with the images before it more than "
                    f"{DECODED} bytes of pixels for each byte of file: that is no data set of photographs"
                )


@contextmanager
def opened(name: str, item: Read, budget: Budget) -> Iterator[Any]:
    """Open an image for decoding inside the context, its size held against the budget first. Raises `DatasetError`."""
    from PIL import Image

    path, content = item
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            budget.take(path, image.width * image.height, len(content))
            yield image
    except AttnlensError:
        raise
    except Exception as error:  # decoders raise whatever they meet
        raise UnreadableError(name, path, error) from error


def folder_files(folder: Path) -> Iterator[Read]:
    """Yield the images below a folder, what is hidden without its content; a link that leaves it is refused."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and there(path.is_file):
            name = path.relative_to(folder).as_posix()
            if hidden(name):
                yield name, b""
                continue
            within(folder, path, DatasetError)
            _check_length(folder, str(path.relative_to(folder)), path.stat().st_size)
            try:
                content = path.read_bytes()
            except OSError as error:
                raise DatasetError(f"cannot read {path}: {error.strerror}") from error
            yield name, content


def tar_files(path: Path) -> Iterator[Read]:
    """Yield the images of an archive from memory: nothing is unpacked to disk, so nothing can land outside a folder.

    Refuses members whose name is absolute or leaves the archive, links, devices, files with holes, images beyond 64
    MiB, and archives that expand to more than `EXPANDS` times their length, plus `ALLOWANCE`.
    """
    try:
        # in stored order, and as a stream: seeking back in xz decompresses it again, and a length that is declared is
        # read as far as there is anything
        with (
            _content(path) as content,
            tarfile.open(fileobj=content, mode="r|", tarinfo=bounded_members()) as archive,
        ):
            for member in members(archive):
                parts = PurePosixPath(member.name)
                if parts.is_absolute() or ".." in parts.parts or "\0" in member.name:
                    raise DatasetError(f"{path} holds {member.name!r}, a path outside the archive: it is not read")
                if not (member.isfile() or member.isdir()) or member.issparse():
                    raise DatasetError(f"{path} holds {member.name!r}, a link or device: it is not read")
                if member.isfile() and parts.suffix.lower() in SUFFIXES:
                    _check_length(path, member.name, member.size)
                    stream = archive.extractfile(member)
                    assert stream is not None
                    yield str(parts), stream.read()
    except _DAMAGE as error:
        raise DatasetError(f"{path} cannot be read as a tar ({error}): fetch it again") from error


def hidden(path: str) -> bool:
    """Whether a file is what systems leave beside people's own: a name that begins with a dot, or macOS's copies."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(path).parts)


def _check_length(where: Path, name: str, size: int) -> None:
    if size > LARGEST_FILE:
        raise DatasetError(f"{where} holds {name!r} of {size} bytes: that is no image")


@contextmanager
def _content(path: Path) -> Iterator[IO[bytes]]:
    """Open what a tar holds once it is decompressed, and no more of it than the bound."""
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(0)
        with _COMPRESSIONS[start](file) if start in _COMPRESSIONS else file as content:
            yield _Bounded(content, EXPANDS * path.stat().st_size + ALLOWANCE, path)  # type: ignore[misc]


class _Bounded:
    """What `tarfile` needs of a stream, ending in an error where more comes out of an archive than it may hold.

    It ends in one, too, where it is asked on and on at its end: a member that is skipped is read over, as far as it
    declares to reach.
    """

    def __init__(self, content: IO[bytes], limit: int, path: Path) -> None:
        self._content, self._left, self._path = content, limit, path
        self._ended = 0

    def read(self, size: int) -> bytes:
        content = self._content.read(size)
        self._left -= len(content)
        self._ended += not content
        if self._ended > _ENDS:
            raise EOFError("a member declares more bytes than there are")
        if self._left < 0:
            raise DatasetError(f"{self._path} expands to more than {EXPANDS} times its length: that is no data set")
        return content
