"""Weights by tensor name: safetensors through a memory map, state dicts with weights_only, npz, live modules."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnlens.checkpoints.archives import DAMAGED_ARRAY, check_archive
from attnlens.checkpoints.pickles import load_pickle
from attnlens.errors import CheckpointError
from attnlens.reading import parse_json

if TYPE_CHECKING:
    from torch import nn

# Names a state dict is nested under in training checkpoints, in the order they are preferred.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "teacher", "module", "encoder")
_PREFIXES = ("module.", "_orig_mod.")

SAFETENSORS_SUFFIXES = (".safetensors",)
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
NUMPY_SUFFIXES = (".npz",)
INDEX_SUFFIX = ".index.json"
_ACCEPTED = "a .safetensors, .pth, .bin or .npz file, or a shard index (.index.json)"


class Checkpoint(Mapping[str, Any]):
    """Stored tensors by name; a value is read only when it is asked for."""

    metadata: Mapping[str, str] = {}

    def provenance(self) -> dict[str, Any]:
        """Return where the weights came from, JSON-ready; for a file its name, size and sha256."""
        raise NotImplementedError

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from the file's header where there is one."""
        return tuple(self[name].shape)

    def size(self) -> int:
        """Return the bytes on disk, 0 where nothing is on disk."""
        return 0

    def expect(self, names: Iterable[str]) -> None:
        """Take note of which tensors will be asked for, where reading several together saves something."""


class _File(Checkpoint):
    """A checkpoint that is one file on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._status = path.stat()

    def size(self) -> int:
        """Return the file's length."""
        return self._status.st_size

    def provenance(self) -> dict[str, Any]:
        """Return the file's name, size and sha256. Raises `CheckpointError` where it changed since it was opened."""
        with self._reading(), self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            changed = self.path.stat().st_mtime_ns != self._status.st_mtime_ns
        if changed:
            raise CheckpointError(f"{self.path} changed while it was read: run again when nothing writes it")
        return {"file": self.path.name, "bytes": self._status.st_size, "sha256": digest}

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Read only from the file that was opened, at its length: a mapped page beyond a file's end is a bus error."""
        try:
            now = self.path.stat()
            if (now.st_dev, now.st_ino, now.st_size) != (
                self._status.st_dev,
                self._status.st_ino,
                self._status.st_size,
            ):
                raise CheckpointError(f"{self.path} was replaced or cut while it was read: run again")
            yield
        except OSError as error:
            raise CheckpointError(f"{self.path} was removed while it was read ({error.strerror})") from error


class SafetensorsFile(_File):
    """A safetensors file: the header is checked by the safetensors library, tensors are views of a memory map."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                self.metadata = dict(file.metadata() or {})
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = parse_json(file.read(length))
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}): it is truncated or corrupt, download it again"
            ) from error
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._header: dict[str, dict[str, Any]] = header

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a tensor as a read-only view of the file."""
        begin, end = self.span(name)
        with self._reading():
            data = self._bytes[begin:end]
        kind, shape = _numpy_type(self._header[name]["dtype"], name), self.shape(name)
        try:
            return data.view(kind).reshape(shape)
        except (ValueError, OverflowError) as error:  # more axes, or an empty tensor of more rows, than numpy has
            raise CheckpointError(f"{name} in {self.path} has shape {shape}, which cannot be read ({error})") from error

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of that name is there; nothing is read."""
        return name in self._header

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header."""
        return tuple(self._header[name]["shape"])

    def span(self, name: str) -> tuple[int, int]:
        """Return where in the file a tensor begins and ends, in bytes."""
        begin, end = self._header[name]["data_offsets"]
        return self._start + begin, self._start + end

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self._header)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._header)


class TorchFile(_File):
    """A pickled PyTorch checkpoint, read with ``weights_only=True``: no code in it runs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._tensors = _clean(load_pickle(path, CheckpointError), path)

    def __getitem__(self, name: str) -> Any:
        """Return a torch tensor (memory-mapped where the file's format allows)."""
        with self._reading():
            return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)


class NpzFile(_File):
    """A numpy archive, read without pickles; two-byte void arrays are bfloat16, as JAX writes them.

    An array is read when its header claims no more than its member of the archive holds, and the members together no
    more than `archives.EXPANDS` times the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            members = check_archive(path)
        except zipfile.BadZipFile as error:
            raise CheckpointError(f"{path} is no whole numpy archive ({error}): truncated or corrupt") from error
        self._archive = zipfile.ZipFile(path)
        self._members = {m.filename.removesuffix(".npy"): m for m in members if m.filename.endswith(".npy")}

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Read an array out of the archive."""
        with self._opened(name) as file:
            stored: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        if stored.dtype == np.dtype("V2"):
            import ml_dtypes

            return stored.view(ml_dtypes.bfloat16)
        return stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Return an array's shape from its header."""
        with self._opened(name) as file:
            return _array_header(file)[0]

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        """Open a member that holds what its header claims."""
        member = self._members[name]
        try:
            with self._archive.open(member) as file:
                shape, kind = _array_header(file)
            if kind.kind not in "biuf" and kind != np.dtype("V2"):
                raise ValueError(f"its type is {kind.str[:20]}")
            if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize > member.file_size:
                raise ValueError(f"{member.file_size} bytes claim to hold an array of shape {shape}")
            with self._archive.open(member) as file:
                yield file
        except DAMAGED_ARRAY as error:
            raise CheckpointError(
                f"{name} in {self.path} cannot be read ({error}): corrupt, or not plain data"
            ) from error

    def __contains__(self, name: object) -> bool:
        """Whether an array of that name is there; nothing is read."""
        return name in self._members

    def __iter__(self) -> Iterator[str]:
        """Iterate over the arrays' names."""
        return iter(self._members)

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self._members)


def _array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read shape and type off the header of a stored array."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(file)
    return tuple(shape), kind


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


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a weight file by its suffix: safetensors, a state dict (``.pth``, ``.pt``, ``.bin``, ...) or ``.npz``.

    The index of a sharded checkpoint (``.index.json``) opens the shards beside it as one. Raises `CheckpointError`
    when the file is missing, truncated, corrupt, of another format, or a pickle that holds more than weights.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise CheckpointError(f"{path} is {kind}: give {_ACCEPTED}")
    suffix = path.suffix.lower()
    try:
        if suffix in SAFETENSORS_SUFFIXES:
            return SafetensorsFile(path)
        if suffix in TORCH_SUFFIXES:
            return TorchFile(path)
        if suffix in NUMPY_SUFFIXES:
            return NpzFile(path)
        if path.name.endswith(INDEX_SUFFIX):
            from attnlens.checkpoints.shards import ShardedFile

            return ShardedFile(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    raise CheckpointError(f"{path} has suffix {suffix!r}: give {_ACCEPTED}")


_DTYPES = {
    "F64": "f8",
    "F32": "f4",
    "F16": "f2",
    "I64": "i8",
    "I32": "i4",
    "I16": "i2",
    "I8": "i1",
    "U64": "u8",
    "U32": "u4",
    "U16": "u2",
    "U8": "u1",
    "BOOL": "?",
    "C64": "c8",
}
_ML_DTYPES = {
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
}


def _numpy_type(stored: str, name: str) -> np.dtype[Any]:
    if stored in _DTYPES:
        return np.dtype(_DTYPES[stored]).newbyteorder("<")
    if stored in _ML_DTYPES:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _ML_DTYPES[stored]))
    raise CheckpointError(
        f"{name} is stored as {stored}, which cannot be read: convert the file to float16 or bfloat16"
    )


def _clean(loaded: Any, path: Path) -> dict[str, Any]:
    """Find the state dict inside what a training script saved and strip the wrappers' prefixes."""
    import torch

    loaded = _plain(loaded)
    for name in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = _plain(loaded[name])
            break
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    if any("\ud800" <= character <= "\udfff" for name in tensors if not name.isascii() for character in name):
        raise CheckpointError(f"{path} holds names that are no text: corrupt, or not plain data")
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors: save model.state_dict()")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _plain(value: Any) -> Any:
    """Return a dictionary free of the attributes a pickle may have given it, which hide its own methods."""
    return {key: dict.__getitem__(value, key) for key in dict.__iter__(value)} if isinstance(value, dict) else value
