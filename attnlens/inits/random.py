"""Random streams: one generator per purpose, layer and head, so that no result depends on the order of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnlens.errors import UsageError

if TYPE_CHECKING:
    import torch

PURPOSES = ("qk", "ov", "columns", "qk_left", "qk_right", "ov_left", "ov_right", "padding")
"""What is drawn of attention layers. Their number and order determine what every seed means: none can be added."""
FILTER_PURPOSES = ("filters", "directions")
"""What is drawn of layers of depthwise filters, whose streams begin where those of 65,536 attention layers end."""
_HEADS = 4096
_HALF = 2**31


@dataclass(frozen=True)
class Streams:
    """The streams of one seed."""

    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed = {self.seed!r}: pass a whole number of at least 0")

    def generator(self, purpose: str, layer: int, head: int = 0) -> torch.Generator:
        """Return a fresh CPU generator for one purpose, layer and head.

        torch's CPU generator takes 32 bits. They are the seed's hash plus the place of (layer, purpose, head) in one
        row, so no two streams of a seed ever coincide, as hashes of all four would do now and then.
        """
        import numpy as np
        import torch

        assert 0 <= head < _HEADS, "more heads than the streams are laid out for"
        half, known = (_HALF, FILTER_PURPOSES) if purpose in FILTER_PURPOSES else (0, PURPOSES)
        offset = half + (layer * len(known) + known.index(purpose)) * _HEADS + head
        start = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
        return torch.Generator().manual_seed((start + offset) % 2**32)
