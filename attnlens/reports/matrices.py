"""What the page draws of each product, made small: a corner for the heatmap, a histogram, a spectrum."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from attnlens.circuits import CIRCUITS, FOLDS, FactoredProduct, Fold, Kind
from attnlens.circuits.factored import exponent_of
from attnlens.heads import Array, HeadWeights
from attnlens.inspection import Inspection
from attnlens.statistics.table import ALL_HEADS

Key = tuple[int, int | str, Kind, Fold]
"""Layer, head (``all``: summed), circuit and fold of a product."""
CODES = "".join(chr(code) for code in range(32, 127) if chr(code) not in "\"'&<>\\")
"""A character a level, none of which JSON or HTML would write longer: an odd number, so that zero has one."""
HALF = len(CODES) // 2
_CODES = np.frombuffer(CODES.encode(), np.uint8)

CORNER = 64
"""Rows and columns of each product that a heatmap shows, where there is room."""
HEATMAP_BYTES = 2_600_000
"""Room for all heatmaps of a page; a model with more heads gets smaller corners."""
SMALLEST_CORNER = 16
BINS = 41
DIGITS = 4
_ROUNDING, _SMALLEST = 1e-14, 1e-300
"""Of a value's size, and of any: less is no range of values to count in. Entries below the second are drawn as zero."""


def corner_size(inspection: Inspection) -> int:
    """Return the side of the corners shown: CORNER, or what keeps all of them within HEATMAP_BYTES."""
    keys = ("layer", "head", "circuit", "fold")
    products = len({tuple(record[key] for key in keys) for record in inspection.stats.records()})
    return _side(products)


def _side(products: int) -> int:
    return max(SMALLEST_CORNER, min(CORNER, math.isqrt(HEATMAP_BYTES // max(1, products))))


@dataclass(frozen=True)
class Drawings:
    """What the page draws of every product, taken while the products are measured: a corner, and the diagonal."""

    corners: dict[Key, Array] = field(default_factory=dict)
    diagonals: dict[Key, Array] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def observe(self, weights: HeadWeights, circuit: Kind, fold: Fold, product: FactoredProduct) -> None:
        """Keep the largest corners that a page shows, and the diagonals of square products: an `Observe`."""
        summed = len(product.shape) == 2
        side = _side(len(self.corners) + (1 if summed else product.shape[0]))
        corners = product.dense(side).copy()
        diagonals = product.diagonal().copy() if product.is_square else None
        with self._lock:
            before, come = _side(len(self.corners)), list[Key]()
            for index, corner in enumerate(corners[None] if summed else corners):
                key = weights.layer, ALL_HEADS if summed else index, circuit, fold
                self.corners[key] = corner
                come.append(key)
                if diagonals is not None:
                    self.diagonals[key] = diagonals if summed else diagonals[index]
            side = _side(len(self.corners))
            for key in self.corners if side < before else come:
                corner = self.corners[key]
                if max(corner.shape) > side:
                    self.corners[key] = corner[:side, :side].copy()

    def data(self, inspection: Inspection, size: int) -> dict[str, dict[str, Any]]:
        """Return by ``layer.head.circuit.fold`` what is drawn: ``corner``, ``histogram``, ``singular``."""
        drawn = {}
        for key in sorted(self.corners, key=_order):
            layer, head, circuit, fold = key
            found = _drawn(self.corners[key][:size, :size], self.diagonals.get(key))
            if isinstance(head, int):
                found["singular"] = rounded(inspection.spectra[layer, circuit, fold][head])
            drawn[f"{layer}.{head}.{circuit}.{fold}"] = found
        return drawn


def _order(key: Key) -> tuple[int, int, int, float]:
    """Return the place of a product on the page: by layer, circuit and fold, the sum behind the heads."""
    layer, head, circuit, fold = key
    return layer, list(CIRCUITS).index(circuit), FOLDS.index(fold), head if isinstance(head, int) else math.inf


def _drawn(corner: Array, diagonal: Array | None) -> dict[str, Any]:
    drawn: dict[str, Any] = {"corner": encode(corner)}
    if diagonal is not None:
        counts, edges = np.histogram(diagonal, bins=BINS, range=_range(diagonal))
        drawn["histogram"] = {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
    return drawn


def _range(values: Array) -> tuple[float, float]:
    """Return the least and the largest value, and more room where the bins between would not be told apart."""
    low, high = float(values.min()), float(values.max())
    size = max(abs(low), abs(high))
    if high - low > max(_ROUNDING * size, _SMALLEST):
        return low, high
    room = max(0.5, _ROUNDING * size)
    return low - room, high + room


def encode(matrix: Array) -> dict[str, Any]:
    """Write a matrix as text, a character an entry: level = HALF * asinh(entry / w) / asinh(clip / w), rounded.

    w is the entries' root mean square and clip the largest modulus, so that nothing is cut off. An entry is kept
    to ``asinh(clip / w) / (2 HALF) * hypot(entry, w)``, about.
    """
    matrix = matrix if np.abs(matrix).max(initial=0.0) >= _SMALLEST else np.zeros_like(matrix)
    exponent = int(exponent_of(matrix))
    unit = np.ldexp(matrix, -exponent)  # whose squares are numbers
    clip = float(np.abs(unit).max(initial=0.0)) or 1.0
    width = float(np.sqrt(np.mean(unit**2))) or 1.0
    levels = np.rint(HALF * np.arcsinh(unit / width) / math.asinh(clip / width)).astype(int) + HALF
    text = _CODES[levels].tobytes().decode()
    width, clip = (math.ldexp(size, exponent) for size in (width, clip))
    return {"rows": matrix.shape[0], "columns": matrix.shape[1], "width": width, "clip": clip, "text": text}


def rounded(values: Array) -> list[float]:
    """Round to the digits a line needs."""
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
