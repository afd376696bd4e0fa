"""A state dict in memory, read like one in a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.files import _clean


class StateDict(Checkpoint):
    """Tensors a caller holds by name, torch's or numpy's; what a training script saved around them is looked into."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        import torch

        held = {
            name: torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else value
            for name, value in tensors.items()
        }
        self._tensors = _clean(held, Path("the state dict"))

    def provenance(self) -> dict[str, Any]:
        """Return that it was in memory: there is no file to hash."""
        return {"state_dict": f"{len(self._tensors)} tensors in memory"}

    def __getitem__(self, name: str) -> Any:
        """Return a tensor."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the tensors' names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._tensors)
