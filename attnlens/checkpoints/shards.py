"""Checkpoints cut into several files, with an index that says which file holds which tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from attnlens.checkpoints.base import SAFETENSORS_SUFFIXES, TORCH_SUFFIXES, Checkpoint
from attnlens.errors import CheckpointError
from attnlens.strict_json import parse_json, there, within
from attnlens.words import counted

TRANSFORMERS_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names transformers keeps a model's weights under, in the order they are preferred."""


class ShardedFile(Checkpoint):
    """The shards an index lists, as one checkpoint; ``opener`` opens a shard when a tensor of it is first asked for."""

    def __init__(self, path: Path, opener: Callable[[Path], Checkpoint]) -> None:
        self.path, self._open = path, opener
        self._shard_of, self._digest = read_index(path)
        folder, names = path.parent, sorted(set(self._shard_of.values()))
        self._paths = {name: within(folder, folder / name, CheckpointError) for name in names}
        absent = [name for name, shard in self._paths.items() if not there(shard.is_file)]
        if absent:
            raise CheckpointError(
                f"{path} lists {counted(len(self._paths), 'shard')} and {', '.join(absent[:3])} "
                f"{'is' if len(absent) == 1 else 'are'} not beside it: download the missing shards"
            )
        self._opened: dict[str, Checkpoint] = {}
        self.behind = self._opened.values()

    def provenance(self) -> dict[str, Any]:
        """Return the index's name and sha256, and name, size and sha256 of every shard."""
        return {"file": self.path.name, "sha256": self._digest, "shards": self._shard_provenance}

    @cached_property
    def _shard_provenance(self) -> list[dict[str, Any]]:
        return [self._shard(name).provenance() for name in self._paths]

    def size(self) -> int:
        """Return the length of all shards."""
        return sum(self._shard(name).size() for name in self._paths)

    def _shard(self, name: str) -> Checkpoint:
        if name not in self._opened:
            shard = self._open(self._paths[name])
            twice = next((tensor for tensor in shard if self._shard_of.get(tensor, name) != name), None)
            if twice is not None:
                raise CheckpointError(
                    f"{name} holds {twice}, which {self.path} says is in {self._shard_of[twice]}: of two tensors of a "
                    "name libraries take different ones, save the model again"
                )
            self._opened[name] = shard
        return self._opened[name]

    def __getitem__(self, name: str) -> Any:
        """Return a tensor from the shard the index names."""
        return self._holder(name)[name]

    def _holder(self, name: str) -> Checkpoint:
        """Return the shard the index names for a tensor."""
        file = self._shard_of[name]
        shard = self._shard(file)
        if name not in shard:
            raise CheckpointError(f"{self.path} says that {file} holds {name}, and it does not: download both again")
        return shard

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from its shard."""
        return self._holder(name).shape(name)

    def __contains__(self, name: object) -> bool:
        """Whether the index lists a tensor of that name; no shard is opened."""
        return name in self._shard_of

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names in the index."""
        return iter(self._shard_of)

    def __len__(self) -> int:
        """Return the number of tensors in the index."""
        return len(self._shard_of)


def read_index(path: Path) -> tuple[dict[str, str], str]:
    """Return which file holds each tensor, ``{tensor: file}``, and the index's sha256.

    Every file name is checked to stay beside the index.
    """
    try:
        content = path.read_bytes()
        data = parse_json(content)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no shard index ({error}): download it again") from error
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names: it is no shard index")
    for name in set(places.values()):
        _check_name(path, name)
    return places, hashlib.sha256(content).hexdigest()


def _check_name(index: Path, name: str) -> None:
    """Refuse a shard name that is not a plain relative path to a weight file."""
    parts = {*PurePosixPath(name).parts, *PureWindowsPath(name).parts}
    outside = PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor or ".." in parts
    if outside or not name.isprintable() or not name.lower().endswith((*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES)):
        raise CheckpointError(
            f"{index} names {name!r} as a shard: refused, shards are .safetensors or .bin files inside its own folder"
        )
