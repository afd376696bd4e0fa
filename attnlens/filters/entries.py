"""What a parameter file holds of a layer of depthwise filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from attnlens.errors import ParamsError
from attnlens.filters.closed_form import LARGEST, SMALLEST
from attnlens.filters.transfer import alike, interpolated, resampled
from attnlens.heads import Array
from attnlens.layouts.depthwise.spec import Kernel
from attnlens.statistics.depth import Trend, _Part

if TYPE_CHECKING:
    pass

Estimator = Literal["ledoit-wolf", "oas", "none"]
_ROUNDING = 1e-6
"""Largest negative eigenvalue of a stored covariance of trace 1 that counts as rounding."""

_Share = Annotated[float, Field(ge=0, le=1 + 1e-9)]


class FilterEntry(BaseModel):
    """The covariance of one layer's filters, with trace 1 and after shrinkage, and the closed form fitted to it."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    source: int = Field(ge=0)
    layer: int = Field(ge=0, description="counted over layers of filters")
    name: str
    depth: float = Field(ge=0, le=1, description="layer / (number of layers of filters - 1)")
    kernel: Annotated[tuple[int, int], Field(description="height and width")]
    filters: int = Field(ge=1, description="number of filters the covariance is of")
    rms: float = Field(gt=0, description="root mean square of a weight: the scale, which is not carried over")
    estimator: Estimator
    shrinkage: _Share = Field(description="share of the estimate that is I tr(S) / p")
    covariance: list[float] = Field(description="rows of the lower triangle, position by position along kernel rows")
    s: float = Field(gt=0, description="of the closed form, in square pixels; fitted before shrinkage")
    relative_s: float = Field(gt=0, description="s / (longer side)^2")
    isotropic_share: _Share
    cosine: float
    explained: _Share
    explained_null: float
    effective_rank: float = Field(ge=1 - 1e-9)
    p_value: _Share
    verdict: Literal["closed form", "structured", "isotropic"]

    @model_validator(mode="after")
    def _is_a_covariance(self) -> FilterEntry:
        size = self.kernel[0] * self.kernel[1]
        if min(self.kernel) < 1 or len(self.covariance) != size * (size + 1) // 2:
            raise ValueError(
                f"covariance of {self.kernel[0]} x {self.kernel[1]} filters has {len(self.covariance)} numbers, "
                f"not {size * (size + 1) // 2}"
            )
        matrix = self.matrix()
        if abs(np.trace(matrix) - 1) > _ROUNDING or np.linalg.eigvalsh(matrix)[0] < -_ROUNDING:
            raise ValueError("covariance is not positive semi-definite with trace 1")
        return self

    def matrix(self) -> Array:
        """Return the covariance ``[position, position]``."""
        size = self.kernel[0] * self.kernel[1]
        found = np.zeros((size, size))
        found[np.tril_indices(size)] = self.covariance
        return found + np.tril(found, -1).T


def triangle(covariance: Array) -> list[float]:
    """Return the lower triangle of a covariance scaled to trace 1, to eight significant digits."""
    unit = covariance / np.trace(covariance)
    return [float(f"{value:.8g}") for value in unit[np.tril_indices(len(unit))]]


def carried_over(entries: Sequence[FilterEntry], depth: float, kernel: Kernel) -> Array | None:
    """Return the covariance, with trace 1, that the entries give a layer at a relative depth; None where none can.

    Of each source the layers whose filters extend along the same axes, resampled to the kernel (`resampled`) and
    interpolated in relative depth (`interpolated`); then the mean over sources. The number of filters does not matter.
    """
    found = []
    for source in sorted({entry.source for entry in entries}):
        own = sorted(
            (e for e in entries if e.source == source and alike(e.kernel, kernel)), key=lambda entry: entry.depth
        )
        if own:
            matrices = [resampled(entry.matrix(), entry.kernel, kernel) for entry in own]
            found.append(interpolated([entry.depth for entry in own], matrices, depth))
    return np.mean(found, axis=0) if found else None


class FilterTrend(_Part):
    """How the closed form of depthwise filters goes with relative depth, over the layers of all sources."""

    log_relative_s: Trend
    isotropic_share: Trend
    n: int = Field(ge=1, description="layers the width's trend is of")

    def at(self, depth: float) -> tuple[float, float]:
        """Return s / side^2 and the isotropic share at a relative depth, each within its range."""
        log_s, share = self.log_relative_s(depth), self.isotropic_share(depth)
        if math.isnan(log_s) or math.isnan(share):
            raise ParamsError(f"the trend of filters is no number at depth {depth:g}: fit again")
        return math.exp(min(max(log_s, math.log(SMALLEST)), math.log(LARGEST))), min(max(share, 0.0), 1.0)
