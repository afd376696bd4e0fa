"""Fitting the depthwise filters of a model: shrunk covariances, the closed form's width, and its trend with depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from attnlens.filters.covariance import second_moment
from attnlens.filters.entries import Estimator, FilterEntry, FilterTrend, triangle
from attnlens.filters.inspection import Reader
from attnlens.filters.statistics import fit_filters
from attnlens.heads import Array
from attnlens.statistics.depth import Trend, relative_depth
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
        fit, _ = fit_filters(filters, seed=layer)
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
                filters=spec.filters,
                estimator=estimator,
                shrinkage=shrinkage,
                covariance=triangle(covariance),
                **{name: getattr(fit, name) for name in _TAKEN},
            )
        )
    return found, unread


_TAKEN = (
    *("rms", "s", "relative_s", "isotropic_share", "cosine", "explained", "explained_null"),
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


def filter_trend(entries: Sequence[FilterEntry]) -> FilterTrend | None:
    """Fit how the closed form's width and the isotropic share go with relative depth; None without entries.

    Layers that cannot be told from isotropy have no width: they count for the share alone, unless all are so.
    """
    if not entries:
        return None
    wide = [entry for entry in entries if entry.verdict != "isotropic"] or list(entries)
    return FilterTrend(
        log_relative_s=Trend.fit([e.depth for e in wide], np.log([e.relative_s for e in wide])),
        isotropic_share=Trend.fit([e.depth for e in entries], np.array([e.isotropic_share for e in entries])),
        n=len(wide),
    )
