"""From a path to the `Checkpoint` that reads it."""

from __future__ import annotations

import os
from pathlib import Path

from attnlens.checkpoints.base import INDEX_SUFFIX, NUMPY_SUFFIXES, SAFETENSORS_SUFFIXES, TORCH_SUFFIXES, Checkpoint
from attnlens.checkpoints.files import NpzFile, SafetensorsFile, TorchFile
from attnlens.checkpoints.shards import ShardedFile
from attnlens.errors import CheckpointError

_ACCEPTED = "a .safetensors, .pth, .bin or .npz file, or a shard index (.index.json)"


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
            return ShardedFile(path, open_checkpoint)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    raise CheckpointError(f"{path} has suffix {suffix!r}: give {_ACCEPTED}")
