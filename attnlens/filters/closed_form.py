"""A closed form for the covariance of depthwise filters, and its fit.

Filters are what Gaussian smoothing, its first derivatives, a centre against its surround and noise make together.
Inspired by Trockman, Willmott & Kolter (ICLR 2023, arXiv 2210.03651), whose own formula was not at hand; chosen by
what it explains of held-out halves of trained filters.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations, product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnlens.heads import Array
from attnlens.layouts.depthwise.spec import Kernel

NARROWEST = 0.3
"""Smallest squared width in square pixels: below, smoothing is the middle pixel alone, and no width is left to tell."""
WIDEST = 1.0
"""Largest ``s / side^2``: above, the window is flat over the kernel, and no width is left to tell."""
CENTRE = 0.25
"""Squared width in square pixels of the centre that is held against its surround: one pixel, and a little of four."""
OFF_CENTRE = 1.0
"""How far, in pixels, the centre may lie from the kernel's along an axis of stride above 1."""
ROUNDING = 1e-12
"""Share of ||S||^2 below which nothing lies beyond isotropy but rounding."""
PARTS = ("blur", "slope", "contrast")
Bound = Literal["", "lower", "upper"]
"""End of its range that a width lies at; "" where it lies inside."""
_WIDTHS, _CENTRES = 49, 9
_AT_BOUND = 1e-3


class Shape(NamedTuple):
    """What the closed form is given: a width, the shares of its parts in the trace, and where its centre lies.

    ``s`` is the squared width in square pixels; ``centre`` is (row, column) in pixels from the kernel's centre. What
    ``blur``, ``slope`` and ``contrast`` leave of the trace is isotropic.
    """

    s: float
    blur: float
    slope: float
    contrast: float
    centre: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def of(cls, s: float, shares: Array, centre: tuple[float, float] = (0.0, 0.0)) -> Shape:
        """Take the shares of `PARTS` from an array."""
        blur, slope, contrast = (float(share) for share in shares)
        return cls(s, blur, slope, contrast, centre)

    @property
    def shares(self) -> Array:
        """Shares of `PARTS` in the trace."""
        return np.array([self.blur, self.slope, self.contrast])

    @property
    def isotropic(self) -> float:
        """Share of the trace that is equal variances without correlation."""
        return max(0.0, 1 - self.blur - self.slope - self.contrast)


def positions(size: int) -> Array:
    """Return the centred positions along one side: -(size - 1) / 2 to (size - 1) / 2."""
    return np.arange(size, dtype=np.float64) - (size - 1) / 2


def side(kernel: Kernel) -> int:
    """Return the longer side of a kernel, the unit that ``s`` is free of when it is divided by its square."""
    return max(kernel)


def width_range(kernel: Kernel) -> tuple[float, float]:
    """Return the smallest and the largest s of a kernel, in square pixels: where a width can be told."""
    return NARROWEST, max(WIDEST * side(kernel) ** 2, NARROWEST)


def within_range(s: float, kernel: Kernel) -> float:
    """Return s, or the end of `width_range` that lies nearest."""
    low, high = width_range(kernel)
    return min(max(s, low), high)


def width_bound(s: float, kernel: Kernel) -> Bound:
    """Say whether a fitted width lies at an end of its range, which is then no width: "lower", "upper" or ""."""
    low, high = width_range(kernel)
    return "lower" if s <= low * (1 + _AT_BOUND) else "upper" if s >= high * (1 - _AT_BOUND) else ""


def closed_form(kernel: Kernel, shape: Shape) -> Array:
    """Return the covariance with trace 1 of a shape, ``[position, position]``, rows of the kernel in turn.

    ``Sigma = b g g^T / |g|^2 + e (g_y g_y^T + g_x g_x^T) / (|g_y|^2 + |g_x|^2) + c v v^T / |v|^2 + w I / p`` with b,
    e, c the shares of blur, slope and contrast and w the rest; at a position (y, x) from the centre ``g = exp(-(y^2 +
    x^2) / 2s)``, ``g_y = y g``, ``g_x = x g``, ``v = n / sum(n) - g / sum(g)``, n being g at s = 1/4. Positive
    semi-definite for all shares that are not negative: a sum of outer products. A part that a kernel cannot hold (the
    contrast of 2 x 2 filters) leaves its share to isotropy.
    """
    vectors = _vectors(kernel, shape.s, shape.centre)
    scaled = vectors * np.sqrt(shape.shares)[_PART_OF][:, None]
    found: Array = scaled.T @ scaled
    return found + (1 - np.trace(found)) / len(found) * np.eye(len(found))


_PART_OF = np.array([0, 1, 1, 2])
"""The part that each of the four vectors belongs to."""


def _vectors(kernel: Kernel, s: float, centre: tuple[float, float]) -> Array:
    """Return ``[4, position]`` vectors u, part by part: the part's covariance with trace 1 is the sum of u u^T."""
    y = (positions(kernel[0]) - centre[0])[:, None]
    x = (positions(kernel[1]) - centre[1])[None, :]
    squares = y**2 + x**2
    window, middle = (np.exp((squares.min() - squares) / (2 * width)) for width in (s, CENTRE))
    contrast = middle / middle.sum() - window / window.sum()
    found = np.stack([window, y * window, x * window, contrast]).reshape(4, -1)
    norms = np.bincount(_PART_OF, (found**2).sum(1))
    norms[norms < ROUNDING * np.array([1, 1, 1 / squares.size])] = np.inf  # a part the kernel cannot hold
    return np.asarray(found / np.sqrt(norms)[_PART_OF][:, None], dtype=np.float64)


class ClosedFormFit(NamedTuple):
    """How well the closed form describes a covariance S of trace 1: the shape that minimises ||S - Sigma||.

    ``explained`` is the share of ||S - I / p||^2, what lies beyond isotropy, that the shape takes away: 1 where it is
    exact, 0 where isotropy does as well. ``explained_variances`` is that share of the diagonal alone, and
    ``explained_covariances`` that of the off-diagonal entries; these two can be negative, as the fit is one of both.
    """

    shape: Shape
    explained: float
    explained_variances: float
    explained_covariances: float


def fit_closed_form(covariance: Array, kernel: Kernel, stride: tuple[int, int] = (1, 1)) -> ClosedFormFit:
    """Fit the closed form to a covariance ``[position, position]`` by least squares.

    Least squares and not likelihood: a likelihood would follow the smallest eigenvalues, which are sampling noise. For
    each width the best shares are those of a quadratic programme of three variables, solved exactly; s is sought on a
    grid over `width_range`, then around the best place. Along axes of stride above 1 the middle of what a filter sees
    need not be the kernel's: there one more number is free, how far the centre is off, the same along both.
    """
    from scipy.optimize import minimize

    trace = float(np.trace(covariance))
    assert trace > 0, "a covariance of filters that are all zero has no shape"
    unit = covariance / trace
    free = free_axes(stride)
    on_grid = grid(kernel, free)
    best = int(np.argmax(on_grid.best_shares(unit)[0]))

    def at(place: Array) -> Candidates:
        return Candidates.of(kernel, [(math.exp(place[0]), _centre(free, place[-1]))])

    start = np.array([math.log(on_grid.places[best][0]), sum(on_grid.places[best][1]) / max(1, sum(free))])
    number = 2 if any(free) else 1
    bounds = [tuple(np.log(width_range(kernel))), (-OFF_CENTRE, OFF_CENTRE)][:number]
    found = minimize(
        lambda place: -float(at(place).best_shares(unit)[0][0]),
        start[:number],
        method="Nelder-Mead",
        bounds=bounds,
        options={"xatol": 1e-6, "fatol": 1e-13, "initial_simplex": _simplex(start[:number], bounds)},
    )
    chosen = at(found.x)
    taken, shares = chosen.best_shares(unit)
    width, centre = chosen.places[0]
    shape = Shape.of(width, shares[0], centre)
    return ClosedFormFit(shape, *explained(unit, closed_form(kernel, shape), float(taken[0])))


def explained(unit: Array, form: Array, taken: float | None = None) -> tuple[float, float, float]:
    """Return the shares beyond isotropy that a covariance of trace 1 explains of another: all, variances, covariances.

    ``taken`` is what the form takes away of ||S - I / p||^2 where it is known already.
    """
    own = float((unit**2).sum())
    diagonal, off = np.diag(unit), unit - np.diag(np.diag(unit))
    beyond = own - 1 / len(unit), float(((diagonal - 1 / len(unit)) ** 2).sum()), float((off**2).sum())
    missed = (
        float(((unit - form) ** 2).sum()) if taken is None else beyond[0] - taken,
        float(((diagonal - np.diag(form)) ** 2).sum()),
        float(((off - form + np.diag(np.diag(form))) ** 2).sum()),
    )
    whole, variances, covariances = (
        1 - rest / share if share > ROUNDING * own else 0.0 for rest, share in zip(missed, beyond, strict=True)
    )
    return whole, variances, covariances


def free_axes(stride: tuple[int, int]) -> tuple[bool, bool]:
    """Say along which axes the centre is free."""
    return stride[0] > 1, stride[1] > 1


def grid(kernel: Kernel, free: tuple[bool, bool]) -> Candidates:
    """Return the widths and centres that are tried first."""
    return _grid(kernel, free)


@lru_cache(maxsize=64)
def _grid(kernel: Kernel, free: tuple[bool, bool]) -> Candidates:
    low, high = width_range(kernel)
    offsets = np.linspace(-OFF_CENTRE, OFF_CENTRE, _CENTRES) if any(free) else (0.0,)
    widths = np.geomspace(low, high, _WIDTHS)
    return Candidates.of(kernel, [(float(s), _centre(free, float(off))) for off, s in product(offsets, widths)])


class Candidates(NamedTuple):
    """Widths and centres, each with what the best shares of its parts follow from.

    ``vectors`` is ``[place, 4, position]``; ``gram``, ``[place, part, part]``, holds <C - I/p, C' - I/p> of two parts;
    ``maps`` and ``offsets``, ``[place, candidate, part, part]`` and ``[place, candidate, part]``, give the stationary
    shares ``maps b + offsets`` of every set of parts, with the isotropic share free or zero, b = <S - I/p, C - I/p>.
    """

    places: list[tuple[float, tuple[float, float]]]
    vectors: Array
    gram: Array
    maps: Array
    offsets: Array

    @classmethod
    def of(cls, kernel: Kernel, places: list[tuple[float, tuple[float, float]]]) -> Candidates:
        """Prepare widths in square pixels, with centres."""
        vectors = np.stack([_vectors(kernel, s, centre) for s, centre in places])
        squares = (vectors @ vectors.transpose(0, 2, 1)) ** 2
        gram = _by_part(_by_part(squares, 1), 2)
        held = np.einsum("npii->npi", gram[:, None])[:, 0] > 0.5 / vectors.shape[-1]
        gram = gram - 1 / vectors.shape[-1] * held[:, :, None] * held[:, None, :]
        return cls(places, vectors, gram, *_stationary(gram, held))

    def best_shares(self, unit: Array) -> tuple[Array, Array]:
        """Return for every place the most of ||S - I/p||^2 that shares take away, ``[place]``, and the shares.

        Shares are not negative and come to 1 at most. The best ones are stationary on the set of those above zero, so
        that they are among the candidates; of the candidates within range the best one is taken.
        """
        flat = self.vectors.reshape(-1, len(unit))
        inner = _by_part(((flat @ unit) * flat).sum(1).reshape(len(self.places), 4), 1)
        inner = inner - (inner > 0) / len(unit)
        shares = np.einsum("nkij,nj->nki", self.maps, inner) + self.offsets
        inside = (shares >= -_SLACK).all(2) & (shares.sum(2) <= 1 + _SLACK)
        shares = np.clip(shares, 0, 1)
        taken = 2 * np.einsum("nki,ni->nk", shares, inner) - np.einsum("nki,nij,nkj->nk", shares, self.gram, shares)
        taken = np.where(inside, taken, -np.inf)
        best = taken.argmax(1)[:, None]
        return np.take_along_axis(taken, best, 1)[:, 0], np.take_along_axis(shares, best[:, :, None], 1)[:, 0]


_SLACK = 1e-9


def _stationary(gram: Array, held: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return the affine maps from b to the shares at which 2 a b - a G a is stationary, for every set of parts.

    With the isotropic share free ``a = G^-1 b``; with none ``a = G^-1 (b - l 1)``, l such that a comes to 1.
    """
    places = len(gram)
    maps, offsets = [np.zeros((places, 3, 3))], [np.zeros((places, 3))]
    for chosen in (list(parts) for number in (1, 2, 3) for parts in combinations(range(3), number)):
        usable = held[:, chosen].all(1)
        inverse = np.zeros((places, len(chosen), len(chosen)))
        inverse[usable] = np.linalg.pinv(gram[usable][:, chosen][:, :, chosen], hermitian=True)
        sums, total = inverse.sum(2), inverse.sum((1, 2))
        share = np.divide(sums, total[:, None], out=np.zeros_like(sums), where=total[:, None] > 0)
        for matrix, offset in ((inverse, np.zeros_like(share)), (inverse - share[:, :, None] * sums[:, None], share)):
            whole, constant = np.zeros((places, 3, 3)), np.zeros((places, 3))
            whole[:, np.array(chosen)[:, None], chosen] = matrix
            constant[:, chosen] = offset
            maps.append(whole)
            offsets.append(constant)
    return np.stack(maps, 1), np.stack(offsets, 1)


def _by_part(values: Array, axis: int) -> Array:
    """Add up what belongs to one part along an axis of the four vectors."""
    return np.asarray(np.add.reduceat(values, [0, 1, 3], axis=axis), dtype=np.float64)


def _centre(free: tuple[bool, bool], off: float) -> tuple[float, float]:
    return (off if free[0] else 0.0, off if free[1] else 0.0)


def _simplex(start: Array, bounds: list[tuple[float, float]]) -> Array:
    """Return a first simplex one step of the grid wide, within bounds."""
    steps = [(high - low) / (number - 1) for (low, high), number in zip(bounds, (_WIDTHS, _CENTRES), strict=False)]
    found = np.tile(start, (len(start) + 1, 1))
    for place, (step, (_, high)) in enumerate(zip(steps, bounds, strict=True)):
        found[place + 1, place] += step if start[place] + step <= high else -step
    return found
