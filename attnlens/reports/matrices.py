"""What the page draws of each product, made small: a corner for the heatmap, a histogram, a spectrum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from attnlens.circuits import CIRCUITS, Fold, Kind, sum_of
from attnlens.heads import Array, HeadWeights
from attnlens.inspection import Inspection
from attnlens.statistics.table import ALL_HEADS
from attnlens.threads import Progress

CODES = "".join(chr(code) for code in range(32, 127) if chr(code) not in "\"'&<>\\")
"""A character a level, none of which JSON or HTML would write longer: an odd number, so that zero has one."""
HALF = len(CODES) // 2

CORNER = 64
"""Rows and columns of each product that a heatmap shows, where there is room."""
HEATMAP_BYTES = 2_600_000
"""Room for all heatmaps of a page; a model with more heads gets smaller corners."""
SMALLEST_CORNER = 16
BINS = 41
DIGITS = 4


def corner_size(inspection: Inspection) -> int:
    """Return the side of the corners shown: CORNER, or what keeps all of them within HEATMAP_BYTES."""
    keys = ("layer", "head", "circuit", "fold")
    products = len({tuple(record[key] for key in keys) for record in inspection.stats.records()})
    return max(SMALLEST_CORNER, min(CORNER, math.isqrt(HEATMAP_BYTES // max(1, products))))


def draw_data(inspection: Inspection, size: int, progress: Progress = iter) -> dict[str, dict[str, Any]]:
    """Return by ``layer.head.circuit.fold`` what is drawn of a product: ``corner``, ``histogram``, ``singular``."""
    matrices: dict[str, dict[str, Any]] = {}
    for layer in progress(inspection.layers):
        weights = inspection.heads(layer)
        for circuit in CIRCUITS:
            for fold in inspection.folds:
                if (layer, circuit, fold) in inspection.spectra:
                    singular = inspection.spectra[layer, circuit, fold]
                    matrices |= dict(_of_layer(weights, circuit, fold, singular, size))
    return matrices


def _of_layer(
    weights: HeadWeights, circuit: Kind, fold: Fold, singular: Array, size: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    stack = CIRCUITS[circuit](weights, fold)
    corners = stack.dense(size)
    diagonals = stack.diagonal() if stack.is_square else None
    for head in range(len(corners)):
        diagonal = None if diagonals is None else diagonals[head]
        drawn = _drawn(corners[head], diagonal) | {"singular": rounded(singular[head])}
        yield f"{weights.layer}.{head}.{circuit}.{fold}", drawn
    if circuit == "ov":
        total = sum_of(stack, weights, fold)
        diagonal = None if diagonals is None else total.diagonal()
        yield f"{weights.layer}.{ALL_HEADS}.{circuit}.{fold}", _drawn(total.dense(size), diagonal)


def _drawn(corner: Array, diagonal: Array | None) -> dict[str, Any]:
    drawn: dict[str, Any] = {"corner": encode(corner)}
    if diagonal is not None:
        counts, edges = np.histogram(diagonal, bins=BINS)
        drawn["histogram"] = {"low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist()}
    return drawn


def encode(matrix: Array) -> dict[str, Any]:
    """Write a matrix as text, a character an entry: level = HALF * asinh(entry / w) / asinh(clip / w), rounded.

    w is the entries' root mean square and clip the largest modulus, so that nothing is cut off. An entry is kept
    to ``asinh(clip / w) / (2 HALF) * hypot(entry, w)``, about.
    """
    clip = float(np.abs(matrix).max(initial=0.0)) or 1.0
    width = float(np.sqrt(np.mean(matrix**2))) or 1.0
    levels = np.rint(HALF * np.arcsinh(matrix / width) / math.asinh(clip / width)).astype(int) + HALF
    text = "".join(CODES[level] for level in levels.ravel())
    return {"rows": matrix.shape[0], "columns": matrix.shape[1], "width": width, "clip": clip, "text": text}


def rounded(values: Array) -> list[float]:
    """Round to the digits a line needs."""
    return [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
