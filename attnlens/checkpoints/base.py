"""What every source of weights offers: `Checkpoint`, files of one kind behind it, and the weights of a live module."""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from attnlens.errors import CheckpointError, first_line
from attnlens.strict_json import there

if TYPE_CHECKING:
    from torch import nn

SAFETENSORS_SUFFIXES = (".safetensors",)
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
NUMPY_SUFFIXES = (".npz",)
INDEX_SUFFIX = ".index.json"


HASHES: dict[tuple[int, ...], str] = {}
"""What files of an identity hashed to, in this process."""


class Checkpoint(Mapping[str, Any]):
    """Stored tensors by name; a value is read only when it is asked for."""

    metadata: Mapping[str, str] = {}
    title: str = ""
    """Which network of a file this is, where the file holds several or one was asked for."""
    computed: tuple[str, ...] = ()
    """How tensors are made of stored ones, where they are not stored themselves."""
    keys_in_front: Mapping[str, str] = {}
    """By name, the keys of dictionaries that stand in front of a name in its state dict, each with a dot behind it."""
    behind: Collection[Checkpoint] = ()
    """The checkpoints this one reads from."""

    def provenance(self) -> dict[str, Any]:
        """Return where the weights came from, JSON-ready; for a file its name, size and sha256."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the file's header where there is one."""
        return tuple(self[name].shape)

    def size(self) -> int:
        """Return the bytes on disk, 0 where nothing is on disk."""
        return sum(source.size() for source in self.behind)

    def check(self) -> None:
        """Raise `CheckpointError` where what is on disk is not what was opened, as it was then."""
        for source in self.behind:
            source.check()

    def let_go(self) -> None:
        """Give back the memory of what was read, where that is a view of the file and nobody keeps one."""
        for source in self.behind:
            source.let_go()

    def expect(self, names: Iterable[str]) -> None:
        """Take note of which tensors will be asked for, where reading several together saves something."""


class View(Checkpoint):
    """A checkpoint under names of its own: ``_names`` knows them; nothing is read to list them."""

    _names: Mapping[str, Any]

    def __contains__(self, name: object) -> bool:
        """Whether there is a tensor of that name."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._names)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what is another where a file was replaced, cut or written over, its old time put back or not."""
    changed = 0 if os.name == "nt" else status.st_ctime_ns  # there, the time a file was made
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, changed


_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return what is said of a file that cannot be opened."""
    more = ": raise the limit, `ulimit -n 65536`" if error.errno in _TOO_MANY else ""
    return CheckpointError(f"cannot read {path}: {error.strerror or error}{more}")


@cache
def _paths_to_open_files() -> bool:
    """Whether this system has a path to each file that is open, as Linux has."""
    return there(Path("/proc/self/fd").is_dir)


class _OnDisk:
    """A file on disk, held to be the one that was opened.

    Where it was unpacked out of another file, ``held_in`` is that one and ``member`` its name there.
    """

    held_in: _OnDisk | None = None
    member: str = ""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._status = path.stat()

    def written(self) -> None:
        """Take the file as it is now, which is the same one: its owner has written to it."""
        now = self.path.stat()
        if (now.st_dev, now.st_ino) != (self._status.st_dev, self._status.st_ino):
            self._compare(now)
        self._status = now

    def size(self) -> int:
        """Return the file's length."""
        return self._status.st_size

    def provenance(self) -> dict[str, Any]:
        """Return the file's name, size and sha256. Raises `CheckpointError` where it changed since it was opened."""
        if self.held_in is not None:
            return {**self.held_in.provenance(), **({"member": self.member} if self.member else {})}
        known = _identity(self._status)
        with self.reading() as file:
            if known not in HASHES:  # a report reads one file several times
                HASHES[known] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        return {"file": self.path.name, "bytes": self._status.st_size, "sha256": HASHES[known]}

    def check(self) -> None:
        """Raise `CheckpointError` where the file is not the one that was opened, as it was then."""
        try:
            self._compare(self.path.stat())
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> CheckpointError:
        """Return what is said where a file that was opened cannot be read again."""
        if error.errno in _GONE:
            return CheckpointError(f"{self.path} was removed while it was read ({error.strerror})")
        return unreadable(self.path, error)

    def _compare(self, now: os.stat_result) -> None:
        if _identity(now) != _identity(self._status):
            raise CheckpointError(f"{self.path} was replaced, cut or changed while it was read: run again")

    @contextmanager
    def held(self) -> Iterator[IO[bytes]]:
        """Yield the file that was opened, open: a link above it may lead its name to another, and back, meanwhile.

        What is read, mapped and hashed comes out of what is yielded, never from the name once more. It has its length:
        a mapped page beyond a file's end is a bus error.
        """
        with self.path.open("rb") as file:
            self._compare(os.fstat(file.fileno()))
            yield file
        self.check()

    @contextmanager
    def reading(self) -> Iterator[IO[bytes]]:
        """Yield the file as `held` does; what the system refuses is a `CheckpointError`."""
        try:
            with self.held() as file:
                yield file
        except OSError as error:
            raise self._unreadable(error) from error

    def place_of(self, file: IO[bytes]) -> str:
        """Return a path that leads to the very file that is open, for libraries that take a path alone.

        Where there is none, as there is on Linux, it is the name, which is compared before and after.
        """
        return f"/proc/self/fd/{file.fileno()}" if _paths_to_open_files() else str(self.path)

    @contextmanager
    def by_path(self, file: IO[bytes]) -> Iterator[str]:
        """Yield `place_of` a file to a library that opens it; what that raises names the path that was given."""
        place = self.place_of(file)
        try:
            yield place
        except (OSError, RuntimeError) as error:
            try:
                os.close(os.open(place, os.O_RDONLY))
            except OSError as reason:  # libraries tell it without its number, or call it another
                raise OSError(reason.errno, reason.strerror, str(self.path)) from error
            text = first_line(error).replace(place, str(self.path))
            raise CheckpointError(f"cannot read {self.path}: {text}") from error


class _File(_OnDisk, Checkpoint):
    """A checkpoint that is one file on disk."""

    def _check_empty(self, name: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor without entries whose other axes are longer than the file: no bytes bound what it says."""
        if 0 in shape and math.prod(filter(None, shape)) > self._status.st_size:
            raise CheckpointError(
                f"{name} in {self.path} has no entries, and its shape {list(shape)} is beyond the "
                f"{self._status.st_size} bytes of the file: save the file without it"
            )


class ModuleWeights(Checkpoint):
    """The weights of a live module, as they are at each read."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._tensors = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}

    def provenance(self) -> dict[str, Any]:
        """Return the module's class; weights in memory have no file to hash."""
        return {"module": f"{type(self._module).__module__}.{type(self._module).__qualname__}"}

    def __getitem__(self, name: str) -> Any:
        """Return a parameter or buffer, detached."""
        return self._tensors[name].detach()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of parameters and buffers."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of parameters and buffers."""
        return len(self._tensors)
