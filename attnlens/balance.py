"""Balancing: the one positive gain a row and one a column that make a product's off-diagonal entries equal in scale."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from attnlens.heads import Array

RESIDUAL = 1e-9
"""Largest relative deviation of a row's or column's mean square that balancing stops at."""
PASSES = 200
"""Most passes over rows and columns: a pattern of zeros that no gains balance never gets to `RESIDUAL`."""

_DEPTH = 4  # differences of earlier iterates that an accelerated step is made of
_NEAR = 1.0  # largest step of log(w) from which acceleration is safe
_FARTHEST = 100.0  # that log(w) goes from where it starts: farther go gains that never balance, out of float64
_LEAST = 1e-200  # of a row's sum of squares at a safe scale: what is less is no entry
_LEAST_GAIN = 1e-100  # that of a side and that of the other can be divided out of any entry
_SMALLEST = 1e-300  # of a weighted sum that is divided by
_RIDGE = 1e-10  # of the Gram matrix of unit-norm differences: keeps an accelerated step finite


class Balanceable(Protocol):
    """What balancing asks of a stack of products: `attnlens.circuits.FactoredProduct` says it of its factors."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack, ``[..., rows, cols]``."""

    @property
    def is_square(self) -> bool:
        """Whether there is a diagonal to leave out."""

    @property
    def unit(self) -> tuple[Self, Any]:
        """The products at a scale at which no square is lost."""

    @property
    def T(self) -> Balanceable:
        """The transposed products."""

    def stacked(self) -> Balanceable:
        """Return the products in a stack of one dimension."""

    def head(self, index: NDArray[np.bool_]) -> Balanceable:
        """Return those of a stack that a mask chooses."""

    def offdiagonal_squares(self, weights: Array) -> Array:
        """Return sum_{j != i} M_ij^2 w_j for every row."""


@dataclass(frozen=True)
class Gains:
    """Row gains r and column gains c of a stack of products: M = diag(r) N diag(c), N balanced.

    Every row and every column of N has the same mean square off the diagonal (over all entries where M is not square).
    r and c are positive, with mean square 1 over the rows and columns that are alive. A row or column without an
    off-diagonal entry is dead: it has no gain, holds a 1 here, and stays as it is.
    """

    rows: Array
    """``[..., rows]``"""
    cols: Array
    """``[..., cols]``"""
    alive_rows: NDArray[np.bool_]
    """``[..., rows]``"""
    alive_cols: NDArray[np.bool_]
    """``[..., cols]``"""
    residual: Array
    """``[...]``, largest |mean square of a row or column / that of all - 1|: above `RESIDUAL` M is not balanced"""

    def head(self, index: int | tuple[int, ...] | NDArray[np.bool_]) -> Gains:
        """Return those of one product of a stack, or of those a mask chooses."""
        return Gains(*(getattr(self, each.name)[index] for each in fields(self)))


def balance(product: Balanceable) -> Gains:
    """Find the gains of every product of a stack, from its factors alone.

    With u = r^-2, w = c^-2 and n_i, m_j the numbers of entries that count, alternate
    u_i = n_i / sum_{j != i} M_ij^2 w_j and w_j = m_j / sum_{i != j} u_i M_ij^2 until no w_j moves by more than
    `RESIDUAL` of itself. O(d k^2) a pass by `FactoredProduct.offdiagonal_squares`, for the whole stack at once; a
    product leaves when it is done. The steps in log(w) are accelerated (Anderson's mixing).
    Source: Sinkhorn & Knopp, Concerning nonnegative matrices and doubly stochastic matrices, Pacific J. Math. 21, 1967.
    """
    stack = product.unit[0].stacked()
    sides = stack, stack.T
    sums = stack.offdiagonal_squares(np.ones((stack.shape[0], stack.shape[-1])))
    alive_rows = sums > _LEAST
    sums = sides[1].offdiagonal_squares(_ratio(alive_rows, sums))
    alive_cols = sums > _LEAST
    row_entries, col_entries = (
        mine * (others.sum(-1, keepdims=True, dtype=np.float64) - (others if product.is_square else 0.0))
        for mine, others in ((alive_rows, alive_cols), (alive_cols, alive_rows))
    )
    u, w, residual = _alternate(sides, row_entries, col_entries, np.log(_ratio(col_entries, sums, empty=1.0)))
    alive_rows, alive_cols = alive_rows & (u > 0), alive_cols & (w > 0)  # the others' gains ran away
    *lead, rows, cols = product.shape
    return Gains(
        rows=_gains(u, alive_rows).reshape(*lead, rows),
        cols=_gains(w, alive_cols).reshape(*lead, cols),
        alive_rows=alive_rows.reshape(*lead, rows),
        alive_cols=alive_cols.reshape(*lead, cols),
        residual=residual.reshape(lead),
    )


def _alternate(
    sides: tuple[Balanceable, Balanceable], row_entries: Array, col_entries: Array, point: Array
) -> tuple[Array, Array, Array]:
    """Return u ``[n, rows]``, w ``[n, cols]`` and the residual ``[n]`` of n products, from log(w) = ``point`` on."""
    u, w, residual = np.zeros_like(row_entries), np.zeros_like(col_entries), np.zeros(len(row_entries))
    active = np.arange(len(residual))
    history: list[tuple[Array, Array]] = []
    start = point
    for _ in range(PASSES):
        near = np.clip(point, start - _FARTHEST, start + _FARTHEST)
        now = np.where(col_entries[active] > 0, np.exp(near), 0.0)
        u[active] = rows = _ratio(row_entries[active], sides[0].offdiagonal_squares(now))
        w[active] = cols = _ratio(col_entries[active], sides[1].offdiagonal_squares(rows))
        step = np.log(_ratio(cols, now, empty=1.0))
        size = np.abs(step).max(-1)
        residual[active] = size
        going = size > RESIDUAL
        if not going.any():
            break
        if not going.all():
            active, point, step, size = active[going], point[going], step[going], size[going]
            start = start[going]
            sides = sides[0].head(going), sides[1].head(going)
            history = [(before[going], moved[going]) for before, moved in history]
        history = [*history[-_DEPTH:], (point, step)]
        point = np.where((size < _NEAR)[:, None], _accelerated(history), point + step)
    return u, w, residual


def _accelerated(history: list[tuple[Array, Array]]) -> Array:
    """Return the point that the last iterates extrapolate to, by Anderson's mixing.

    With steps f and points x it is x + f - (dX + dF) g, g minimising |f - dF g|, d the differences between iterates.
    Source: Walker & Ni, Anderson acceleration for fixed-point iterations, SIAM J. Numer. Anal. 49, 2011.
    """
    points, steps = (np.stack(each, -1) for each in zip(*history, strict=True))
    plain = points[..., -1] + steps[..., -1]
    if len(history) == 1:
        return plain
    moved, changed = np.diff(points), np.diff(steps)
    scale = np.sqrt((changed**2).sum(-2, keepdims=True))
    scale[scale == 0] = 1.0
    unit = changed / scale
    gram = np.swapaxes(unit, -1, -2) @ unit + _RIDGE * np.eye(unit.shape[-1])
    share = np.linalg.solve(gram, np.swapaxes(unit, -1, -2) @ steps[..., -1:])
    return plain - (((moved + changed) / scale) @ share)[..., 0]


def _ratio(above: Array | NDArray[np.bool_], below: Array, empty: float = 0.0) -> Array:
    return np.divide(above, below, out=np.full(below.shape, empty), where=(above > 0) & (below > _SMALLEST))


def _gains(weights: Array, alive: NDArray[np.bool_]) -> Array:
    """Return weights^-1/2 at mean square 1 over what is alive, 1 elsewhere."""
    gains = _ratio(alive, np.sqrt(weights))
    count = np.maximum(alive.sum(-1, keepdims=True), 1)
    unit = gains / np.sqrt(np.maximum((gains**2).sum(-1, keepdims=True), 1e-300) / count)
    return np.where(alive, np.maximum(unit, _LEAST_GAIN), 1.0)
