"""Corners of products, kept for heatmaps while the products are in memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlens.circuits import FactoredProduct, Fold, Kind
from attnlens.heads import Array, HeadWeights
from attnlens.statistics.table import ALL_HEADS

HEATMAP_ENTRIES = 4_500_000
"""Entries of all panels of a heatmap that is drawn unasked: 64 x 64 of each product of 32 layers of 32 heads, say."""
HEATMAP_SIDE = 16_384
"""Entries of all panels of one layer, side by side"""


@dataclass
class Corners:
    """The top-left ``size x size`` corners of every product under one fold, kept by `observe` for the heatmaps.

    Where they are ``bounded``, the size shrinks with the number of heads: an image has at most `HEATMAP_ENTRIES`.
    """

    fold: Fold
    size: int
    bounded: bool = False
    panels: dict[tuple[Kind, int], dict[int | str, NDArray[np.float32]]] = field(default_factory=dict, repr=False)
    shapes: dict[tuple[Kind, int], tuple[int, int]] = field(default_factory=dict, repr=False)
    _counts: Counter[tuple[Kind, int]] = field(default_factory=Counter, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def observe(self, weights: HeadWeights, circuit: Kind, fold: Fold, product: FactoredProduct) -> None:
        """Keep the corners of a stack of products, or of a sum."""
        if fold == self.fold:
            if self.bounded:
                self._make_room(circuit, weights.layer, product.shape[0] if len(product.shape) > 2 else 1)
            self._keep(weights.layer, circuit, product.dense(self.size), product.shape)

    def _make_room(self, circuit: Kind, layer: int, panels: int) -> None:
        """Choose the size for what is to come, too, and cut what is there."""
        with self._lock:
            self._counts[circuit, layer] += panels
            mine = [count for (kind, _), count in self._counts.items() if kind == circuit]
            largest = min(math.isqrt(HEATMAP_ENTRIES // sum(mine)), HEATMAP_SIDE // max(mine))
            self.size = min(self.size, max(2, largest))
            self._cut()

    def _keep(self, layer: int, circuit: Kind, corners: Array, shape: Sequence[int]) -> None:
        found = {ALL_HEADS: corners} if corners.ndim == 2 else dict(enumerate(corners))
        with self._lock:
            kept = self.panels.setdefault((circuit, layer), {})
            kept.update({head: corner.astype(np.float32) for head, corner in found.items()})
            self.shapes[circuit, layer] = (shape[-2], shape[-1])
            self._cut()

    def _cut(self) -> None:
        for kept in self.panels.values():
            for head, corner in kept.items():
                if max(corner.shape) > self.size:
                    kept[head] = corner[: self.size, : self.size].copy()

    def of(self, circuit: Kind) -> tuple[dict[int, dict[int | str, Any]], dict[int, tuple[int, int]]]:
        """Return the corners of one circuit by layer and head, layers in order, and the whole products' shapes."""
        layers = sorted(layer for kind, layer in self.panels if kind == circuit)
        panels = {layer: self.panels[circuit, layer] for layer in layers}
        return panels, {layer: self.shapes[circuit, layer] for layer in layers}
