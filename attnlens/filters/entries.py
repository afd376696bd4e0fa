"""What a parameter file holds of a layer of depthwise filters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from attnlens.filters.closed_form import ROUNDING, Bound, Shape, fit_closed_form
from attnlens.filters.statistics import described, measured_shape
from attnlens.filters.trained import Relative
from attnlens.filters.transfer import alike, interpolated, resampled
from attnlens.heads import Array
from attnlens.layouts.depthwise.spec import Kernel

Estimator = Literal["ledoit-wolf", "oas", "none"]
Verdict = Literal["closed form", "structured", "isotropic"]
_ROUNDING = 1e-6
"""Largest negative eigenvalue of a stored covariance of trace 1 that counts as rounding."""

_Share = Annotated[float, Field(ge=0, le=1 + 1e-9)]
_Explained = Annotated[float, Field(le=1 + 1e-9)]


class _Measured(BaseModel):
    """The covariance of one layer's filters, with trace 1 and after shrinkage, and what it was measured in."""

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
    effective_rank: float = Field(ge=1 - 1e-9)
    p_value: _Share
    verdict: Verdict

    @model_validator(mode="after")
    def _is_a_covariance(self) -> Self:
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


class FilterEntry(_Measured):
    """A layer's covariance, and the closed form fitted to it before shrinkage."""

    stride: Annotated[tuple[int, int], Field(description="along height and width; 1, 1 where a file does not say")]
    s: float = Field(gt=0, description="squared width of the closed form, in square pixels")
    relative_s: float = Field(gt=0, description="s / (longer side)^2")
    s_bound: Bound = Field(description="end of its range that s lies at: no width was found")
    blur_share: _Share
    slope_share: _Share
    contrast_share: _Share
    isotropic_share: _Share
    centre_row: float = Field(description="in pixels from the kernel's centre; 0 along an axis of stride 1")
    centre_column: float
    explained: _Explained = Field(description="share beyond isotropy")
    explained_null: _Explained | None = Field(description="by chance; None in a file that does not say")
    explained_variances: _Explained
    explained_covariances: _Explained

    @property
    def strided(self) -> bool:
        """Whether the layer reads fewer places than there are."""
        return max(self.stride) > 1

    @property
    def shape(self) -> Shape:
        """What was fitted."""
        shares = self.blur_share, self.slope_share, self.contrast_share
        return Shape(self.s, *shares, centre=(self.centre_row, self.centre_column))


class FilterEntryOfVersion2(_Measured):
    """An entry of files of version 2, which hold another closed form beside the covariance."""

    s: float = Field(gt=0)
    relative_s: float = Field(gt=0)
    isotropic_share: _Share
    cosine: float
    explained: _Share
    explained_null: _Share

    def refitted(self) -> FilterEntry:
        """Return the entry with today's closed form, fitted to the stored covariance with the shrinkage taken back."""
        size = self.kernel[0] * self.kernel[1]
        unit = self.matrix()
        if self.shrinkage < 1 - ROUNDING:
            unit = (unit - self.shrinkage / size * np.eye(size)) / (1 - self.shrinkage)
        fit = fit_closed_form(unit, self.kernel)
        own = set(_Measured.model_fields) - {"verdict"}
        return FilterEntry(
            **self.model_dump(include=own),
            **measured_shape(fit, self.kernel),
            stride=(1, 1),
            explained_null=None,
            verdict="isotropic" if self.verdict == "isotropic" else described(fit),
        )


def triangle(covariance: Array) -> list[float]:
    """Return the lower triangle of a covariance scaled to trace 1, to eight significant digits."""
    unit = covariance / np.trace(covariance)
    return [float(f"{value:.8g}") for value in unit[np.tril_indices(len(unit))]]


def carried_over(entries: Sequence[FilterEntry], depth: float, kernel: Kernel, strided: bool = False) -> Array | None:
    """Return the covariance, with trace 1, that the entries give a layer at a relative depth; None where none can.

    Of each source the layers whose filters extend along the same axes, and of those the ones that are strided as the
    layer is, where there are any; resampled to the kernel (`resampled`) and interpolated in relative depth
    (`interpolated`); then the mean over sources. The number of filters does not matter.
    """
    found = []
    for source in sorted({entry.source for entry in entries}):
        own = sorted(
            (e for e in entries if e.source == source and alike(e.kernel, kernel)), key=lambda entry: entry.depth
        )
        own = [entry for entry in own if entry.strided == strided] or own
        if own:
            matrices = [resampled(entry.matrix(), entry.kernel, kernel) for entry in own]
            found.append(interpolated([entry.depth for entry in own], matrices, depth))
    return np.mean(found, axis=0) if found else None


class FilterMedians(BaseModel):
    """The closed form in the layers of one kind, of stride 1 or above, over all sources: medians, no trend with depth.

    On networks that were left out a trend did no better than medians did; the kind of layer made the difference.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    strided: bool
    relative_s: float = Field(gt=0)
    blur: _Share
    slope: _Share
    contrast: _Share
    layers: int = Field(ge=1, description="number of layers the shares are of")
    widths: int = Field(ge=0, description="number of layers with a width; with none, relative_s is of all of them")

    def relative(self) -> Relative:
        """Return the medians as a shape."""
        return Relative(self.relative_s, self.blur, self.slope, self.contrast)
