"""Roots of functions of one variable, many at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from attnlens.heads import Array

_TOLERANCE = 1e-15
_STEPS = 100


def bracketed_roots(function: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Return a root of every component of ``function`` between ``low`` and ``high``, to 1e-15 or to rounding.

    ``function`` maps ``[n]`` to ``[n]``, component by component, and has another sign at ``high`` than at ``low``, or
    a zero there. Inverse quadratic interpolation where three points promise that it converges, bisection elsewhere.
    Source: Chandrupatla, A new hybrid quadratic/bisection algorithm, Advances in Engineering Software 28, 1997.
    """
    a, b = low.astype(np.float64), high.astype(np.float64)
    at_a, at_b = function(a), function(b)
    best = np.where(at_a == 0, a, b)
    done = (at_a == 0) | (at_b == 0)
    c, at_c, share = a, at_a, np.full_like(a, 0.5)
    for _ in range(_STEPS):
        x = np.where(done, best, a + share * (b - a))
        at_x = function(x)
        stays = np.sign(at_x) == np.sign(at_a)  # the root is between x and b
        c, at_c = np.where(stays, a, b), np.where(stays, at_a, at_b)
        b, at_b = np.where(stays, b, a), np.where(stays, at_b, at_a)
        a, at_a = x, at_x
        nearest = np.where(np.abs(at_a) < np.abs(at_b), a, b)
        best = np.where(done, best, nearest)
        with np.errstate(divide="ignore", invalid="ignore"):
            least = (2 * np.finfo(np.float64).eps * np.abs(nearest) + _TOLERANCE) / np.abs(b - a)
            done |= (least > 0.5) | (at_a == 0) | (at_b == 0) | (a == b)
            if done.all():
                break
            place, height = (a - b) / (c - b), (at_a - at_b) / (at_c - at_b)
            smooth = (height**2 < place) & ((1 - height) ** 2 < 1 - place)
            curved = at_a / (at_b - at_a) * at_c / (at_b - at_c)
            curved += (c - a) / (b - a) * at_a / (at_c - at_a) * at_b / (at_c - at_b)
            least = np.minimum(least, 0.5)
            share = np.clip(np.where(smooth, curved, 0.5), least, 1 - least)
    return best
