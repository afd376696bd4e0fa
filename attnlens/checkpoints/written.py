"""Writing weights: a safetensors file, whole or not at all, without a second copy of it in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING

from attnlens.atomic import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

TYPES = {
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "uint32": "U32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "uint16": "U16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""torch's types and the format's names of them, in the order the library lays tensors out: the widest first."""
_ALIGNED = 8


def write_safetensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write tensors as safetensors, atomically, one after the other: no copy is made of more than one.

    The file is what ``safetensors.torch.save`` makes; that needs two copies of all in memory, and ``save_file`` puts a
    file of its own in the place of the one it is given. Raises `OutputError` where the file cannot be written.
    """
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (list(TYPES).index(kinds[name]), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": TYPES[kinds[name]], "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)

    def write(file: IO[bytes]) -> None:
        import torch

        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)

    return write_atomic(Path(path), write)
