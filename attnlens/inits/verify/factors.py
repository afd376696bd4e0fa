"""What alpha and beta of a product do not show: its split between two weights, and directions that are missing."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from attnlens.circuits import Fold, side_by_side
from attnlens.heads import Array, HeadWeights, expand_groups
from attnlens.inits.folding import folded
from attnlens.inits.gained import Factors
from attnlens.inits.plan import ALL_HEADS, Layer, Plan
from attnlens.inits.report import ProductReport
from attnlens.inits.verify.mistakes import one_product

_SPREADS = 6.0
_EMPTY, _SMALL, _ABSENT, _KEPT = 1e-9, 1e-2, 0.1, 0.01
"""Shares of the largest singular value: none, too little to judge; of the planned one: gone, and error of the rest."""


def split_problem(layer: Layer, row: ProductReport, plan: Plan, fold: Fold, limit: float | None) -> str:
    """Say where a product is split between its two weights otherwise than planned; empty where it is not.

    The ratio ||A|| / ||B|| of the two factors, in the fold's coordinates, is compared with the plan's: within ``limit``
    (relative) for a known draw, else within six standard errors 1 / sqrt(d k) of a draw's. Products do not show it,
    gradients do: that of W_Q is proportional to W_K. Of a product with gains, the balanced product's factors are meant.
    """
    have = _norms(folded(layer.weights, fold), layer, row, fold)
    wanted = _norms({**folded(layer.weights, fold), **plan.weights()}, layer, row, fold)
    if not (all(have) and all(wanted)):
        return ""
    ratio, expected = have[0] / have[1], wanted[0] / wanted[1]
    if limit is None:
        limit = _SPREADS / math.sqrt(_numbers(layer.weights, row))
    if abs(math.log(ratio / expected)) <= limit:
        return ""
    left, right = ("W_Q", "W_K") if row.circuit == "qk" else ("W_V", "W_O")
    return f"||{left}|| / ||{right}|| is {ratio:.4g}, expected {expected:.4g} within {100 * limit:.2g}%"


def _norms(weights: dict[str, Array], layer: Layer, row: ProductReport, fold: Fold) -> tuple[float, float]:
    """Return the Frobenius norms of the two factors of one product, without its gains where it is balanced."""
    heads = layer.weights
    if row.circuit == "qk":
        left, right = weights["q"], expand_groups(weights["k"], heads.num_heads)
    else:
        left, right = weights["v"], weights["o"]
        if row.head != ALL_HEADS:
            left = expand_groups(left, heads.num_value_heads)
    if row.head != ALL_HEADS:
        left, right = left[[int(row.head)]], right[[int(row.head)]]
    if fold == "balanced":
        right = right if row.circuit == "qk" else right.swapaxes(1, 2)
        product = Factors(side_by_side(expand_groups(left, len(right))), side_by_side(right)).product()
        gains = product.balanced().gains
        assert gains is not None
        left, right = left / gains.rows[:, None], right / gains.cols[:, None]
    return float(np.linalg.norm(left)), float(np.linalg.norm(right))


def _numbers(weights: HeadWeights, row: ProductReport) -> int:
    """Return how many numbers the smaller of the two factors holds."""
    if row.circuit == "qk":
        return weights.embed_dim * weights.head_dim
    heads = len(weights.W_V) if row.head == ALL_HEADS else 1
    return min(weights.embed_dim, weights.out_dim) * weights.value_dim * heads


def empty_directions(layer: Layer, row: ProductReport, fold: Fold, rank: int) -> int:
    """Return how many of the ``rank`` singular directions a product can have hold nothing."""
    product = one_product(layer.weights, row.circuit, row.head, fold)
    values = product.singular_values()[..., :rank]
    return int(rank - np.count_nonzero(values > _EMPTY * values.max(initial=0.0)))


def skipped_directions(layer: Layer, row: ProductReport, planned: HeadWeights, fold: Fold) -> int:
    """Return how many of the planned singular directions a product lacks where it has all others as planned, else 0.

    With U S V^T the planned product, u_i^T M v_i / s_i is 1 where direction i is there and 0 where it was left out,
    whatever else took its place.
    """
    wanted = one_product(planned, row.circuit, row.head, fold)
    (left, R), (right, T) = np.linalg.qr(wanted.A), np.linalg.qr(wanted.B)
    U, S, Vh = np.linalg.svd(R @ T.T, full_matrices=False)
    there = S / (S.max(initial=0.0) or 1.0) > _SMALL
    if there.sum() < 2:
        return 0
    have = one_product(layer.weights, row.circuit, row.head, fold)
    found = np.einsum("ki,kr,rj,ij->i", (left @ U)[:, there], have.A, have.B.T @ right, Vh[there], optimize=True)
    share = found / S[there]
    absent = np.abs(share) < _ABSENT
    kept = np.abs(share[~absent] - 1)
    return int(absent.sum()) if absent.sum() < len(share) / 2 and (kept < _KEPT).all() else 0


def bias_deviations(have: HeadWeights, planned: HeadWeights, settled: frozenset[str]) -> Iterator[tuple[str, float]]:
    """Yield the name of each bias that is set and the largest deviation from it, for the roles in ``settled``."""
    for role in ("q", "k", "v", "o"):
        name = f"b_{role.upper()}"
        wanted: Array | None = getattr(planned, name)
        stored: Array | None = getattr(have, name)
        if role in settled and wanted is not None and stored is not None:
            yield name, float(np.abs(stored - wanted).max() / max(1.0, np.abs(wanted).max()))
