"""What is said of one layer's filters: the shape of their covariance, the closed form's fit, and what chance gives."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np

from attnlens.filters.closed_form import (
    PARTS,
    ROUNDING,
    ClosedFormFit,
    Shape,
    closed_form,
    explained,
    fit_closed_form,
    free_axes,
    grid,
    side,
    width_bound,
)
from attnlens.filters.covariance import second_moment
from attnlens.heads import Array
from attnlens.layouts.depthwise.spec import FilterSpec, Kernel
from attnlens.statistics.table import Row, Value

DRAWS = 199
"""Sets of random directions the null is made of: the smallest p-value is 1 / 200."""
LEVEL = 0.005
EXPLAINED = 0.5
"""Share beyond isotropy, and of the covariances, the closed form has to explain to be named as the description."""


@dataclass(frozen=True)
class FilterFit:
    """Statistics of one layer's filters F, ``[n, p]``, through S = F^T F / n: a mean of zero is assumed.

    ``rms`` is the root mean square of a weight. ``mean_share`` is ||mean filter||^2 / tr(S): what assuming a mean of
    zero puts into S. ``top_share`` is the largest eigenvalue / tr(S), ``effective_rank`` tr(S)^2 / tr(S^2), between 1
    and p. ``s``, ``relative_s`` = s / side^2, the shares of the closed form's parts and its centre: see `Shape`;
    ``s_bound`` names the end of its range that s lies at, where no width was found. ``explained`` and its two kin: see
    `ClosedFormFit`. ``noise_share`` is what sampling n normal filters adds to ||S - tr(S) I / p||^2, as a share of it:
    no covariance can explain much more than the rest.

    A name with ``_null`` is the mean over `DRAWS` sets of filters with the same norms and random directions.
    ``p_value`` is that of the effective rank, small where it is lower than chance makes it. ``verdict``: ``isotropic``
    where any draw of the null has a rank as low (the level is 1/200 a layer); else ``closed form`` where at least half
    of what lies beyond isotropy is explained, and half of the covariances; else ``structured``; ``zeros`` where there
    is nothing to measure.
    """

    rms: float
    mean_share: float
    mean_share_null: float
    top_share: float
    effective_rank: float
    effective_rank_null: float
    p_value: float
    s: float
    relative_s: float
    s_bound: str
    blur_share: float
    slope_share: float
    contrast_share: float
    isotropic_share: float
    centre_row: float
    centre_column: float
    explained: float
    explained_null: float
    explained_variances: float
    explained_covariances: float
    explained_covariances_null: float
    noise_share: float
    verdict: str

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the statistics in order."""
        return tuple(field.name for field in fields(cls))


COLUMNS = ("layer", "name", "filters", "channels", "height", "width", *FilterFit.names(), "leaves_out")


def fit_filters(filters: Array, stride: tuple[int, int] = (1, 1), seed: int = 0) -> tuple[FilterFit, Array]:
    """Measure one layer's filters ``[filter, height, width]``: the statistics, and S's eigenvalues, descending."""
    count, height, width = filters.shape
    size, largest = height * width, float(np.abs(filters).max())
    if largest == 0:
        numbers = dict.fromkeys(FilterFit.names(), math.nan)
        return FilterFit(**{**numbers, "rms": 0.0, "s_bound": "", "verdict": "zeros"}), np.zeros(size)  # type: ignore[arg-type]
    filters = filters / largest  # squares of very small weights would be zero
    covariance = second_moment(filters)
    trace = float(np.trace(covariance))
    values: Array = np.linalg.eigvalsh(covariance)[::-1].astype(np.float64)
    square = float((covariance**2).sum())
    fit = fit_closed_form(covariance, (height, width), stride)
    null = isotropic_null(np.linalg.norm(filters.reshape(count, -1), axis=1), (height, width), stride, seed)
    rank = trace**2 / square
    p_value = (1 + int((null.effective_rank <= rank).sum())) / (1 + DRAWS)
    beyond = square - trace**2 / size
    found = FilterFit(
        rms=largest * math.sqrt(trace / size),
        mean_share=_mean_share(filters.reshape(count, -1)),
        mean_share_null=float(null.mean_share.mean()),
        top_share=float(values[0] / trace),
        effective_rank=rank,
        effective_rank_null=float(null.effective_rank.mean()),
        p_value=p_value,
        **measured_shape(fit, (height, width)),
        explained_null=float(null.explained.mean()),
        explained_covariances_null=float(null.explained_covariances.mean()),
        noise_share=min(1.0, (trace**2 + square) / count / beyond) if beyond > ROUNDING * square else 1.0,
        verdict=described(fit) if p_value <= LEVEL else "isotropic",
    )
    return found, values * largest**2


def described(fit: ClosedFormFit) -> Literal["closed form", "structured"]:
    """Say whether the closed form describes a covariance: what is beyond isotropy, and the covariances by themselves.

    Most of what lies beyond isotropy is how variance falls off from the centre. Covariances are what filters share.
    """
    both = min(fit.explained, fit.explained_covariances)
    return "closed form" if both >= EXPLAINED else "structured"


def measured_shape(fit: ClosedFormFit, kernel: Kernel) -> dict[str, Any]:
    """Return what was fitted under the names that tables and parameter files have for it."""
    shape = fit.shape
    return {
        "s": shape.s,
        "relative_s": shape.s / side(kernel) ** 2,
        "s_bound": width_bound(shape.s, kernel),
        **{f"{part}_share": float(share) for part, share in zip(PARTS, shape.shares, strict=True)},
        "isotropic_share": shape.isotropic,
        "centre_row": shape.centre[0],
        "centre_column": shape.centre[1],
        "explained": fit.explained,
        "explained_variances": fit.explained_variances,
        "explained_covariances": fit.explained_covariances,
    }


@dataclass(frozen=True)
class Null:
    """Statistics of every draw of the null."""

    mean_share: Array
    effective_rank: Array
    explained: Array
    explained_covariances: Array


def isotropic_null(norms: Array, kernel: Kernel, stride: tuple[int, int], seed: int) -> Null:
    """Draw sets of filters of the given norms in random directions, and fit each; s and the centre on the grid alone.

    Given their norms, normal filters with equal variances and no correlation have just these directions.
    """
    rng = np.random.default_rng(seed)
    size, lengths = kernel[0] * kernel[1], norms.astype(np.float32)[:, None]
    places = grid(kernel, free_axes(stride))
    found = np.empty((4, DRAWS))
    for draw in range(DRAWS):
        directions = rng.standard_normal((len(norms), size), dtype=np.float32)
        flat = directions * (lengths / np.linalg.norm(directions, axis=1, keepdims=True))
        unit = (flat.T @ flat).astype(np.float64)
        unit /= np.trace(unit)
        taken, shares = places.best_shares(unit)
        best = int(np.argmax(taken))
        width, centre = places.places[best]
        form = closed_form(kernel, Shape.of(width, shares[best], centre))
        whole, _, covariances = explained(unit, form)
        found[:, draw] = _mean_share(flat), 1 / float((unit**2).sum()), whole, covariances
    return Null(*found)


def filter_row(layer: int, spec: FilterSpec, fit: FilterFit) -> Row:
    """Return a layer's row of the table, under `COLUMNS`."""
    statistics: list[Value] = [getattr(fit, name) for name in FilterFit.names()]
    return (layer, spec.path, spec.filters, spec.channels, *spec.kernel, *statistics, spec.label)


def _mean_share(flat: Array) -> float:
    return float((flat.mean(0) ** 2).sum() / (flat**2).sum(1).mean())
