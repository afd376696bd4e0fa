"""The figures of an inspection's circuits by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from attnlens.circuits import Fold, Kind
from attnlens.figures import gains, heatmaps, profiles, spectra
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

    def heatmap(circuit: Kind, *, ax: Given | None = None) -> Figure:
        return heatmaps.draw_heatmap(*read().of(circuit), circuit=circuit, fold=fold, ax=ax, **about)

    return {
        "qk_heatmap": partial(heatmap, "qk"),
        "ov_heatmap": partial(heatmap, "ov"),
        "depth_profile": partial(profiles.draw_profile, stats, folds, **about),
        "spectra": partial(spectra.draw_spectra, singular, fold, **about),
        **({"gains": partial(gains.draw_gains, log_gains, **about)} if log_gains else {}),
    }
