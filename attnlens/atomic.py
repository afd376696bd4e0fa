"""Writing results so that a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, NamedTuple

from attnlens.errors import OutputError
from attnlens.words import counted

try:
    import fcntl
except ImportError:  # not POSIX: nothing is locked, and what a killed process leaves stays there
    fcntl = None  # type: ignore[assignment]

Write = Callable[[IO[bytes]], object]
Writer = Callable[[str | Path, Write], Path]
"""`write_atomic`, or the method `FileSet.write` of a set."""

TEMPORARY = ".attnlens.part"
"""How the name of a file on its way ends: ``.<name>.<random>.attnlens.part``, beside the file it becomes."""


def write_atomic(path: str | Path, write: Write) -> Path:
    """Call ``write(file)`` on a temporary file beside ``path``, flush it to disk, then rename it into place.

    Missing parent folders are made. What killed processes left in the folder is removed first. Raises `OutputError`
    when the folder or file cannot be written; the temporary file is removed on any failure.
    """
    with FileSet() as alone:
        return alone.write(path, write)


def write_text_atomic(path: str | Path, text: str) -> Path:
    """Write ``text`` as UTF-8 through `write_atomic`."""
    return write_atomic(path, lambda file: file.write(text.encode()))


def name_folder(folder: Path, path: Path) -> None:
    """Give a folder that is whole a name that nothing has. Raises `OutputError`."""
    with explained(path):
        folder.rename(path)
        _sync_folder(path.parent)


_WRITTEN: dict[Path, None] = {}
"""Files that this process has given their names, in that order, each once: what Ctrl-C leaves behind."""


def what_was_written() -> str:
    """Say what files this process has written that are still there, each of them whole."""
    left = [path for path in _WRITTEN if path.is_file()]
    if not left:
        return "no file was written"
    folders, number = list(dict.fromkeys(str(path.parent) for path in left)), len(left)
    where = ", ".join(folders[:3]) + (f" and {counted(len(folders) - 3, 'more folder')}" if len(folders) > 3 else "")
    return f"{counted(number, 'file')} {'is' if number == 1 else 'are'} written whole, in {where}; none is half-written"


class _Staged(NamedTuple):
    given: Path
    path: Path
    """The file to be replaced: ``given``, or where that links to."""
    temporary: Path
    file: IO[bytes]
    """Open and locked until the file has its name, so that no other process takes it for a leftover."""


class FileSet:
    """Files that belong together: a context in which `write` prepares each, and whose end gives all their names.

    ``check`` is asked beforehand whether a path may be written, as `outputs.Outputs.check`.

    Every file is whole and on disk before the first one takes its place, so whatever fails in between (a full disk, an
    error, Ctrl-C) leaves all the old ones. The names are given in the order of writing under a lock on the folders: of
    two processes that write the same set, one gives all its names first. Where a name cannot be given, those that were
    are taken back: each old file keeps a second, temporary name until all the new ones are in place. Only a kill
    between two of these renames can leave a mixture, of whole files.
    """

    def __init__(self, check: Callable[[Path], object] | None = None) -> None:
        self._staged: list[_Staged] = []
        self._check = check

    def __enter__(self) -> FileSet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            for staged in self._staged:
                with suppress(OSError):  # told before: what a full disk had no room for is flushed once more
                    staged.file.close()
                with suppress(OSError):  # it is swept later
                    staged.temporary.unlink()

    def write(self, path: str | Path, write: Write) -> Path:
        """Prepare ``path``: call ``write(file)`` on a temporary file beside it and flush that to disk."""
        path = Path(path)
        if self._check is not None:
            self._check(path)
        with explained(path):
            target = _target(path)
        if twice := next((one.given for one in self._staged if one.path == target), None):
            raise OutputError(f"{twice} and {path} are one file: name two, or take the link away")
        with explained(path):
            _make_folder(target.parent)
            sweep(target.parent)
            staged = _new_temporary(path, target)
            self._staged.append(staged)
            write(staged.file)
            staged.file.flush()
            os.fsync(staged.file.fileno())
        return path

    def read(self, path: Path) -> bytes:
        """Return what was prepared for a path, whoever writes there meanwhile."""
        (staged,) = (one for one in self._staged if one.given == path)
        staged.file.seek(0)
        return staged.file.read()

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of every file prepared so far, by name."""
        found = {}
        for staged in self._staged:
            staged.file.seek(0)
            found[staged.given.name] = hashlib.file_digest(staged.file, "sha256").hexdigest()  # type: ignore[arg-type]
        return found

    def _commit(self) -> None:
        folders = sorted({staged.path.parent for staged in self._staged})
        with _locked(folders if len(self._staged) > 1 else ()), _taken_back() as place:
            for _, path, temporary, file in self._staged:
                if fcntl is None:
                    file.close()  # elsewhere an open file cannot be renamed
                with explained(path):
                    temporary.chmod(_mode(path))
                    place(temporary, path)
            for folder in folders:
                with explained(folder):
                    _sync_folder(folder)
        _WRITTEN.update(dict.fromkeys(staged.path for staged in self._staged))


@contextmanager
def _taken_back() -> Iterator[Callable[[Path, Path], None]]:
    """Yield what renames a file into a place; where the context fails, what was in these places is put back."""
    placed: list[tuple[Path, Path | None]] = []
    with ExitStack() as kept:

        def place(temporary: Path, path: Path) -> None:
            placed.append((path, kept.enter_context(_second_name(path))))
            temporary.replace(path)

        try:
            yield place
        except BaseException:
            for path, second in reversed(placed):
                with suppress(OSError):
                    if second is None:
                        path.unlink()
                    else:
                        second.replace(path)
            raise


@contextmanager
def _second_name(path: Path) -> Iterator[Path | None]:
    """Give the file that is at ``path`` a temporary name, too, which no process sweeps meanwhile; None without one."""
    if not path.exists():
        yield None
        return
    second = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}{TEMPORARY}")
    with ExitStack() as held:
        with suppress(OSError):  # not readable, or a file system without locks
            file = held.enter_context(path.open("rb"))
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            try:
                os.link(path, second)
            except OSError:  # a file system without links, or somebody else's file where that is not permitted
                shutil.copy2(path, second)
            yield second
        finally:
            with suppress(OSError):
                second.unlink()


def sweep(folder: Path) -> None:
    """Remove the temporary files of processes that were killed: those that nobody holds a lock on."""
    if fcntl is None:
        return
    with suppress(OSError, ValueError):  # a folder that cannot be listed, or that no folder can be called
        for path in folder.glob(f".*{TEMPORARY}"):
            with suppress(OSError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


def open_scratch(name: str) -> tuple[Path, IO[bytes]]:
    """Open a file in the folder for temporary files; whoever opens it unlinks it, `sweep` does after a kill."""
    folder = Path(tempfile.gettempdir())
    sweep(folder)
    staged = _new_temporary(folder / name, folder / name)
    return staged.temporary, staged.file


@contextmanager
def claimed(path: Path, taken: str) -> Iterator[None]:
    """Hold a lock file; raise `OutputError` with the text ``taken`` where another process holds it.

    The lock ends with the process that holds it, however that ends; the empty file stays.
    """
    with ExitStack() as held:
        with explained(path):
            _make_folder(path.parent)
            file = held.enter_context(path.open("ab"))
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OutputError(taken) from error
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                    raise
        yield


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Raise an `OutputError` that names the path where writing fails."""
    if "\0" in os.fspath(path):
        raise OutputError(f"cannot write {path}: no name holds a null character. Choose another")
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"cannot write {path}: {reason}. Choose a folder you can write to with --output, or free some space."
        ) from error


def _target(path: Path) -> Path:
    """Return the file that is to be replaced: behind a link, what it leads to. Refuses what is no file."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if target.exists() and not target.is_file():  # root could put a file in the place of /dev/null
        raise OSError(errno.EINVAL, "it is a device or a pipe, which holds no file")
    return target


def _make_folder(folder: Path) -> None:
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        _sync_folder(place.parent)


def _new_temporary(given: Path, path: Path) -> _Staged:
    """Make a temporary file beside ``path`` and lock it; again where another process swept it away before the lock."""
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.", suffix=TEMPORARY)
        file = os.fdopen(descriptor, "w+b")
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks: then nothing there is swept either
                fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return _Staged(given, path, Path(name), file)
        file.close()


@contextmanager
def _locked(folders: Iterable[Path]) -> Iterator[None]:
    with ExitStack() as held:
        for folder in folders:
            if fcntl is not None:
                with suppress(OSError):  # NFS locks no folders
                    descriptor = os.open(folder, os.O_RDONLY)
                    held.callback(os.close, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, where the file system knows of such a thing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # not readable, or no POSIX
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(descriptor)


def _mode(path: Path) -> int:
    """Return the permissions of the file that is replaced, else those of a new file."""
    with suppress(FileNotFoundError):
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
