"""Weights by tensor name: safetensors through a memory map, numpy's archives without pickles."""

from __future__ import annotations

import math
import mmap
import os
import struct
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from attnlens.checkpoints.archives import DAMAGED_ARRAY, array_header, check_archive, read_array
from attnlens.checkpoints.base import _File
from attnlens.errors import CheckpointError
from attnlens.strict_json import parse_json


class SafetensorsFile(_File):
    """A safetensors file: the header is checked by the safetensors library, tensors are views of a memory map."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        from safetensors import SafetensorError, safe_open

        with self.held() as file:
            try:
                with self.by_path(file) as place, safe_open(place, framework="numpy") as checked:
                    self.metadata = dict(checked.metadata() or {})
                (length,) = struct.unpack("<Q", file.read(8))
                header = parse_json(file.read(length))
            except (SafetensorError, ValueError) as error:
                raise CheckpointError(
                    f"{path} is not a whole safetensors file ({error}): it is truncated or corrupt, download it again"
                ) from error
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._header: dict[str, dict[str, Any]] = header
        self._bytes: NDArray[np.uint8] | None = None
        for name in header:
            self._check_empty(name, self.shape(name))

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a tensor as a read-only view of the file."""
        begin, end = self.span(name)
        with self.reading() as file:
            if self._bytes is None:
                self._bytes = np.memmap(file, dtype=np.uint8, mode="r")
            data = self._bytes[begin:end]
        kind, shape = _numpy_type(self._header[name]["dtype"], name), self.shape(name)
        try:
            return data.view(kind).reshape(shape)
        except (ValueError, OverflowError) as error:  # more axes, or an empty tensor of more rows, than numpy has
            raise CheckpointError(f"{name} in {self.path} has shape {shape}, which cannot be read ({error})") from error

    def let_go(self) -> None:
        """Take the pages that were read off this process; a view that is left reads them anew."""
        mapped = getattr(self._bytes, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)

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


class NpzFile(_File):
    """A numpy archive, read without pickles; two-byte void arrays are bfloat16, as JAX writes them.

    An array is read when its header claims no more than its member of the archive holds, and the members together no
    more than `archives.EXPANDS` times the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with self.held() as file:
            try:
                members = check_archive(file)
            except zipfile.BadZipFile as error:
                raise CheckpointError(f"{path} is no whole numpy archive ({error}): truncated or corrupt") from error
            kept = os.fdopen(os.dup(file.fileno()), "rb")
            weakref.finalize(self, kept.close)
            self._archive = zipfile.ZipFile(kept)
        self._members = {m.filename.removesuffix(".npy"): m for m in members if m.filename.endswith(".npy")}

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Read an array out of the archive."""
        with self.reading(), self._opened(name) as file:
            stored = read_array(file)
        if stored.dtype == np.dtype("V2"):
            import ml_dtypes

            return stored.view(ml_dtypes.bfloat16)
        return stored

    def shape(self, name: str) -> tuple[int, ...]:
        """Return an array's shape from its header."""
        with self._opened(name) as file:
            return array_header(file)[0]

    @contextmanager
    def _opened(self, name: str) -> Iterator[IO[bytes]]:
        """Open a member that holds what its header claims."""
        member = self._members[name]
        try:
            with self._archive.open(member) as file:
                shape, kind = array_header(file)
            if kind.kind not in "biuf" and kind != np.dtype("V2"):
                raise ValueError(f"its type is {kind.str[:20]}")
            if min(shape, default=0) < 0 or math.prod(shape) * kind.itemsize > member.file_size:
                raise ValueError(f"{member.file_size} bytes claim to hold an array of shape {shape}")
            self._check_empty(name, shape)
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
