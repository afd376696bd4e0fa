"""Comparing models by their depthwise filters: shares and rank of their covariances by relative depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from attnlens.filters.closed_form import PARTS
from attnlens.filters.inspection import FilterInspection
from attnlens.heads import Array
from attnlens.statistics.depth import GRID, relative_depth, rms_over_depth

SHARES = (*(f"{part}_share" for part in PARTS), "isotropic_share")
STATISTICS = ("effective_rank", *SHARES)


@dataclass(frozen=True)
class FilterProfile:
    """One statistic of a model's filters by relative depth t = layer / (layers of filters - 1).

    ``effective_rank`` is a share of the number of positions, so that kernels of different size stand beside each other;
    the others are shares of the trace.
    """

    model: str
    statistic: str
    depth: Array
    values: Array

    def at(self, depth: Array) -> Array:
        """Interpolate linearly at relative depths."""
        return np.interp(depth, self.depth, self.values)


def filter_profiles(filters: FilterInspection, name: str) -> list[FilterProfile]:
    """Return every profile of one model's filters; layers of zeros are interpolated over."""
    rows = [row for row in filters.stats.records() if row["verdict"] != "zeros"]
    if not rows:
        return []
    depth = np.array([relative_depth(int(row["layer"]), filters.depth) for row in rows])
    positions = np.array([int(row["height"]) * int(row["width"]) for row in rows])
    found = {statistic: np.array([float(row[statistic]) for row in rows]) for statistic in STATISTICS}
    found["effective_rank"] /= positions
    return [FilterProfile(name, statistic, depth, values) for statistic, values in found.items()]


def filter_distances(profiles: Sequence[FilterProfile]) -> list[dict[str, Any]]:
    """Return how far apart each pair of models is, as root mean squares over relative depth.

    ``shares``: of the Euclidean distance between the four shares of the trace, from 0 to sqrt(2); ``effective_rank``:
    of the difference in effective rank as a share of the positions, from 0 to 1.
    """
    at = {(p.model, p.statistic): p.at(GRID) for p in profiles}
    found = []
    for first, second in combinations(dict.fromkeys(p.model for p in profiles), 2):
        apart = np.sqrt(sum((at[first, share] - at[second, share]) ** 2 for share in SHARES))
        ranks = at[first, "effective_rank"] - at[second, "effective_rank"]
        distances = {"shares": rms_over_depth(apart), "effective_rank": rms_over_depth(ranks)}
        found.append({"first": first, "second": second, **distances})
    return found
