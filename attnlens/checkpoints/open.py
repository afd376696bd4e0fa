"""From a path to the `Checkpoint` that reads it: what the file is, the network in it, the weights that one applies."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from attnlens.checkpoints.applied import as_applied
from attnlens.checkpoints.base import Checkpoint, unreadable
from attnlens.checkpoints.files import NpzFile, SafetensorsFile
from attnlens.checkpoints.formats import ACCEPTED, PACKED, kind_of, refuse_folder
from attnlens.checkpoints.networks import choose_network
from attnlens.checkpoints.packed import open_packed
from attnlens.checkpoints.shards import ShardedFile
from attnlens.checkpoints.torch_files import TorchFile
from attnlens.errors import CheckpointError
from attnlens.strict_json import read_json, there, within


def open_checkpoint(path: str | os.PathLike[str], network: str | None = None) -> Checkpoint:
    """Open a weight file: safetensors, what `torch.save` wrote, a TorchScript archive, ``.npz``, an index of shards.

    A tar or zip archive around one such file, and a file compressed by gzip, bzip2, xz or Zstandard, are read too. Of
    several files in an archive ``network`` names one, see `packed.open_packed`. Tensors have the names and values of
    the network that the file is of: `networks.choose_network` tells which of several, ``network`` chooses one,
    `applied.as_applied` says what is computed. Raises `CheckpointError` when the file is missing, truncated, corrupt,
    of another format, or a pickle that only code could read, `UsageError` for a network it does not hold.
    """
    path = Path(path)
    if there(path.is_file) and _kind(path) in PACKED:
        opened = open_packed(path, network, open_stored)
        return as_read(opened.stored, opened.network, opened.folder)
    return as_read(open_stored(path), network, path.parent)


def as_read(stored: Checkpoint, network: str | None = None, folder: Path | None = None) -> Checkpoint:
    """Return one network of stored tensors, as it applies them; configurations in ``folder`` state scales."""
    return choose_network(as_applied(stored, cache(lambda: _beside(folder))), network)


def open_stored(path: Path) -> Checkpoint:
    """Open the tensors of a file as they are stored."""
    if not there(path.is_file):
        if there(path.is_dir):
            refuse_folder(path)
        raise CheckpointError(f"{path} is {'a folder' if there(path.is_dir) else 'not there'}: give {ACCEPTED}")
    kind = _kind(path)
    try:
        if kind not in _FORMATS:
            raise CheckpointError(f"{path} is {PACKED[kind]}: unpack it and give the weight file in it")
        stored = _FORMATS[kind](path)
    except OSError as error:
        raise unreadable(path, error) from error
    longest = max(map(len, stored), default=0)
    if longest > LONGEST_NAME:
        raise CheckpointError(f"{path} holds a name of {longest} characters, which no tensor of a network has")
    return stored


LONGEST_NAME = 1000
"""Characters of a tensor's name: what is looked for in names may take a time that grows with their square."""
_FORMATS: dict[str, Callable[[Path], Checkpoint]] = {
    "safetensors": SafetensorsFile,
    "npz": NpzFile,
    "index": lambda path: ShardedFile(path, open_stored),
    "torch": TorchFile,
}


def _kind(path: Path) -> str:
    try:
        return kind_of(path)
    except OSError as error:
        raise unreadable(path, error) from error


def _beside(folder: Path | None) -> dict[str, Any]:
    """Return what a model's configuration and an adapter's in the same folder say; nothing where there is none."""
    found: dict[str, Any] = {}
    for name, key in (("config.json", "quantization_config"), ("adapter_config.json", "adapter")):
        if folder is None or not there((folder / name).is_file):
            continue
        try:
            data = read_json(within(folder, folder / name, CheckpointError))
        except (ValueError, OSError):
            continue  # who reads the file for its own sake says what is wrong with it
        if isinstance(data, dict):
            found[key] = data.get(key) if key != "adapter" else data
    return found
