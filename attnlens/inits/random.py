"""Random streams: one generator per purpose, layer and head, so that no result depends on the order of the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnlens.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    import torch

PURPOSES = ("qk", "ov", "columns", "qk_left", "qk_right", "ov_left", "ov_right", "padding")
"""What is drawn of attention layers. Their number and order determine what every seed means: none can be added."""
FILTER_PURPOSES = ("filters", "directions")
"""What is drawn of layers of depthwise filters, whose streams begin where those of 65,536 attention layers end."""
GAIN_PURPOSES = ("gains",)
"""What is drawn of gains, beside an attention layer's products. Their streams fill the last quarter."""
_HEADS = 4096
_STARTS = {PURPOSES: 0, FILTER_PURPOSES: 2**31, GAIN_PURPOSES: 3 * 2**30}


@dataclass(frozen=True)
class Streams:
    """The streams of one seed."""

    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"seed = {self.seed!r}: pass a whole number of at least 0")

    def generator(self, purpose: str, layer: int, head: int = 0) -> torch.Generator:
        """Return a fresh CPU generator for one purpose, layer and head."""
        import torch

        return torch.Generator().manual_seed(self._start(purpose, layer, head))

    def numpy_generator(self, purpose: str, layer: int, head: int = 0) -> np.random.Generator:
        """Return a fresh generator of numpy's for one purpose, layer and head."""
        import numpy as np

        return np.random.default_rng(self._start(purpose, layer, head))

    def _start(self, purpose: str, layer: int, head: int) -> int:
        """Return the number a generator starts from.

        torch's CPU generator takes 32 bits. They are the seed's hash plus the place of (layer, purpose, head) in one
        row, so no two streams of a seed ever coincide, as hashes of all four would do now and then.
        """
        import numpy as np

        assert 0 <= head < _HEADS, "more heads than the streams are laid out for"
        known, first = next(found for found in _STARTS.items() if purpose in found[0])
        offset = first + (layer * len(known) + known.index(purpose)) * _HEADS + head
        return (int(np.random.SeedSequence(self.seed).generate_state(1)[0]) + offset) % 2**32
