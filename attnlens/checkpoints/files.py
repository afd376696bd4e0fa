"""Weights by tensor name: safetensors through a memory map, state dicts with weights_only, npz, live modules."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnlens.errors import CheckpointError

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

    def expect(self, names: Iterable[str]) -> None:
        """Take note of which tensors will be asked for, where reading several together saves something."""


class _File(Checkpoint):
    """A checkpoint that is one file on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def provenance(self) -> dict[str, Any]:
        """Return the file's name, size and sha256."""
        with self.path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": self.path.name, "bytes": self.path.stat().st_size, "sha256": digest}


class SafetensorsFile(_File):
    """A safetensors file: the header is checked by the safetensors library, tensors are views of a memory map."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                self.metadata = dict(file.metadata() or {})
        except SafetensorError as error:
            raise CheckpointError(
                f"{path} is not a whole safetensors file ({error}): it is truncated or corrupt, download it again"
            ) from error
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._header: dict[str, dict[str, Any]] = header

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.memmap(self.path, dtype=np.uint8, mode="r")

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a tensor as a read-only view of the file."""
        begin, end = self.span(name)
        return self._bytes[begin:end].view(_numpy_type(self._header[name]["dtype"], name)).reshape(self.shape(name))

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
        self._tensors = _clean(_load_pickle(path), path)

    def __getitem__(self, name: str) -> Any:
        """Return a torch tensor (memory-mapped where the file's format allows)."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)


class NpzFile(_File):
    """A numpy archive, read with ``allow_pickle=False``; two-byte void arrays are bfloat16, as JAX writes them."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is no numpy archive of named arrays: truncated, corrupt or another format")
        try:
            self._archive = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{path} is not a whole numpy archive ({error}): truncated or corrupt") from error

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Read an array out of the archive."""
        try:
            stored = self._archive[name]
        except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise CheckpointError(
                f"{name} in {self.path} cannot be read ({error}): corrupt, or not plain data"
            ) from error
        if stored.dtype == np.dtype("V2"):
            import ml_dtypes

            return stored.view(ml_dtypes.bfloat16)
        return stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Return an array's shape from its header."""
        assert self._archive.zip is not None, "the archive is never closed while it is held"
        with self._archive.zip.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return tuple(read(file)[0])

    def __contains__(self, name: object) -> bool:
        """Whether an array of that name is there; nothing is read."""
        return name in self._archive.files

    def __iter__(self) -> Iterator[str]:
        """Iterate over the arrays' names."""
        return iter(self._archive.files)

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self._archive.files)


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


def _load_pickle(path: Path) -> Any:
    import pickle

    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than weights, and unpickling it could run code: refused. "
            "Save its state_dict() as safetensors and give that file"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is no PyTorch checkpoint ({first}): truncated or corrupt") from error


def _clean(loaded: Any, path: Path) -> dict[str, Any]:
    """Find the state dict inside what a training script saved and strip the wrappers' prefixes."""
    import torch

    for name in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a state dict: save model.state_dict()")
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors: save model.state_dict()")
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors
