"""``--ema``: the moving average of a stack's weights, by which runs are then measured and saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Average:
    """Weights and buffers of every model, averaged as timm's ModelEmaV3 does: e <- d e + (1 - d) w after each step.

    After the first step e is w, as in timm's own training. What is not floating-point is copied.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in weights.items()}

    def update(self, weights: Mapping[str, Tensor], updates: int) -> None:
        """Take in the weights after so many steps; after none, begin with them."""
        import torch

        floating = [name for name, value in self.weights.items() if value.is_floating_point()]
        decay = self.decay if updates > 1 else 0.0
        with torch.no_grad():
            kept, taken = ([part[name].detach() for name in floating] for part in (self.weights, weights))
            torch._foreach_lerp_(kept, taken, weight=1.0 - decay)
            for name in self.weights.keys() - set(floating):
                self.weights[name].copy_(weights[name])

    def snapshot(self) -> dict[str, Tensor]:
        """Return what a resumed stack needs."""
        return {name: value.cpu() for name, value in self.weights.items()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Go on from a snapshot."""
        for name, value in snapshot.items():
            self.weights[name].copy_(value)
