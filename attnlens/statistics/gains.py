"""What is said of a balanced product beside its fit: its gains, and what is left of the entries' tails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from attnlens.balance import Gains
from attnlens.circuits import FactoredProduct, Kind
from attnlens.heads import Array
from attnlens.statistics.pairs import offdiagonal_kurtosis


@dataclass(frozen=True)
class GainStatistics:
    """Statistics of a stack of balanced products N = diag(r)^-1 M diag(c)^-1; NaN for products of another fold."""

    row_gain_spread: Array
    """standard deviation of log(r) over the rows that have an off-diagonal entry"""
    column_gain_spread: Array
    """the same of log(c) over columns"""
    gain_share: Array
    """squared correlation of M_ii with r_i c_i: share of the variance of M's diagonal that the gains explain"""
    dead_channels: Array
    """rows and columns of M without an off-diagonal entry: they have no gain"""
    balance_residual: Array
    """largest relative deviation of the mean square of a row or column of N from that of all"""
    offdiagonal_kurtosis: Array
    """excess kurtosis of the off-diagonal entries of N, from 2^16 of them and the largest channels; 0 if Gaussian"""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the statistics' names in table order."""
        return tuple(f.name for f in fields(cls))


def describe_gains(product: FactoredProduct) -> GainStatistics:
    """Return the gains' statistics of every product of a stack."""
    gains = product.gains
    undefined = np.full(product.shape[:-2], np.nan)
    if gains is None:
        return GainStatistics(*(undefined for _ in fields(GainStatistics)))
    square = product.is_square
    return GainStatistics(
        row_gain_spread=_spread(np.log(gains.rows), gains.alive_rows),
        column_gain_spread=_spread(np.log(gains.cols), gains.alive_cols),
        gain_share=_squared_correlation(product.unit[0].diagonal(), gains.rows * gains.cols) if square else undefined,
        dead_channels=np.asarray((~gains.alive_rows).sum(-1) + (~gains.alive_cols).sum(-1), dtype=np.float64),
        balance_residual=gains.residual,
        offdiagonal_kurtosis=offdiagonal_kurtosis(product) if square else undefined,
    )


def _spread(logarithm: Array, alive: NDArray[np.bool_]) -> Array:
    count = alive.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(alive, logarithm, 0.0).sum(-1) / count
        return np.sqrt((np.where(alive, logarithm - mean[..., None], 0.0) ** 2).sum(-1) / count)


def _squared_correlation(balanced: Array, gain: Array) -> Array:
    """Return the squared correlation over channels of N_ii r_i c_i with r_i c_i."""
    diagonal = balanced * gain
    x, y = (values - values.mean(-1, keepdims=True) for values in (diagonal, gain))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((x * y).sum(-1) ** 2 / ((x**2).sum(-1) * (y**2).sum(-1)))


@dataclass(frozen=True)
class GainProfile:
    """One side's gains by layer and channel."""

    layers: tuple[int, ...]
    log_gains: Array
    """``[layer, channel]``, log2; NaN for a channel without a gain"""
    correlation: float
    """mean over pairs of layers of the correlation of their log gains over channels; NaN with one layer"""


def gain_profiles(gains: Mapping[tuple[int, Kind, str], Gains]) -> dict[str, GainProfile]:
    """Return the gains of each side: of QK the mean logarithm over heads, of OV that of the layer's sum.

    ``gains`` are those of `Inspection.gains`, by (layer, circuit, ``each`` or ``all``). Layers of another width than
    the first are left out.
    """
    found = {}
    for (circuit, heads, side), title in _SIDES.items():
        by_layer = {
            layer: _log2(getattr(each, side), getattr(each, f"alive_{side}"))
            for (layer, kind, which), each in sorted(gains.items())
            if (kind, which) == (circuit, heads)
        }
        width = len(next(iter(by_layer.values()), ()))
        by_layer = {layer: values for layer, values in by_layer.items() if len(values) == width}
        if by_layer:
            values = np.stack(list(by_layer.values()))
            found[title] = GainProfile(tuple(by_layer), values, _mean_correlation(values))
    return found


_SIDES: dict[tuple[Kind, str, str], str] = {
    ("qk", "each", "rows"): "QK, query side",
    ("qk", "each", "cols"): "QK, key side",
    ("ov", "all", "rows"): "OV, what is read",
    ("ov", "all", "cols"): "OV, what is written",
}


def _log2(gains: Array, alive: NDArray[np.bool_]) -> Array:
    """Return the mean of log2 over the heads in which a channel has a gain, ``[channel]``."""
    counted, logarithm = np.atleast_2d(alive), np.atleast_2d(np.where(alive, np.log2(gains), 0.0))
    with np.errstate(invalid="ignore"):
        return np.asarray(logarithm.sum(0) / counted.sum(0))


def _mean_correlation(values: Array) -> float:
    values = values[:, np.isfinite(values).all(0)]
    if len(values) < 2 or values.shape[1] < 2:
        return math.nan
    values = values - values.mean(1, keepdims=True)
    norms = np.sqrt((values**2).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        correlations = values @ values.T / np.outer(norms, norms)
    return float(correlations[np.triu_indices(len(values), 1)].mean())
