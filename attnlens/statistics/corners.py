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
from attnlens.circuits.factored import SAFE_EXPONENT, exponent_of
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
    Where ``preferred`` is measured too, ``fold`` becomes that, and what was kept of the other is dropped.
    """

    fold: Fold
    size: int
    bounded: bool = False
    preferred: Fold | None = None
    panels: dict[tuple[Kind, int], dict[int | str, NDArray[np.floating]]] = field(default_factory=dict, repr=False)
    shapes: dict[tuple[Kind, int], tuple[int, int]] = field(default_factory=dict, repr=False)
    _counts: Counter[tuple[Kind, int]] = field(default_factory=Counter, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)
    _widest: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Remember the size before it shrinks."""
        self._widest = self.size
        self._totals: Counter[Kind] = Counter()
        self._most: Counter[Kind] = Counter()

    def observe(self, weights: HeadWeights, circuit: Kind, fold: Fold, product: FactoredProduct) -> None:
        """Keep the corners of a stack of products, or of a sum."""
        with self._lock:
            if fold == self.preferred:
                self._turn_to(fold)
            if fold != self.fold:
                return
            if self.bounded:
                self._make_room(circuit, weights.layer, product.shape[0] if len(product.shape) > 2 else 1)
        corners = product.dense(self.size)
        with self._lock:
            if fold == self.fold:  # another thread may have turned to the preferred one
                self._keep(weights.layer, circuit, corners, product.shape)

    def _turn_to(self, fold: Fold) -> None:
        self.fold, self.preferred, self.size = fold, None, self._widest
        for held in (self.panels, self.shapes, self._counts, self._totals, self._most):
            held.clear()

    def _make_room(self, circuit: Kind, layer: int, panels: int) -> None:
        """Choose the size for what is to come, too, and cut what is there where it shrinks."""
        self._counts[circuit, layer] += panels
        self._totals[circuit] += panels
        self._most[circuit] = max(self._most[circuit], self._counts[circuit, layer])
        largest = min(math.isqrt(HEATMAP_ENTRIES // self._totals[circuit]), HEATMAP_SIDE // self._most[circuit])
        if max(2, largest) < self.size:
            self.size = max(2, largest)
            for kept in self.panels.values():
                self._cut(kept)

    def _keep(self, layer: int, circuit: Kind, corners: Array, shape: Sequence[int]) -> None:
        found = {ALL_HEADS: corners} if corners.ndim == 2 else dict(enumerate(corners))
        kept = self.panels.setdefault((circuit, layer), {})
        for head, corner in found.items():
            kept[head] = corner.astype(np.float32 if fits_float32(corner) else np.float64)
        self.shapes[circuit, layer] = (shape[-2], shape[-1])
        self._cut(kept)

    def _cut(self, kept: dict[int | str, NDArray[np.floating]]) -> None:
        for head, corner in kept.items():
            if max(corner.shape) > self.size:
                kept[head] = corner[: self.size, : self.size].copy()

    def of(self, circuit: Kind) -> tuple[dict[int, dict[int | str, Any]], dict[int, tuple[int, int]]]:
        """Return the corners of one circuit by layer and head, layers in order, and the whole products' shapes."""
        layers = sorted(layer for kind, layer in self.panels if kind == circuit)
        panels = {layer: self.panels[circuit, layer] for layer in layers}
        return panels, {layer: self.shapes[circuit, layer] for layer in layers}


def fits_float32(corner: NDArray[np.floating]) -> bool:
    """Whether float32 holds a corner and the squares of its large entries."""
    return corner.dtype == np.float32 or abs(int(exponent_of(corner))) <= SAFE_EXPONENT
