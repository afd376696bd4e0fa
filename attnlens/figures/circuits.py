"""The figures of an inspection's circuits by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from attnlens.circuits import Fold, Kind
from attnlens.figures import gains, heatmaps, profiles, scales, spectra
from attnlens.figures.drawings import Drawing
from attnlens.figures.panels import Given
from attnlens.heads import Array
from attnlens.statistics.corners import Corners
from attnlens.statistics.gains import GainProfile
from attnlens.statistics.table import StatsTable


def circuit_drawings(
    stats: StatsTable,
    folds: Sequence[Fold],
    singular: Mapping[tuple[int, Kind, Fold], Array],
    log_gains: Mapping[str, GainProfile],
    read: Callable[[], Corners],
    *,
    fold: Fold,
    **about: Any,
) -> dict[str, Drawing]:
    """Return what draws the heatmaps, whose corners are read where one is drawn, profile, spectra and any gains."""
    if _too_small(stats):
        words = f"Products below {scales.SMALLEST:g} are drawn as zero."
        about["notes"] = " ".join(filter(None, (about.get("notes"), words)))

    def heatmap(circuit: Kind, *, ax: Given | None = None) -> Figure:
        return heatmaps.draw_heatmap(*read().of(circuit), circuit=circuit, fold=fold, ax=ax, **about)

    return {
        "qk_heatmap": partial(heatmap, "qk"),
        "ov_heatmap": partial(heatmap, "ov"),
        "depth_profile": partial(profiles.draw_profile, stats, folds, **about),
        "spectra": partial(spectra.draw_spectra, singular, fold, **about),
        **({"gains": partial(gains.draw_gains, log_gains, **about)} if log_gains else {}),
    }


def _too_small(stats: StatsTable) -> bool:
    """Whether there is a product that is not zero and drawn as zero."""
    norm, rank = (stats.column(name) for name in ("frobenius_norm", "stable_rank"))
    return bool(((norm < scales.SMALLEST) & np.isfinite(rank)).any())
