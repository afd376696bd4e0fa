"""A closed form for the covariance of depthwise filters, its mixture with isotropy, and their fit.

Inspired by Trockman, Willmott & Kolter (ICLR 2023, arXiv 2210.03651), whose own formula was not at hand: positions near
each other go together, positions far from the centre matter less, and filters widen with depth.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from attnlens.heads import Array
from attnlens.layouts.depthwise.spec import Kernel

SMALLEST, LARGEST = 1e-3, 10.0
"""Range of ``s / side^2``: below, only the middle of a filter is left; above, all of it is constant."""
ROUNDING = 1e-12
"""Share of ||S||^2 below which nothing lies beyond isotropy but rounding."""
_GRID = 161


def positions(size: int) -> Array:
    """Return the centred positions along one side: -(size - 1) / 2 to (size - 1) / 2."""
    return np.arange(size, dtype=np.float64) - (size - 1) / 2


def side(kernel: Kernel) -> int:
    """Return the longer side of a kernel, the unit that ``s`` is free of when it is divided by its square."""
    return max(kernel)


def closed_form(kernel: Kernel, s: float) -> Array:
    """Return the covariance with trace 1 of filters of width s, ``[position, position]``, rows of the kernel in turn.

    ``Sigma[p, q] ~ exp(-|p - q|^2 / 2s) exp(-|p|^2 / 2s) exp(-|q|^2 / 2s)``, p and q positions from the kernel's
    centre in pixels, s in square pixels. Positive semi-definite for every s > 0: a Gaussian kernel, which is, scaled
    from both sides by the same positive numbers. It is the Kronecker product of the same form along rows and columns.
    """
    rows, columns = _sides(kernel, s)
    return np.asarray(np.kron(rows, columns), dtype=np.float64)


def mixture(kernel: Kernel, s: float, isotropic: float) -> Array:
    """Return ``(1 - w) C(s) + w I / p`` with trace 1, w the isotropic share: C for w = 0, equal variances for w = 1."""
    form = closed_form(kernel, s)
    return (1 - isotropic) * form + isotropic / len(form) * np.eye(len(form))


def _sides(kernel: Kernel, s: float) -> tuple[Array, Array]:
    """Return the two factors of `closed_form`, each with trace 1."""
    rows, columns = (_along(size, s) for size in kernel)
    return rows, columns


def _along(size: int, s: float) -> Array:
    x = positions(size)
    exponent = (x[:, None] - x[None, :]) ** 2 + x[:, None] ** 2 + x[None, :] ** 2
    factor: Array = np.exp((exponent.min() - exponent) / (2 * s))  # the largest entry is 1 however small s is
    return factor / float(np.trace(factor))


class ClosedFormFit(NamedTuple):
    """How well the closed form, mixed with isotropy, describes a covariance S of trace 1.

    ``s`` and ``isotropic``, a share w in [0, 1], minimise ||S - (1 - w) C(s) - w I / p||. ``explained`` is the share of
    ||S - I / p||^2, what lies beyond isotropy, that this takes away: 1 where the mixture is exact, 0 where isotropy
    alone does as well. ``cosine`` is <S, C(s)> / (||S|| ||C(s)||), of the closed form alone.
    """

    s: float
    isotropic: float
    cosine: float
    explained: float

    def relative(self, kernel: Kernel) -> float:
        """Return s in units of the squared side, free of kernel size."""
        return self.s / side(kernel) ** 2


def fit_closed_form(covariance: Array, kernel: Kernel) -> ClosedFormFit:
    """Fit s and the isotropic share to a covariance ``[position, position]`` by least squares.

    Least squares and not likelihood: the closed form is all but singular, and a likelihood would follow the smallest
    eigenvalues, which are sampling noise. For each s the best share is explicit; s is sought on a grid over its whole
    range, then by Brent's method around the best place.
    """
    from scipy.optimize import minimize_scalar

    trace = float(np.trace(covariance))
    assert trace > 0, "a covariance of filters that are all zero has no shape"
    unit = covariance / trace
    blocks = by_sides(unit, kernel)
    logs = _log_grid(kernel)
    on_grid = gains(*inner_products(blocks, kernel), len(unit))
    best = int(np.argmax(on_grid.taken)) if on_grid.taken.max() > 0 else int(np.argmax(on_grid.cosine))

    def at(log_s: float) -> tuple[float, float, Gains]:
        rows, columns = _sides(kernel, math.exp(log_s))
        square = float((rows**2).sum() * (columns**2).sum())
        inner = float(rows.ravel() @ blocks @ columns.ravel())
        return inner, square, gains(np.array(inner), np.array(square), len(unit))

    bounds = (float(logs[max(best - 1, 0)]), float(logs[min(best + 1, len(logs) - 1)]))
    found = minimize_scalar(lambda x: -float(at(x)[2].taken), bounds=bounds, method="bounded", options={"xatol": 1e-7})
    log_s = max((float(logs[best]), float(found.x)), key=lambda x: float(at(x)[2].taken))
    inner, square, gain = at(log_s)
    own = float((unit**2).sum())
    beyond = own - 1 / len(unit)
    explained = float(gain.taken) / beyond if beyond > ROUNDING * own else 0.0
    return ClosedFormFit(math.exp(log_s), 1 - float(gain.share), inner / math.sqrt(own * square), min(explained, 1.0))


class Gains(NamedTuple):
    """What the best mixture takes away of ||S - I / p||^2, the closed form's share in it, and the centred cosine."""

    taken: Array
    share: Array
    cosine: Array


def gains(inner: Array, square: Array, positions: int) -> Gains:
    """Return, for <S, C> and ||C||^2 with traces of 1, the largest 2 a <S', C'> - a^2 ||C'||^2 over a in [0, 1].

    S' = S - I / p and C' = C - I / p; a = 1 - w. Zero where C is isotropic itself, as a narrow one of 2 x 2 filters is.
    """
    inner, square = inner - 1 / positions, square - 1 / positions
    apart = square > ROUNDING
    divisor = np.where(apart, square, 1.0)
    share = np.where(apart, np.clip(inner / divisor, 0, 1), 0.0)
    return Gains(2 * share * inner - share**2 * square, share, np.where(apart, inner / np.sqrt(divisor), 0.0))


def by_sides(covariance: Array, kernel: Kernel) -> Array:
    """Reorder a covariance to ``[(row, row'), (column, column')]``: <S, R x C> is then vec(R)^T this vec(C)."""
    h, w = kernel
    return covariance.reshape(h, w, h, w).transpose(0, 2, 1, 3).reshape(h * h, w * w)


def inner_products(blocks: Array, kernel: Kernel) -> tuple[Array, Array]:
    """Return <S, C(s)> and ||C(s)||^2 on a grid of s, for a covariance of trace 1 reordered `by_sides`."""
    rows, columns, squares = _grid_factors(kernel)
    return ((rows @ blocks) * columns).sum(1), squares


def _log_grid(kernel: Kernel) -> Array:
    return np.linspace(math.log(SMALLEST), math.log(LARGEST), _GRID) + 2 * math.log(side(kernel))


@lru_cache(maxsize=64)
def _grid_factors(kernel: Kernel) -> tuple[Array, Array, Array]:
    pairs = [_sides(kernel, math.exp(log_s)) for log_s in _log_grid(kernel)]
    rows, columns = (np.stack([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    return rows, columns, (rows**2).sum(1) * (columns**2).sum(1)
