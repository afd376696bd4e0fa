"""Fitting the depthwise filters of a model: shrunk covariances, the closed form, and its medians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnlens.filters.covariance import second_moment
from attnlens.filters.entries import Estimator, FilterEntry, FilterMedians, triangle
from attnlens.filters.inspection import Reader
from attnlens.filters.statistics import fit_filters
from attnlens.heads import Array
from attnlens.statistics.depth import relative_depth
from attnlens.threads import Progress

if TYPE_CHECKING:
    from attnlens.models.architecture import Architecture


def fit_filter_entries(
    architecture: Architecture, reader: Reader, source: int, estimator: Estimator, progress: Progress = iter
) -> tuple[list[FilterEntry], list[str]]:
    """Fit every layer of depthwise filters of a model; return the entries, and what was not fitted and why."""
    specs = architecture.filters
    found: list[FilterEntry] = []
    unread = [f"{refusal.path} {refusal.reason}" for refusal in architecture.refused_filters]
    for layer, spec in progress(list(enumerate(specs))) if specs else ():
        filters = reader(layer)
        fit, _ = fit_filters(filters, spec.stride, seed=layer)
        if fit.verdict == "zeros":
            unread.append(f"{spec.path} holds zeros only: its filters have no covariance")
            continue
        flat = filters.reshape(len(filters), -1)
        covariance, shrinkage = shrunk(flat / np.abs(flat).max(), estimator)
        found.append(
            FilterEntry(
                source=source,
                layer=layer,
                name=spec.path,
                depth=relative_depth(layer, len(specs)),
                kernel=spec.kernel,
                stride=spec.stride,
                filters=spec.filters,
                estimator=estimator,
                shrinkage=shrinkage,
                covariance=triangle(covariance),
                **{name: getattr(fit, name) for name in _TAKEN},
            )
        )
    return found, unread


_TAKEN = (
    *("rms", "s", "relative_s", "s_bound", "blur_share", "slope_share", "contrast_share", "isotropic_share"),
    *("centre_row", "centre_column", "explained", "explained_null", "explained_variances", "explained_covariances"),
    *("effective_rank", "p_value", "verdict"),
)


def shrunk(flat: Array, estimator: Estimator) -> tuple[Array, float]:
    """Return ``(1 - c) S + c I tr(S) / p`` of filters ``[n, p]`` and the shrinkage c, a mean of zero being assumed.

    c of Ledoit & Wolf (2004) assumes nothing of the filters' distribution, that of OAS (Chen et al., 2010) that it is
    normal. Both are scikit-learn's.
    """
    if estimator == "none":
        return second_moment(flat), 0.0
    from sklearn.covariance import ledoit_wolf, oas

    covariance, shrinkage = (ledoit_wolf if estimator == "ledoit-wolf" else oas)(flat, assume_centered=True)
    return covariance, float(shrinkage)


def filter_medians(entries: Sequence[FilterEntry]) -> list[FilterMedians]:
    """Return the closed form's medians over layers of stride 1, and over those of stride above 1, where there are any.

    A layer that cannot be told from isotropy, or whose width lies at an end of its range, has no width: it counts for
    the shares alone.
    """
    return [
        _medians(own, strided=strided)
        for strided in (False, True)
        if (own := [entry for entry in entries if entry.strided == strided])
    ]


def _medians(entries: Sequence[FilterEntry], *, strided: bool) -> FilterMedians:
    wide = [entry for entry in entries if entry.verdict != "isotropic" and not entry.s_bound]
    shares = np.median([[e.blur_share, e.slope_share, e.contrast_share] for e in entries], axis=0)
    blur, slope, contrast = (float(share) for share in shares / max(1.0, shares.sum()))
    return FilterMedians(
        strided=strided,
        relative_s=float(np.exp(np.median(np.log([entry.relative_s for entry in wide or entries])))),
        blur=blur,
        slope=slope,
        contrast=contrast,
        layers=len(entries),
        widths=len(wide),
    )
