"""Files of `torch.save` and TorchScript archives: the pickle read as data, the tensors mapped where they lie."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from attnlens.checkpoints.archives import check_archive, data_offset
from attnlens.checkpoints.base import _File
from attnlens.checkpoints.nested import named_tensors, parts_of
from attnlens.checkpoints.pickled_data import Inert, StorageRef, TensorRef, UpToEnd, read_pickle
from attnlens.errors import CheckpointError

if TYPE_CHECKING:
    import torch

_LEGACY_PICKLES = 5
"""Magic number, protocol, system, the object, names of storages: what stands in front of the bytes."""
_MAGIC = 0x1950A86A20F9469CFC6C
TIED = 16
"""Bytes of tensors for each byte of the file: names may share a storage, each tensor must fit into the file."""
_LONGEST_ARGUMENTS = 1 << 16
_KINDS = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}

_QUANTISED = {"torch QInt8Storage": 1, "torch QUInt8Storage": 1, "torch QInt32Storage": 4}
"""Bytes of a number in runs of which no tensor is read."""


class TorchFile(_File):
    """A file of `torch.save`, or a TorchScript archive, of which only names and numbers are read: no code in it runs.

    Dictionaries in dictionaries, pickled modules and the objects of TorchScript give dotted names. ``keys_in_front``
    holds for each name how much of it is keys of dictionaries in front of a state dict. ``metadata`` names the
    architecture where a training script stored its name.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._places: dict[str, tuple[int, int]] = {}
        with self.held() as file:
            root = self._parse(file)
        if any("\ud800" <= c <= "\udfff" for name in self._tensors if not name.isascii() for c in name):
            raise CheckpointError(f"{path} holds names that are no text: corrupt, or not plain data")
        if not any(isinstance(value, TensorRef) for value in self._tensors.values()):
            raise CheckpointError(f"{path} holds {_outline(root)}, and holds no tensors: save model.state_dict()")
        for name, value in self._tensors.items():
            if isinstance(value, TensorRef):
                self._check_empty(name, value.shape)
        self.metadata = _stated(root)

    def _parse(self, file: IO[bytes]) -> Any:
        """Read what is pickled, the tensors by name, and where their numbers are."""
        path = self.path
        try:
            root = self._read_root(file)
            self._tensors, self.keys_in_front = named_tensors(root, TIED * self._status.st_size)
            self._check()
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds more than weights, and unpickling it could run code: refused ({_first_line(error)}). "
                "Save its state_dict() as safetensors and give that file"
            ) from error
        except Exception as error:  # a damaged file raises whatever its operations, its directory or its numbers do
            raise CheckpointError(
                f"{path} is no PyTorch checkpoint ({_first_line(error)}): truncated or corrupt"
            ) from error
        return root

    def _read_root(self, file: IO[bytes]) -> Any:
        zipped = file.read(4) == b"PK\x03\x04"
        file.seek(0)
        return self._read_zip(file) if zipped else self._read_legacy(UpToEnd(file))

    def _read_zip(self, file: IO[bytes]) -> Any:
        members = {member.filename: member for member in check_archive(file)}
        top = next(name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")).partition("/")[0]
        with zipfile.ZipFile(file) as archive:
            pickled = archive.read(members[f"{top}/data.pkl"])
            order = members.get(f"{top}/byteorder")
            if order is not None and archive.read(order) != b"little":
                raise ValueError("its numbers are big-endian")
        for name, member in members.items():
            if name.startswith(f"{top}/data/") and member.compress_type == zipfile.ZIP_STORED:
                self._places[name.removeprefix(f"{top}/data/")] = (data_offset(file, member), member.file_size)
        return read_pickle(io.BytesIO(pickled))

    def _read_legacy(self, content: UpToEnd) -> Any:
        """Read the format before PyTorch 1.6: five pickles, then every storage behind its length."""
        kinds: dict[str, StorageRef] = {}
        found = [read_pickle(content, kinds) for _ in range(_LEGACY_PICKLES)]
        magic, _, _, root, keys = found
        if magic != _MAGIC or not isinstance(keys, list):
            raise ValueError("it does not begin as torch.save begins")
        position = content.tell()
        for key in keys:
            content.seek(position)
            (elements,) = struct.unpack("<q", content.read(8))
            if key not in kinds:
                raise ValueError("it does not say what numbers it holds")
            width = _QUANTISED.get(kinds[key].kind) or _dtype(kinds[key]).itemsize
            if elements < 0 or position + 8 + elements * width > content.size:
                raise ValueError("its numbers are cut off")
            self._places[key] = (position + 8, elements * width)
            position += 8 + elements * width
        return root

    def _check(self) -> None:
        """Refuse tensors that are larger than the file they came from, or reach out of the run they are a view of."""
        import torch

        total = 0
        if any(begin + length > self._status.st_size for begin, length in self._places.values()):
            raise ValueError("a run of its numbers reaches out of the file")
        for ref in self._tensors.values():
            if not isinstance(ref, TensorRef):
                continue
            kind, size = _dtype(ref.storage, ref.dtype), self._status.st_size
            if ref.bits and not (kind.is_complex or kind in (torch.float16, torch.float32, torch.float64)):
                raise TypeError(f"it turns the sign of numbers of type {kind}")
            claimed = math.prod(ref.shape) * kind.itemsize
            total += claimed
            if claimed > size or total > TIED * size:
                raise ValueError(f"{size} bytes on disk claim to hold {max(claimed, total)} bytes of tensors")
            last = ref.offset + sum((n - 1) * step for n, step in zip(ref.shape, ref.stride, strict=True))
            _, held = self._places.get(ref.storage.key, (0, 0))
            if claimed and (last + 1) * kind.itemsize > held:
                raise ValueError(f"a tensor of shape {ref.shape} reaches out of its {held} bytes")

    def __getitem__(self, name: str) -> Any:
        """Return a torch tensor, mapped where it lies in the file."""
        import torch

        ref = self._ref(name)
        kind = _dtype(ref.storage, ref.dtype)
        if not math.prod(ref.shape):
            return torch.zeros(ref.shape, dtype=kind)
        begin, length = self._places[ref.storage.key]
        with self.reading() as file:
            with self.by_path(file) as place:
                whole = torch.UntypedStorage.from_file(place, shared=False, nbytes=self._status.st_size)
            empty = torch.empty(0, dtype=kind)
            run = whole[begin : begin + length]
            misplaced = begin % kind.itemsize  # torch reads numbers only where their width divides their place
            found = empty.set_(run.clone() if misplaced else run, ref.offset, ref.shape, ref.stride)
            found = found.neg() if "neg" in ref.bits else found
            return found.conj_physical() if "conj" in ref.bits else found

    def _ref(self, name: str) -> TensorRef:
        ref = self._tensors[name]
        if not isinstance(ref, TensorRef):
            raise CheckpointError(
                f"{name} in {self.path} is stored as {ref.name.replace(' ', '.')}, which is not read: save it as a "
                "plain tensor"
            )
        return ref

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; nothing but the pickle was read."""
        return self._ref(name).shape

    def __contains__(self, name: object) -> bool:
        """Whether a tensor of that name is there; nothing is read."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)


def _dtype(storage: StorageRef, dtype: str | None = None) -> torch.dtype:
    import torch

    kind = dtype.partition(" ")[2] if dtype else _KINDS.get(storage.kind.rpartition(" ")[2], "")
    found = getattr(torch, kind, None)
    if not isinstance(found, torch.dtype):
        raise TypeError(f"it holds numbers of type {dtype or storage.kind}")
    return found


def _stated(root: Any) -> dict[str, str]:
    """Return the architecture a training script named (timm's ``arch`` or ``model``) and its arguments, as JSON."""
    top = parts_of(root)
    for holder in ("args", "hyper_parameters", "hparams", "config", "cfg"):
        inner = _settings(top.get(holder))
        for key in ("model", "arch", "model_name", "architecture"):
            if isinstance(inner.get(key), str):
                return {"named_architecture": inner[key], **_arguments(inner.get("model_kwargs"))}
    return {"named_architecture": top["arch"]} if isinstance(top.get("arch"), str) else {}


def _settings(value: Any) -> Mapping[Any, Any]:
    """Return settings by name; OmegaConf keeps them in nodes that hold their value, below ``_content``."""
    found = parts_of(value)
    content = parts_of(found.get("_content"))
    return {key: parts_of(node).get("_val", node) for key, node in content.items()} if content else found


def _arguments(value: Any) -> dict[str, str]:
    """Return what of the arguments is plain; a class among them, of activations or norms, is no size."""
    given: dict[str, Any] = {}
    for name, argument in _settings(value).items():
        with contextlib.suppress(TypeError, ValueError, RecursionError):
            given |= json.loads(_written({name: argument}))
    return {"named_arguments": json.dumps(given)} if given else {}


def _written(value: Any) -> str:
    """Return a value as JSON. Raises `ValueError` for a long one: lists that hold one another twice grow for ever."""
    parts, length = [], 0
    for part in json.JSONEncoder().iterencode(value):
        parts.append(part)
        length += len(part)
        if length > _LONGEST_ARGUMENTS:
            raise ValueError("it is longer than arguments are")
    return "".join(parts)


def _outline(root: Any) -> str:
    """Say in a few words what a pickle holds."""
    parts = parts_of(root)
    if not parts:
        return f"a {root.name.replace(' ', '.') if isinstance(root, Inert) else type(root).__name__}"
    names = ", ".join(str(key)[:40] for key in list(parts)[:5])
    return f"the keys {names}{', ...' if len(parts) > 5 else ''}"


def _first_line(error: BaseException) -> str:
    text = str(error)
    return text.splitlines()[0] if text.strip() else type(error).__name__
