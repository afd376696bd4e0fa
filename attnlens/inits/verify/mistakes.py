"""Mistakes in initialisers, recognised in the weights they leave behind.

Hypotheses with a prediction of their own, from the request alone, no seed needed:

- transposed OV: with W_V, W_O or both stored untransposed, the product of the transposes has the requested parameters;
- double square root: the product with every singular value squared has them;
- sign: the product has the requested alpha and minus the requested beta;
- noise 1/d, unscaled noise: the product has the parameters of a draw with alpha / sqrt(d), alpha * sqrt(d);
- packed by head: with rows read as [head][q|k|v] in place of [q|k|v][head] the products have them.

What is there though each product is as expected:

- cloned heads: the off-diagonals of two heads of a layer are one matrix;
- reused noise: the off-diagonals of products of two layers, or of both circuits, are one noise (`verify.reuse`);
- unbalanced split, skipped direction, bias not zero: see `verify.factors`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from attnlens.circuits import FactoredProduct, Fold, Kind, ov_circuit, qk_circuit, side_by_side
from attnlens.heads import Array, HeadWeights
from attnlens.inits.plan import ALL_HEADS, Layer
from attnlens.inits.report import ProductReport, expected_at, parameters
from attnlens.statistics.diagonal import off_diagonal_squares
from attnlens.statistics.inverse import Parameters

MISTAKES = (
    *("transposed OV", "noise 1/d", "double square root", "sign", "cloned heads", "unscaled noise", "packed by head"),
    *("reused noise", "unbalanced split", "skipped direction", "bias not zero"),
)
SAME_DRAW = 0.5
"""Cosine between two off-diagonals above which they are one draw; independent draws stay within a few times 1/d."""


class Tolerance(NamedTuple):
    """How far a finite draw's parameters may lie from the expected ones: absolute, for alpha and for beta."""

    alpha: float
    beta: float

    def distance(self, measured: Parameters, expected: Parameters) -> float:
        """Return the larger deviation in units of its tolerance: at most 1 where both parameters agree."""
        away = (abs(measured.alpha - expected.alpha) / self.alpha, abs(measured.beta - expected.beta) / self.beta)
        return math.inf if any(map(math.isnan, away)) else max(away)


_ALPHA_SPREADS, _BETA_SPREADS, _ROUNDINGS = 10.0, 6.0, 8.0
_SETTLED = 1e-4


def tolerance_at(expected: Parameters, width: int, eps: float, drawn: int = 1, rank: int | None = None) -> Tolerance:
    """Return the tolerance of a product of size ``width``: 10 alpha / d for alpha, 6 alpha / d for beta, and rounding.

    Single draws have a standard deviation of about alpha / d in both, and means within half of that of the closed form
    (measured: benchmarks/init_tolerance.py).
    ``drawn`` = 2 where the expected parameters are those of a draw themselves. ``eps`` is that of the stored type.
    Where the two factors may be drawn by themselves, each of d ``rank`` numbers, alpha has a standard deviation of
    alpha / sqrt(d rank): six of them are allowed where they are more.
    """
    spread = math.sqrt(drawn) * expected.alpha / width
    rounding = _ROUNDINGS * eps * (expected.alpha + abs(expected.beta)) + sys.float_info.min
    of_factors = 0.0 if rank is None else _BETA_SPREADS * math.sqrt(width / rank)
    return Tolerance(max(_ALPHA_SPREADS, of_factors) * spread + rounding, _BETA_SPREADS * spread + rounding)


def settled_alpha(expected: Parameters, tolerance: Tolerance, eps: float) -> Tolerance:
    """Return the tolerance where a draw is brought to its alpha: what storing it in a type of ``eps`` may cost."""
    return tolerance._replace(alpha=(_SETTLED + _ROUNDINGS * eps) * (expected.alpha + abs(expected.beta)))


def recognise(layer: Layer, row: ProductReport, fold: Fold, eps: float) -> str:
    """Name the mistake whose prediction a product meets, the closest where several do; empty where none does."""
    expected = Parameters(row.expected_alpha, row.expected_beta)
    if math.isnan(expected.alpha):
        return ""
    width, rank = size_of(layer, row)
    met: dict[str, float] = {}
    for name, measured, predicted in _hypotheses(layer, row, fold, expected, rank, width):
        distance = tolerance_at(predicted, width, eps).distance(measured, predicted)
        if distance <= 1:
            met[name] = min(distance, met.get(name, math.inf))
    return min(met, key=lambda name: met[name], default="")


def size_of(layer: Layer, row: ProductReport) -> tuple[int, int]:
    """Return width and rank of the product a row is about."""
    weights = layer.weights
    if row.circuit == "qk":
        return weights.embed_dim, min(weights.head_dim, weights.embed_dim)
    width = weights.out_dim
    return width, min(layer.values_width if row.head == ALL_HEADS else weights.value_dim, width)


def _hypotheses(
    layer: Layer, row: ProductReport, fold: Fold, expected: Parameters, rank: int, width: int
) -> Iterator[tuple[str, Parameters, Parameters]]:
    """Yield each mistake with a measured and a predicted pair of parameters that agree where it was made."""
    measured = Parameters(row.alpha, row.beta)
    requested = Parameters(row.requested_alpha, row.requested_beta)
    yield "sign", measured, Parameters(expected.alpha, -expected.beta)
    yield "noise 1/d", measured, expected_at(requested.alpha / math.sqrt(width), requested.beta, rank, width)
    yield "unscaled noise", measured, expected_at(requested.alpha * math.sqrt(width), requested.beta, rank, width)
    product = one_product(layer.weights, row.circuit, row.head, fold)
    yield "double square root", parameters(squared_values(product))[0], expected
    repacked = _repacked(layer.weights)
    if repacked is not None:
        yield "packed by head", parameters(one_product(repacked, row.circuit, row.head, fold))[0], expected
    if row.circuit == "ov" and row.head == ALL_HEADS:
        for other in _untransposed(layer):
            yield "transposed OV", parameters(one_product(other, "ov", ALL_HEADS, fold))[0], expected


def one_product(weights: HeadWeights, circuit: Kind, head: int | str, fold: Fold) -> FactoredProduct:
    """Return one product as factors: QK or OV of a head, or a layer's summed OV."""
    if fold == "balanced":
        return one_product(weights, circuit, head, "effective").balanced()
    if circuit == "qk":
        return qk_circuit(weights, fold).head(int(head))
    have = ov_circuit(weights, fold)
    if head == ALL_HEADS:
        return FactoredProduct(side_by_side(have.A), side_by_side(have.B))
    return have.head(int(head))


def squared_values(product: FactoredProduct) -> FactoredProduct:
    """Return U S^2 V^T of a product U S V^T, through the SVD of the core of two thin QRs."""
    (left, R), (right, T) = np.linalg.qr(product.A), np.linalg.qr(product.B)
    U, S, Vh = np.linalg.svd(R @ T.T, full_matrices=False)
    return FactoredProduct(left @ (U * S**2), right @ Vh.T)


def _untransposed(layer: Layer) -> Iterator[HeadWeights]:
    """Yield the layer with the stored matrices of V, of the output projection, and of both transposed."""
    weights = layer.weights
    if weights.W_O is None or layer.value_groups > 1 or layer.values_width != weights.out_dim:
        return
    left, right = side_by_side(weights.W_V), side_by_side(weights.W_O.swapaxes(1, 2))
    if left.shape[0] != left.shape[1]:
        return
    heads, width = weights.num_value_heads, weights.value_dim
    W_V = left.T.reshape(len(left), heads, width).transpose(1, 0, 2)
    W_O = right.reshape(heads, width, -1)
    yield weights.replace(W_V=W_V)
    yield weights.replace(W_O=W_O)
    yield weights.replace(W_V=W_V, W_O=W_O)


def _repacked(weights: HeadWeights) -> HeadWeights | None:
    """Return the layer with its rows, block by block, read as [head][q|k|v]; None where blocks differ in shape."""
    if not weights.W_Q.shape == weights.W_K.shape == weights.W_V.shape or len(weights.W_Q) == 1:
        return None
    blocks = np.concatenate([weights.W_Q, weights.W_K, weights.W_V])
    return weights.replace(W_Q=blocks[0::3], W_K=blocks[1::3], W_V=blocks[2::3])


def clones(product: FactoredProduct) -> list[tuple[int, int, float]]:
    """Return the pairs of heads of a stack, each with the first one it repeats, whose off-diagonals are one draw."""
    clones: list[tuple[int, int, float]] = []
    originals: list[int] = []
    for head in range(product.A.shape[0]):
        cosines = [(off_diagonal_cosine(product.head(head), product.head(first)), first) for first in originals]
        cosine, first = max(cosines, default=(0.0, head))
        if cosine > SAME_DRAW:
            clones.append((first, head, cosine))
        else:
            originals.append(head)
    return clones


def off_diagonal_cosine(one: FactoredProduct, other: FactoredProduct) -> float:
    """Return the cosine between the off-diagonals of two products of the same size, without forming them.

    <M, N> = <A_M^T A_N, B_M^T B_N>, less sum_i M_ii N_ii; 0 where an off-diagonal vanishes.
    """
    if one.shape != other.shape:
        return 0.0

    def inner(M: FactoredProduct, N: FactoredProduct) -> float:
        whole = np.vdot(M.A.T @ N.A, M.B.T @ N.B)
        return float(whole - M.diagonal() @ N.diagonal())

    lengths = inner(one, one) * inner(other, other)
    total = float(one.squared_norm() * other.squared_norm())
    return inner(one, other) / math.sqrt(lengths) if lengths > 1e-16 * total else 0.0


def diagonal_spread(product: FactoredProduct) -> Array:
    """Return sd(diag M) sqrt(d) / alpha of each product in a stack: 1 for i.i.d. noise, sqrt(2) for symmetric noise."""
    d = product.shape[-1]
    diagonal = product.diagonal()
    off = off_diagonal_squares(diagonal, product.squared_norm()) / (d * (d - 1))
    spread = diagonal.std(-1, ddof=1)
    return np.divide(spread, np.sqrt(off), out=np.full_like(spread, np.nan), where=off > 0)


def spread_limits(width: int) -> tuple[float, float]:
    """Return the limits of `diagonal_spread` for draws: 1 to sqrt(2), each with six standard errors 1 / sqrt(2 d)."""
    error = 6 / math.sqrt(2 * width)
    return 1 - error, math.sqrt(2) * (1 + error)


def balanced_spread_error(width: int, rank: int) -> float:
    """Return six relative standard errors of a balanced draw's `diagonal_spread`: of d channels and of k directions.

    Few directions carry the diagonal of a product of low rank, so that it varies more than d independent entries would.
    sqrt(1 / (2 d) + 1 / (8 k)) is .165 at d = 78 and k = 6, where 12 draws of each of 78 products spread by .13 of
    their mean, by .22 at most.
    """
    return 6 * math.sqrt(1 / (2 * width) + 1 / (8 * rank))
