"""The statistics of every circuit of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from attnlens.balance import Gains
from attnlens.circuits import FactoredProduct, Fold, Kind, fold_ov, fold_qk, layer_ov, ov_circuit, qk_circuit
from attnlens.heads import Array, HeadWeights
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.statistics.gains import describe_gains
from attnlens.statistics.table import ALL_HEADS, Row

SpectrumKey = tuple[int, Kind, Fold]
GainsKey = tuple[int, Kind, str]
Observe = Callable[[HeadWeights, Kind, Fold, FactoredProduct], None]
"""Called with a layer's products under a fold while they are in memory: a stack by head, or the sum, one matrix."""


def measure_layer(
    weights: HeadWeights, folds: Sequence[Fold], *, layer_spectra: bool = False, observe: Observe | None = None
) -> tuple[list[Row], dict[SpectrumKey, Array], dict[GainsKey, Gains]]:
    """Fit every circuit of one layer: table rows, singular values ``[head, rank]`` and balanced products' gains."""
    rows: list[Row] = []
    spectra: dict[SpectrumKey, Array] = {}
    gains: dict[GainsKey, Gains] = {}
    raw = {"qk": qk_circuit(weights)}
    if weights.W_O is not None:
        raw |= {"ov": ov_circuit(weights), "sum": replace(layer_ov(weights), parts=None)}
    for fold in folds:
        if fold != "raw" and "norm_unknown" in weights.leaves_out:
            continue
        for name, product in raw.items():
            circuit: Kind = "qk" if name == "qk" else "ov"
            folded = (fold_qk if name == "qk" else fold_ov)(product, weights, fold)
            if observe is not None:
                observe(weights, circuit, fold, folded)
            heads: Iterable[int | str] = (ALL_HEADS,) if name == "sum" else range(folded.shape[0])
            unit, exponent = folded.unit
            singular = unit.singular_values() if name != "sum" or layer_spectra else None
            if name != "sum" and singular is not None:
                spectra[weights.layer, circuit, fold] = np.ldexp(singular, exponent[..., None])
            if folded.gains is not None:
                gains[weights.layer, circuit, ALL_HEADS if name == "sum" else "each"] = folded.gains
            fit = fit_diagonal(unit, singular).times(exponent)
            rows += _rows(weights, heads, circuit, fold, (fit, describe_gains(folded)))
    return rows, spectra, gains


def _rows(
    weights: HeadWeights, heads: Iterable[int | str], circuit: Kind, fold: Fold, found: Sequence[Any]
) -> list[Row]:
    statistics = [np.atleast_1d(getattr(each, name)).tolist() for each in found for name in each.names()]
    about = (weights.num_heads, weights.name, " ".join(weights.leaves_out))
    return [
        (weights.layer, head, circuit, fold, *values, *about) for head, *values in zip(heads, *statistics, strict=True)
    ]
