"""A weight file in a tar or zip archive, or compressed: unpacked, within bounds, into a temporary folder of its own.

Names of members are compared and never become paths; links are not followed. An archive in an archive is refused.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import importlib.util
import io
import lzma
import os
import sys
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from attnlens.checkpoints.archives import ALLOWANCE, EXPANDS, check_archive
from attnlens.checkpoints.base import INDEX_SUFFIX, Checkpoint, _File, _OnDisk
from attnlens.checkpoints.formats import SUFFIXES, kind_of
from attnlens.checkpoints.tars import bounded_members
from attnlens.checkpoints.tars import members as members_of
from attnlens.errors import CheckpointError, UsageError, first_line
from attnlens.strict_json import there
from attnlens.words import counted

CONFIGURATIONS = ("config.json", "adapter_config.json")
"""What is unpacked with a weight file that it stands beside."""
_CHUNK = 1 << 20
_MEMORY = 1 << 28
"""Bytes a decoder of xz may take; `xz -9` asks for a quarter of it."""
_LARGEST_CONFIGURATION = 1 << 22
_MOST = 10_000
"""Members of an archive that are looked at."""
_DAMAGE = (
    *(EOFError, ValueError, LookupError, RuntimeError, OverflowError, NotImplementedError, TypeError, MemoryError),
    *(zlib.error, lzma.LZMAError, tarfile.TarError),
)


class Member(NamedTuple):
    """A file of an archive: how it is opened, or None for a link or a device."""

    name: str
    open: Callable[[], IO[bytes]] | None


class Opened(NamedTuple):
    """The weight file, the folder it was unpacked into, and what is asked for inside it."""

    stored: Checkpoint
    folder: Path
    network: str | None


def open_packed(path: Path, wanted: str | None, opener: Callable[[Path], Checkpoint]) -> Opened:
    """Unpack the one weight file of an archive or of a compressed file, and open it with ``opener``.

    Of several, ``wanted`` names one, and behind a colon one of its networks; of one, it names a network alone. The
    folder lives as long as what was opened, whose provenance is that of the archive. Raises `CheckpointError` for what
    is damaged, holds no weight file, links, another archive, or more than `archives.EXPANDS` times its bytes;
    `UsageError` where several are held and none is named.
    """
    folder = Path(tempfile.mkdtemp(prefix="attnlens-"))
    try:
        with _told(path):
            outer = _OnDisk(path)
            with outer.held() as packed:
                file, member, network = _unpack(packed, path, folder, wanted)
        try:
            stored = opener(file)
        except CheckpointError as error:
            where = f"{member} in {path}" if member else f"what {path} holds"
            raise CheckpointError(str(error).replace(str(file), where)) from error
    except BaseException:
        _remove(folder)
        raise
    weakref.finalize(stored, _remove, folder)
    assert isinstance(stored, _File)
    stored.held_in, stored.member = outer, member
    config = folder / CONFIGURATIONS[0]
    if there(config.is_file):
        stored.metadata = {**stored.metadata, config.name: config.read_text("utf-8", "replace")}
    return Opened(stored, folder, network)


def _remove(folder: Path) -> None:
    """Remove the folder and the files that were written into it."""
    with suppress(OSError):
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def _unpack(packed: IO[bytes], path: Path, folder: Path, wanted: str | None) -> tuple[Path, str, str | None]:
    """Return the weight file, its name in the archive ("" without one) and the network that is asked for in it.

    What is unpacked comes out of ``packed``; its path says what it is called.
    """
    bound = EXPANDS * os.fstat(packed.fileno()).st_size + ALLOWANCE
    with ExitStack() as opened:
        kind = kind_of(path)
        if kind == "compressed":
            inner = folder / f"weights{_suffix(path.with_suffix('').name)}"
            _write(_decompressed(packed), inner, bound)
            if kind_of(inner) != "tar":
                return inner, "", wanted
            packed = opened.enter_context(inner.rename(folder / "archive").open("rb"))
            kind = "tar"
        members = opened.enter_context(_zip_members(packed) if kind == "zip" else _tar_members(packed))
        chosen, network = _choose(members, wanted)
        return _copied(members, chosen, folder, bound), chosen, network


def _choose(members: Mapping[str, Member], wanted: str | None) -> tuple[str, str | None]:
    """Return the member that is read, and the network that is asked for in it."""
    names = [name for name in members if not PurePosixPath(name).name.startswith("._") and "__MACOSX" not in name]
    if any(name.endswith(INDEX_SUFFIX) for name in names):
        raise CheckpointError("it holds a checkpoint in several shards: unpack it and give the folder")
    weights = [name for name in names if _suffix(name)]
    if not weights:
        held = ", ".join(sorted(names)[:5]) or "nothing"
        raise CheckpointError(f"it holds no weight file: it holds {held}{', ...' if len(names) > 5 else ''}")
    if len(weights) == 1:
        return weights[0], wanted if wanted not in (weights[0], PurePosixPath(weights[0]).name) else None
    asked, _, network = (wanted or "").partition(":")
    fitting = [name for name in weights if asked in (name, PurePosixPath(name).name)]
    if len(fitting) != 1:
        raise UsageError(
            f"{'--weights ' + asked + ' is not one of' if asked else 'it holds'} "
            f"{counted(len(weights), 'weight file')}, "
            f"{', '.join(weights[:5])}{', ...' if len(weights) > 5 else ''}: choose with --weights FILE, or "
            "FILE:NETWORK"
        )
    return fitting[0], network or None


def _copied(members: Mapping[str, Member], chosen: str, folder: Path, bound: int) -> Path:
    """Write a member, and the configurations beside it, into the folder under names of their own."""
    file = folder / f"weights{_suffix(chosen)}"
    _write(_chunks(_opened(members[chosen])), file, bound)
    beside = {str(PurePosixPath(chosen).parent / name): name for name in CONFIGURATIONS}
    for name, plain in beside.items():
        if name in members:
            _write(_chunks(_opened(members[name])), folder / plain, _LARGEST_CONFIGURATION)
    return file


def _opened(member: Member) -> IO[bytes]:
    if member.open is None:
        raise CheckpointError(f"{member.name!r} in it is no plain file but a link, a device or sparse: unpack it")
    return member.open()


def _suffix(name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return suffix if suffix in SUFFIXES else ""


def _check_count(members: int) -> None:
    if members > _MOST:
        raise CheckpointError(f"it holds more than {_MOST} members: unpack it and give the weight file")


@contextmanager
def _zip_members(packed: IO[bytes]) -> Iterator[dict[str, Member]]:
    members = check_archive(packed)
    _check_count(len(members))
    with zipfile.ZipFile(packed) as archive:
        links = {member.filename for member in members if member.external_attr >> 28 == 0xA}  # S_IFLNK's four bits
        yield {
            member.filename: Member(
                member.filename, None if member.filename in links else partial(archive.open, member)
            )
            for member in members
            if not member.is_dir()
        }


@contextmanager
def _tar_members(packed: IO[bytes]) -> Iterator[dict[str, Member]]:
    with tarfile.open(fileobj=packed, mode="r:", tarinfo=bounded_members()) as archive:
        found: dict[str, Member] = {}
        for count, member in enumerate(members_of(archive)):
            _check_count(count)
            name = str(PurePosixPath(member.name))
            if name in found:
                raise CheckpointError(f"two members of it have the name {name!r}: unpack it and give the weight file")
            plain = member.isreg() and not member.issparse()
            if not member.isdir():
                found[name] = Member(name, partial(_of_tar, archive, member) if plain else None)
        yield found


def _of_tar(archive: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(member)
    assert file is not None, "a plain file has content"
    return file


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _write(chunks: Iterator[bytes], target: Path, bound: int) -> None:
    """Write what comes, no more than ``bound`` bytes of it."""
    written = 0
    with target.open("xb") as file:
        for chunk in chunks:
            written += len(chunk)
            if written > bound:
                raise CheckpointError(f"it unpacks to more than {bound} bytes: refused, unpack it yourself")
            file.write(chunk)


def _decompressed(file: IO[bytes]) -> Iterator[bytes]:
    start = file.read(6)
    file.seek(0)
    if start.startswith(b"\xfd7zXZ"):
        yield from _of_xz(file)
        return
    opened: Any = gzip.open if start.startswith(b"\x1f\x8b") else bz2.open if start.startswith(b"BZh") else _zstd()
    yield from _chunks(opened(file))


def _of_xz(file: IO[bytes]) -> Iterator[bytes]:
    """Yield what streams of xz hold, one behind the other; a decoder takes no more than `_MEMORY`."""
    decoder: lzma.LZMADecompressor | None = None
    data = b""
    while True:
        if decoder is None or decoder.eof:
            data = (decoder.unused_data if decoder else b"").lstrip(b"\0")
            while not data and (read := file.read(_CHUNK)):
                data = read.lstrip(b"\0")
            if not data:
                return
            decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)
        elif decoder.needs_input:
            data = file.read(_CHUNK)
            if not data:
                raise EOFError("it is cut off")
        yield decoder.decompress(data, _CHUNK)
        data = b""


def _zstd() -> Callable[[IO[bytes]], IO[bytes]]:
    """Return what opens a file of Zstandard: Python's own module from 3.14 on, or the package zstandard."""
    if sys.version_info >= (3, 14):
        return cast("Callable[[IO[bytes]], IO[bytes]]", importlib.import_module("compression.zstd").open)
    if importlib.util.find_spec("zstandard") is None:
        raise CheckpointError(
            "it is compressed by Zstandard, which Python reads from 3.14 on: unpack it with `zstd -d`, or `pip "
            "install zstandard`"
        )
    decoder = importlib.import_module("zstandard").ZstdDecompressor(max_window_size=_MEMORY)
    return lambda file: io.BufferedReader(decoder.stream_reader(file, read_across_frames=True))


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Name the file in what is raised, in one line."""
    try:
        yield
    except (CheckpointError, UsageError) as error:
        text = str(error)
        raise type(error)(text if str(path) in text else f"{path}: {text}") from error
    except OSError as error:
        if error.errno is not None:
            raise CheckpointError(f"cannot unpack {path}: {error.strerror}") from error
        raise CheckpointError(f"{path} cannot be unpacked ({first_line(error)}): truncated or corrupt") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} cannot be unpacked ({first_line(error)}): unpack it yourself, or download it again"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path} cannot be unpacked ({first_line(error)}): truncated or corrupt") from error
