"""Depth profiles: alpha, beta and the identity cosine of every circuit against the layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnlens.circuits import Fold
from attnlens.figures import scales, style
from attnlens.figures.panels import Given, Place, open_panels
from attnlens.heads import Array
from attnlens.statistics.table import ALL_HEADS, StatsTable

COLUMNS = {"qk": "QK, every head", "ov": "OV, every head", "sum": "OV, summed over heads"}
ROWS = {
    "alpha": "alpha (log scale)",
    "beta": "beta (arcsinh scale)",
    "cosine": "identity cosine ÷ bound",
}
PAPER_COLUMNS = {"qk": "QK", "ov": "OV", "sum": "OV, sum"}
PAPER_ROWS = {"alpha": "alpha (log)", "beta": "beta (arcsinh)", "cosine": "cosine ÷ bound"}


@dataclass(frozen=True)
class Series:
    """One circuit's statistics under one fold, a value a product."""

    layer: Array
    alpha: Array
    beta: Array
    beta_stderr: Array
    cosine: Array


def collect(stats: StatsTable) -> dict[tuple[str, Fold], Series]:
    """Return the series by column (`COLUMNS`) and fold; products without a diagonal (NaN) are left out.

    What is too small to be drawn is 0.
    """
    names = ("layer", "alpha", "beta", "beta_stderr", "identity_share")
    columns = [scales.drawable(stats.column(name)) for name in names]
    head, circuit, fold = (stats.columns.index(name) for name in ("head", "circuit", "fold"))
    rows: dict[tuple[str, Fold], list[Array]] = {}
    for row, values in zip(stats.rows, np.stack(columns, -1), strict=True):
        column = "sum" if row[head] == ALL_HEADS else row[circuit]
        if not np.isnan(values[1]):
            rows.setdefault((column, row[fold]), []).append(values)  # type: ignore[arg-type]
    return {key: Series(*np.array(table).T) for key, table in rows.items()}


def draw_profile(
    stats: StatsTable, folds: Sequence[Fold], *, model: str, notes: str = "", ax: Given | None = None
) -> Figure:
    """Draw a point a head with +-2 standard errors of beta and a line through the heads' mean, a colour a fold.

    Panels: a statistic of ``alpha``, ``beta`` and ``cosine`` of ``qk``, ``ov`` and ``sum``, as in ``"beta qk"``.
    """
    series = collect(stats)
    columns = [name for name in COLUMNS if any(column == name for column, _ in series)]
    if not columns:
        return style.message_figure(model, "No circuit of this model is square: there is no diagonal to fit.", ax)
    layers = sorted({int(layer) for values in series.values() for layer in values.layer})
    paper = style.current().paper
    panels = open_panels(
        [[f"{row} {column}" for column in columns] for row in ROWS],
        Place(120, 620 if len(columns) == 1 else 400, 250, gap=95, pitch=35, above=44),
        [
            (model, 10),
            ("Fit of each circuit, M ≈ alpha·Z + beta·I, against depth", 8.5),
            ("Points: one product each; bars: ±2 standard errors of beta; lines: mean over a layer's heads", 7.5),
        ],
        notes=notes,
        legend=[(_handle(fold), fold if paper else style.fold_words(fold, ["qk", "ov"])) for fold in folds],
        ax=ax,
    )
    for name, axes in panels.axes.items():
        row, column = name.split()
        chosen = {fold: series[column, fold] for fold in folds if (column, fold) in series}
        _panel(axes, row, chosen, layers)
        shared = [values for (other, _), values in series.items() if other == column or (paper and not panels.given)]
        _y_axis(axes, row, shared)
        scales.layer_axis(axes, layers, labelled=panels.is_last(name))
        if panels.is_first(name):
            axes.set_ylabel(PAPER_ROWS[row] if paper else ROWS[row])
            if not (paper or panels.given):
                axes.yaxis.set_label_coords(-92 / scales.length(axes), 0.5)
        elif paper:  # one scale a row
            axes.tick_params(labelleft=False)
        if row == next(iter(ROWS)):
            panels.title(name, PAPER_COLUMNS[column] if paper else COLUMNS[column])
    return panels.finish()


def _panel(axes: Axes, row: str, series: Mapping[Fold, Series], layers: Sequence[int]) -> None:
    """Draw one statistic of one circuit: points side by side, lines through the layers' means."""
    pitch = min(np.diff(layers), default=1)
    crowded = any(len(values.layer) > len(layers) for values in series.values())
    spread = pitch * min(0.26, 0.72 / len(series)) if crowded else 0.0
    faded = max(0.3, min(1.0, (150 / max(len(values.layer) for values in series.values())) ** 0.5))
    for index, (fold, values) in enumerate(series.items()):
        y = getattr(values, row)
        x = values.layer + spread * (index - (len(series) - 1) / 2)
        colour = style.FOLD_COLOURS[fold]
        if row == "beta":
            ends = np.stack([y - 2 * values.beta_stderr, y + 2 * values.beta_stderr], -1)
            bars = np.stack([np.broadcast_to(x[:, None], ends.shape), ends], -1)
            bars_look = {"colors": colour, "linewidths": 0.8, "alpha": 0.45 * faded}
            axes.add_collection(LineCollection(list(bars), **bars_look), autolim=False)
        points = {"markersize": 2.8, "alpha": 0.7 * faded, "markeredgewidth": 0}
        axes.plot(x, y, style.FOLD_MARKERS[fold], color=colour, gid=f"{row} {fold}", **points)
        drawn = np.unique(values.layer)
        mean = np.array([y[values.layer == layer].mean() for layer in drawn])
        if len(drawn) == 1:
            drawn, mean = np.array([drawn[0] - 0.3, drawn[0] + 0.3]), mean.repeat(2)
        axes.plot(
            drawn,
            mean,
            style.FOLD_LINES[fold],
            color=colour,
            linewidth=1.2,
            zorder=2.5 if fold == "effective" else 3,
            gid=f"mean {row} {fold}",
        )


def _y_axis(axes: Axes, row: str, series: Sequence[Series]) -> None:
    """Scale alpha logarithmically, beta by arcsinh (both span decades, beta in two signs), the cosine linearly."""
    values = np.concatenate([getattr(each, row) for each in series])
    if row == "alpha":
        positive = values[values > 0]
        if positive.size:
            scales.log_y_axis(axes, float(positive.min()), float(positive.max()))
        return
    axes.axhline(0, color=style.FAINT, linewidth=0.7, zorder=0.5)
    if row == "beta":
        spread = np.concatenate([each.beta_stderr for each in series])
        reach = np.concatenate([values - 2 * spread, values + 2 * spread])
        scales.arcsinh_axis(axes, reach, linear_width=float(np.median(np.abs(values))))
    else:
        scales.linear_y_axis(axes, min(-0.1, float(values.min())), max(0.1, float(values.max())))


def _handle(fold: Fold) -> Line2D:
    look: Any = {"marker": style.FOLD_MARKERS[fold], "linestyle": style.FOLD_LINES[fold]}
    return Line2D([], [], color=style.FOLD_COLOURS[fold], markersize=3.5, linewidth=1.2, **look)
