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
_CANDIDATES, _ROUNDS, _TOP = 64, 24, 32


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
    places = [0 if request.head == ALL_HEADS else int(request.head) + (circuit == "ov") for request in requests]
    rows, cols = gains.draw(heads, width, layer.streams.numpy_generator(f"{circuit}_gains", layer.index, places[0]))
    tails = np.broadcast_to(gains.kurtosis, heads)
    found = [
        with_gains(
            Factors(*factors),
            r,
            c,
            expected_parameters(layer, request).alpha,
            float(kurtosis),
            layer.streams.numpy_generator(f"{circuit}_channels", layer.index, place),
        )
        for *factors, r, c, request, kurtosis, place in zip(*drawn, rows, cols, requests, tails, places, strict=True)
    ]
    left, right = (np.stack(side) for side in zip(*found, strict=True))
    planned = [
        PlannedGains(circuit, request.head, gains.by_channel, float(kurtosis))
        for request, kurtosis in zip(requests, tails, strict=True)
    ]
    return left, right, tuple(planned)


def with_gains(
    drawn: Factors, rows: Array, cols: Array, alpha: float, kurtosis: float, generator: np.random.Generator
) -> Factors:
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
        place = placed(left @ right.T, rows, cols, kurtosis, generator)
        left, right = left[place], right[place]
    return Factors(left * rows[:, None], right * cols[:, None])


def placed(N: Array, rows: Array, cols: Array, kurtosis: float, generator: np.random.Generator) -> NDArray[np.intp]:
    """Return an order p of channels for which diag(rows) N[p][:, p] diag(cols) comes nearest a kurtosis.

    The best of 64 random orders; while it is more than `CLOSE` away, the best of 64 exchanges of two channels, one of
    them among the 32 largest, 24 times at most. Dead channels stay where they are. O(d^2) a candidate.
    """
    squares = N**2
    np.fill_diagonal(squares, 0.0)
    tails = Tails(squares, rows, cols)
    free = np.flatnonzero((rows > 0) & (cols > 0))
    top = free[np.argsort(-(rows**2 + cols**2)[free])[:_TOP]]
    best = np.arange(len(N))
    distance = math.inf
    candidates = np.tile(best, (_CANDIDATES, 1))
    candidates[:, free] = generator.permuted(candidates[:, free], axis=1)
    for _ in range(_ROUNDS):
        away = apart(tails.kurtosis(candidates), kurtosis)
        nearest = int(np.argmin(away))
        if away[nearest] < distance:
            best, distance = candidates[nearest], float(away[nearest])
        if distance <= CLOSE or len(free) < 2:
            break
        candidates = np.tile(best, (_CANDIDATES, 1))
        one, other = generator.choice(top, _CANDIDATES), generator.choice(free, _CANDIDATES)
        each = np.arange(_CANDIDATES)
        candidates[each, one], candidates[each, other] = best[other], best[one]
    return best


def apart(found: Array, wanted: Array | float) -> Array:
    """Return the distance of excess kurtoses: relative where they are well above 0.1, in tenths near zero."""
    return np.abs(np.arcsinh(10 * np.asarray(found)) - np.arcsinh(10 * np.asarray(wanted)))


class Tails:
    """The kurtosis of diag(r) N[p][:, p] diag(c) off the diagonal, for many orders p at once."""

    def __init__(self, squares: Array, rows: Array, cols: Array) -> None:
        self.squares, self.fourth = squares, squares**2
        self.rows, self.cols = rows**2, cols**2

    def kurtosis(self, orders: NDArray[np.intp]) -> Array:
        """Return the excess kurtosis about zero of every order ``[n, channel]``."""
        places = np.argsort(orders, -1)
        r, c = self.rows[places].T, self.cols[places].T
        second = (self.squares @ c * r).sum(0)
        fourth = (self.fourth @ c**2 * r**2).sum(0)
        count = len(self.rows) * (len(self.rows) - 1)
        return np.asarray(fourth * count / second**2 - 3)
