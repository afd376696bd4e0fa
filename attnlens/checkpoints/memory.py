"""A state dict in memory, read like one in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.nested import named_tensors
from attnlens.errors import CheckpointError
from attnlens.words import counted


class StateDict(Checkpoint):
    """Tensors a caller holds by name, torch's or numpy's; what a training script saved around them is looked into."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        found, self.keys_in_front = named_tensors(tensors)
        if not found:
            raise CheckpointError("the state dict holds no tensors: give model.state_dict()")
        self._tensors = {name: _as_torch(value) for name, value in found.items()}

    def provenance(self) -> dict[str, Any]:
        """Return that it was in memory: there is no file to hash."""
        return {"state_dict": f"{counted(len(self._tensors), 'tensor')} in memory"}

    def __getitem__(self, name: str) -> Any:
        """Return a tensor."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)


def _as_torch(value: Any) -> Any:
    """Return a numpy array of numbers of torch's types as a torch tensor, and anything else as it is."""
    import torch

    plain = isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.isnative
    return torch.from_numpy(value) if plain and value.dtype.itemsize <= 8 else value
