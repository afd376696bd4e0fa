"""The landscape of a scan: beta / alpha of every model by relative depth, QK and OV, and each model as a point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnlens.circuits import Fold, Kind
from attnlens.figures import style
from attnlens.heads import Array
from attnlens.scans.tables import GRID, Curve, Result, curves, model_rows, spread
from attnlens.words import counted

PANELS: Mapping[Kind, str] = {"qk": "QK, mean over heads", "ov": "OV, summed over heads"}

# Okabe & Ito's palette, as in `style`; black is the median over models, grey the groups beyond these.
GROUP_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GROUP_MARKERS = ("o", "^", "s", "D", "v", "P")
OTHER = "other"
WIDTH, HEIGHT, GAP, LEFT = 400, 400, 105, 115


def draw_landscape(results: Mapping[str, Result], fold: Fold) -> Figure:
    """Draw a line a model for QK and OV, their quartiles over models, and beside them OV against QK, a point a model.

    Lines are beta / alpha of a layer, which no scaling of the weights changes, against its place between the first and
    the last attention layer; a model with one layer is a dot. Points are medians over a model's layers.
    """
    found = {circuit: curves(results, circuit, fold) for circuit in PANELS}
    models = {curve.model for panel in found.values() for curve in panel}
    with style.look():
        if not models:
            return style.message_figure(
                "Landscape", f"No model of this scan has a square circuit under the fold {fold}."
            )
        groups = _groups({name: results[name]["group"] for name in models})
        total = LEFT + 3 * WIDTH + 2 * GAP + 30
        heading = style.Heading(total)
        shown = "" if len(models) == len(results) else f"{len(models)} of "
        heading.add(f"Landscape of {shown}{counted(len(results), 'model')}", 10, weight="bold")
        heading.add(
            f"beta / alpha of each layer's fit, M ≈ alpha·Z + beta·I, {style.fold_words(fold, ['qk', 'ov'])}", 8.5
        )
        heading.add(
            "Thin lines: one model each; black line and band: median and quartiles over models. "
            "Right: medians over a model's layers. Both scales are arcsinh: near-linear around 0, logarithmic beyond",
            7.5,
            color=style.FAINT,
        )
        top = heading.height + 65
        figure = style.new_figure(total, top + HEIGHT + 75)
        heading.write(figure)
        _legend(figure, groups, heading.height + 8)
        for place, (circuit, title) in enumerate(PANELS.items()):
            axes = style.add_axes(figure, LEFT + place * (WIDTH + GAP), top, WIDTH, HEIGHT)
            axes.set_title(title, loc="left", pad=5)
            _lines(axes, found[circuit], groups)
            axes.set_ylabel("beta / alpha")
        axes = style.add_axes(figure, LEFT + 2 * (WIDTH + GAP), top, WIDTH, HEIGHT)
        axes.set_title("Each model, median over layers", loc="left", pad=5)
        _points(axes, {name: results[name] for name in results if name in models}, fold, groups)
    return figure


def _groups(named: Mapping[str, str]) -> dict[str, str]:
    """Give the largest groups a name of their own in the legend, and the rest one together."""
    counts = Counter(named.values())
    ranked = sorted(counts, key=lambda group: (-counts[group], group))
    keep = ranked if len(ranked) <= len(GROUP_COLOURS) else ranked[: len(GROUP_COLOURS)]
    return {name: group if group in keep else OTHER for name, group in named.items()}


def _look(groups: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return colour and marker of each group, the largest first, ``other`` last and grey."""
    counts = Counter(groups.values())
    named = sorted((group for group in counts if group != OTHER), key=lambda group: (-counts[group], group))
    looks = dict(zip(named, zip(GROUP_COLOURS, GROUP_MARKERS, strict=True), strict=False))
    return looks | ({OTHER: (style.RULE, ".")} if OTHER in counts else {})


def _lines(axes: Axes, found: Sequence[Curve], groups: Mapping[str, str]) -> None:
    looks = _look(groups)
    faded = float(np.clip((15 / max(1, len(found))) ** 0.5, 0.12, 0.8))
    for group, (colour, marker) in looks.items():
        own = [curve for curve in found if groups[curve.model] == group]
        lines = [np.stack([curve.depth, curve.value], -1) for curve in own if len(curve.depth) > 1]
        axes.add_collection(
            LineCollection(lines, colors=colour, linewidths=0.7, alpha=faded, gid=f"lines {group}"), autolim=False
        )
        dots = np.array([(curve.depth[0], curve.value[0]) for curve in own if len(curve.depth) == 1])
        if len(dots):
            axes.plot(*dots.T, marker, color=colour, markersize=3, markeredgewidth=0, alpha=0.8)
    middle = spread(found)
    axes.fill_between(GRID, middle.low, middle.high, color=style.INK, alpha=0.16, linewidth=0, zorder=2.4)
    axes.plot(GRID, middle.median, color=style.INK, linewidth=1.6, gid="median")
    axes.axhline(0, color=style.FAINT, linewidth=0.7, zorder=0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "0.25", "0.5", "0.75", "1"])
    axes.set_xlabel("relative depth of the layer")
    values = np.concatenate([curve.value for curve in found]) if found else np.zeros(1)
    style.arcsinh_y_axis(axes, values, linear_width=_linear_width(values))


def _points(axes: Axes, results: Mapping[str, Result], fold: Fold, groups: Mapping[str, str]) -> None:
    looks = _look(groups)
    found: dict[str, list[tuple[float, float]]] = {group: [] for group in looks}
    for name, result in results.items():
        for row in model_rows(name, result):
            if row["fold"] == fold and None not in (row["qk_ratio"], row["ov_ratio"]):
                found[groups[name]].append((row["qk_ratio"], row["ov_ratio"]))
    for group, (colour, marker) in reversed(looks.items()):
        if found[group]:
            points: Any = {"markersize": 4, "markeredgewidth": 0.4, "markeredgecolor": "white", "alpha": 0.85}
            axes.plot(*np.array(found[group]).T, marker, color=colour, gid=f"points {group}", **points)
    every = np.array([point for points in found.values() for point in points]).reshape(-1, 2)
    axes.axhline(0, color=style.FAINT, linewidth=0.7, zorder=0.5)
    axes.axvline(0, color=style.FAINT, linewidth=0.7, zorder=0.5)
    axes.set_xlabel("QK beta / alpha")
    axes.set_ylabel("OV beta / alpha")
    if len(every):
        style.arcsinh_y_axis(axes, every[:, 1], linear_width=_linear_width(every[:, 1]))
        style.arcsinh_x_axis(axes, every[:, 0], linear_width=_linear_width(every[:, 0]))


def _linear_width(values: Array) -> float:
    return float(np.median(np.abs(values))) or 1.0


def _legend(figure: Figure, groups: Mapping[str, str], top: float) -> None:
    looks, counts = _look(groups), Counter(groups.values())
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1) for colour, marker in looks.values()
    ]
    handles.append(Line2D([], [], color=style.INK, linewidth=1.6))
    labels = [f"{group} ({counts[group]})" for group in looks] + ["median"]
    width, height = (size * style.DPI for size in figure.get_size_inches())
    figure.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(20 / width, 1 - top / height),
        ncols=len(handles),
        borderpad=0,
        borderaxespad=0,
        handlelength=1.8,
        columnspacing=1.4,
    )
