"""Drawn products with gains: balanced, at a given alpha, seen through one gain a row and one a column.

    M = diag(r) N diag(c),   N = diag(g)^-1 A B^T diag(h)^-1 alpha / alpha_0,   A B^T ~ alpha Z + beta I at rank k

N is balanced, so that balancing M gives r and c back, and N: alpha of N is met exactly, beta as every draw meets it.
Which channel of N stands where changes neither, but it decides which entry the largest gains meet, and so the tails of
M, which a handful of entries hold: `placed` picks a place for which M has the kurtosis asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnlens.circuits import FactoredProduct, WholeProduct
from attnlens.errors import UsageError
from attnlens.heads import Array
from attnlens.inits.plan import ALL_HEADS, Layer, PlannedGains, Request
from attnlens.inits.report import expected_parameters
from attnlens.statistics.diagonal import alpha_beta

if TYPE_CHECKING:
    from attnlens.fit.gains import LayerGains

CLOSE = 0.05
"""Distance from the kurtosis asked for at which the search ends, by `apart`."""
_EXCHANGES, _TOP = 64, 32


class Factors(NamedTuple):
    """Two factors of a product, ``left @ right.T``, each ``[channel, inner]``."""

    left: Array
    right: Array

    def product(self) -> FactoredProduct:
        """Return it as a product, whole where its factors are no narrower than itself."""
        width, inner = self.left.shape
        if inner < width:
            return FactoredProduct(self.left, self.right)
        return WholeProduct.of(self.left @ self.right.T, inner)


def gained_heads(
    layer: Layer, requests: Sequence[Request], drawn: tuple[Array, Array], group: int, gains: LayerGains | None
) -> tuple[Array, Array, tuple[PlannedGains, ...]]:
    """Give the products of a layer their gains: factors ``[head, channel, inner]``, left @ right^T; none without.

    Raises `UsageError` where ``group`` heads share a factor: its channels cannot have the gains of each head.
    """
    if gains is None:
        return *drawn, ()
    if group > 1:
        raise UsageError(
            f"{group} heads of {layer.spec.path} share a projection, which cannot have the gains of each: "
            "pass gains='none'"
        )
    heads, width = drawn[0].shape[:2]
    circuit = requests[0].circuit
    stream = layer.streams.numpy_generator(
        "gains", layer.index, 2 * (circuit == "ov") + (requests[0].head == ALL_HEADS)
    )
    rows, cols = gains.draw(heads, width, stream)
    tails = np.broadcast_to(gains.kurtosis, heads)
    found = [
        with_gains(
            Factors(*factors),
            r,
            c,
            expected_parameters(layer, request).alpha,
            float(kurtosis),
        )
        for *factors, r, c, request, kurtosis in zip(*drawn, rows, cols, requests, tails, strict=True)
    ]
    left, right = (np.stack(side) for side in zip(*found, strict=True))
    planned = [
        PlannedGains(circuit, request.head, gains.by_channel, float(kurtosis))
        for request, kurtosis in zip(requests, tails, strict=True)
    ]
    return left, right, tuple(planned)


def with_gains(drawn: Factors, rows: Array, cols: Array, alpha: float, kurtosis: float) -> Factors:
    """Return the factors of diag(rows) N diag(cols), N the drawn product balanced and brought to ``alpha``.

    A gain of 0 makes a dead row or column. ``kurtosis``: excess, off the diagonal; NaN leaves the draw as it came.
    """
    alive_rows, alive_cols = rows > 0, cols > 0
    drawn = Factors(drawn.left * alive_rows[:, None], drawn.right * alive_cols[:, None])
    product = drawn.product().balanced()
    assert product.gains is not None
    found = float(alpha_beta(product.diagonal(), product.squared_norm())[0])
    size = math.sqrt(alpha / found) if found > 0 else 1.0
    left = drawn.left * (size / product.gains.rows)[:, None]
    right = drawn.right * (size / product.gains.cols)[:, None]
    if math.isfinite(kurtosis) and found > 0:
        place = placed(left @ right.T, rows, cols, kurtosis)
        left, right = left[place], right[place]
    return Factors(left * rows[:, None], right * cols[:, None])


def placed(N: Array, rows: Array, cols: Array, kurtosis: float) -> NDArray[np.intp]:
    """Return an order p of channels for which diag(rows) N[p][:, p] diag(cols) comes near a kurtosis.

    From the order of the draw on, channels are exchanged in pairs, one of them among those with the 32 largest gains:
    the pair that brings the kurtosis nearest, until it is within `CLOSE`, or no pair brings it nearer, 64 times at
    most. Dead channels stay where they are. O(d^2) an exchange, all pairs considered: exchanging the gains of channels
    a and b in u^T S w adds du (S w)_a - du (S w)_b + dw (S^T u)_a - dw (S^T u)_b + du dw (S_aa - S_ab - S_ba + S_bb).
    """
    squares = N**2
    np.fill_diagonal(squares, 0.0)
    sums = tuple(_Sum(matrix, rows**power, cols**power) for matrix, power in ((squares, 2), (squares**2, 4)))
    free = np.flatnonzero((rows > 0) & (cols > 0))
    order = np.arange(len(N))
    distance = float(apart(_kurtosis(sums[0].value(), sums[1].value(), len(N)), kurtosis))
    for _ in range(_EXCHANGES):
        if distance <= CLOSE or len(free) < 2:
            break
        sizes = (sums[0].u + sums[0].w)[free]
        top = free[np.argsort(-sizes)[:_TOP]]
        away = apart(_kurtosis(sums[0].exchanged(top, free), sums[1].exchanged(top, free), len(N)), kurtosis)
        one, other = np.unravel_index(int(np.argmin(away)), away.shape)
        if not away[one, other] < distance:
            break
        pair = [top[one], free[other]]
        for each in sums:
            each.exchange(pair)
        order[pair] = order[pair[::-1]]
        distance = float(apart(_kurtosis(sums[0].value(), sums[1].value(), len(N)), kurtosis))
    return np.argsort(order)


class _Sum:
    """u^T S w, S of zero diagonal, and what it becomes where two channels exchange their gains u and w."""

    def __init__(self, S: Array, u: Array, w: Array) -> None:
        self.S, self.u, self.w = S, u.copy(), w.copy()

    def value(self) -> Array:
        return np.asarray(self.u @ self.S @ self.w)

    def exchange(self, pair: list[np.intp]) -> None:
        for gains in (self.u, self.w):
            gains[pair] = gains[pair[::-1]]

    def exchanged(self, some: NDArray[np.intp], others: NDArray[np.intp]) -> Array:
        """Return the sum after each exchange of one of some with one of others, ``[some, other]``."""
        ahead, behind = self.S @ self.w, self.u @ self.S
        du, dw = (gains[others] - gains[some][:, None] for gains in (self.u, self.w))
        corner = self.S[np.ix_(some, others)] + self.S[np.ix_(others, some)].T
        moved = du * (ahead[some][:, None] - ahead[others]) + dw * (behind[some][:, None] - behind[others])
        return np.asarray(self.value() + moved - du * dw * corner)


def _kurtosis(second: Array, fourth: Array, width: int) -> Array:
    """Return the excess kurtosis about zero from the sums of squares and of fourth powers off the diagonal."""
    return np.asarray(fourth * (width * (width - 1)) / second**2 - 3)


def offdiagonal_tails(N: Array, rows: Array, cols: Array) -> float:
    """Return the excess kurtosis about zero of diag(rows) N diag(cols) off its diagonal."""
    squares = N**2
    np.fill_diagonal(squares, 0.0)
    second, fourth = (rows**power @ matrix @ cols**power for matrix, power in ((squares, 2), (squares**2, 4)))
    return float(_kurtosis(second, fourth, len(N)))


def apart(found: Array | float, wanted: float) -> Array:
    """Return the distance of excess kurtoses: relative where they are well above 0.1, in tenths near zero."""
    return np.asarray(np.abs(np.arcsinh(10 * np.asarray(found)) - np.arcsinh(10 * wanted)))
