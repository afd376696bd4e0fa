"""How statistics change with depth: relative depth, profiles, and a polynomial trend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from attnlens.circuits import Kind
from attnlens.heads import Array

_TREND_DEGREE = 2
GRID = np.linspace(0.0, 1.0, 101)
"""Relative depths at which profiles of different models are held against each other."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Trend(_Part):
    """A polynomial in relative depth t: value(t) = sum_i coefficients[i] * t^i, with the spread around it."""

    coefficients: list[float] = Field(min_length=1)
    residual_sd: float = Field(ge=0)

    def __call__(self, depth: float) -> float:
        """Evaluate at a relative depth in [0, 1]."""
        return float(np.polynomial.polynomial.polyval(depth, self.coefficients))

    @classmethod
    def fit(cls, depths: Sequence[float], values: Array) -> Trend:
        """Fit by least squares, of a degree the number of distinct depths allows, the second at most."""
        degree = min(_TREND_DEGREE, len(set(depths)) - 1)
        coefficients = np.polynomial.polynomial.polyfit(depths, values, degree)
        residual = values - np.polynomial.polynomial.polyval(np.asarray(depths), coefficients)
        return cls(coefficients=coefficients.tolist(), residual_sd=float(residual.std()))


def relative_depth(layer: int, depth: int) -> float:
    """Return t = layer / (depth - 1), 1/2 for a network of one layer."""
    return layer / (depth - 1) if depth > 1 else 0.5


@dataclass(frozen=True)
class Profile:
    """One statistic of one circuit by relative depth, of one model.

    ``depth`` is t = layer / (depth - 1) in [0, 1]; ``identity_share`` is the identity cosine divided by the largest one
    a product of that rank can have, sqrt(k/d): between -1 and 1 whatever width and rank are.
    """

    model: str
    circuit: Kind
    statistic: str
    depth: Array
    values: Array

    def at(self, depth: Array) -> Array:
        """Interpolate linearly at relative depths."""
        return np.interp(depth, self.depth, self.values)


def rms_over_depth(values: Array) -> float:
    """Return the root mean square over [0, 1] of values on `GRID`, by the trapezoid rule."""
    return float(np.sqrt(np.trapezoid(values**2, GRID)))
