"""The landscape of a scan: beta / alpha of every model by relative depth, QK and OV, and each model as a point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnlens.circuits import Fold, Kind
from attnlens.figures import scales, style
from attnlens.figures.panels import Given, Legend, Place, open_panels
from attnlens.heads import Array
from attnlens.printable import printable
from attnlens.scans.tables import GRID, Curve, Result, curves, model_rows, spread
from attnlens.words import counted

PANELS: Mapping[Kind, str] = {"qk": "QK, mean over heads", "ov": "OV, summed over heads"}
PAPER_PANELS: Mapping[Kind, str] = {"qk": "QK, mean", "ov": "OV, sum"}

# Okabe & Ito's palette, as in `style`; black is the median over models, grey the groups beyond these.
GROUP_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GROUP_MARKERS = ("o", "^", "s", "D", "v", "P")
OTHER = "other"
GROUP_DASHES = (*style.DASHES, (0, (2, 2)))


def draw_landscape(results: Mapping[str, Result], fold: Fold, *, ax: Given | None = None) -> Figure:
    """Draw a line a model for QK and OV, their quartiles over models, and beside them OV against QK, a point a model.

    Lines are beta / alpha of a layer, which no scaling of the weights changes, against its place between the first and
    the last attention layer; a model with one layer is a dot. Points are medians over a model's layers. Panels: ``qk``,
    ``ov`` and ``models``.
    """
    found = {circuit: curves(results, circuit, fold) for circuit in PANELS}
    models = {curve.model for panel in found.values() for curve in panel}
    with style.look():
        if not models:
            told = f"No model of this scan has a square circuit under the fold {fold}."
            return style.message_figure("Landscape", told, ax)
        groups = _groups({name: results[name]["group"] for name in models})
        shown = "" if len(models) == len(results) else f"{len(models)} of "
        panels = open_panels(
            [[*PANELS, "models"]],
            Place(115, 400, 400, gap=105, above=45, below=60, shape=0.9),
            [
                (f"Landscape of {shown}{counted(len(results), 'model')}", 10),
                (
                    f"beta / alpha of each layer's fit, M ≈ alpha·Z + beta·I, {style.fold_words(fold, ['qk', 'ov'])}",
                    8.5,
                ),
                (
                    (
                        "Thin lines: one model each; black line and band: median and quartiles over models. Right: "
                        "medians over a model's layers. Both scales are arcsinh: near-linear around 0, logarithmic "
                        "beyond"
                    ),
                    7.5,
                ),
            ],
            legend=_legend(groups),
            ax=ax,
        )
        for name, axes in panels.axes.items():
            if name == "models":
                panels.title(name, "each model" if style.current().paper else "Each model, median over layers")
                _points(axes, {name: results[name] for name in results if name in models}, fold, groups)
                continue
            circuit: Kind = "qk" if name == "qk" else "ov"
            panels.title(name, PAPER_PANELS[circuit] if style.current().paper else PANELS[circuit])
            _lines(axes, found[circuit], groups)
            axes.set_ylabel("beta / alpha (arcsinh scale)")
        return panels.finish()


def _groups(named: Mapping[str, str]) -> dict[str, str]:
    """Give the largest groups a name of their own in the legend, and the rest one together."""
    named = {name: printable(group) for name, group in named.items()}  # an SVG has them as identifiers, too
    counts = Counter(named.values())
    ranked = sorted(counts, key=lambda group: (-counts[group], group))
    keep = ranked if len(ranked) <= len(GROUP_COLOURS) else ranked[: len(GROUP_COLOURS)]
    return {name: group if group in keep else OTHER for name, group in named.items()}


def _look(groups: Mapping[str, str]) -> dict[str, tuple[str, str, Any]]:
    """Return colour, marker and dash of each group, the largest first, ``other`` last and grey."""
    counts = Counter(groups.values())
    named = sorted((group for group in counts if group != OTHER), key=lambda group: (-counts[group], group))
    looks = dict(zip(named, zip(GROUP_COLOURS, GROUP_MARKERS, GROUP_DASHES, strict=True), strict=False))
    return looks | ({OTHER: (style.RULE, ".", "-")} if OTHER in counts else {})


def _lines(axes: Axes, found: Sequence[Curve], groups: Mapping[str, str]) -> None:
    looks = _look(groups)
    faded = float(np.clip((15 / max(1, len(found))) ** 0.5, 0.12, 0.8))
    for group, (colour, marker, dash) in looks.items():
        own = [curve for curve in found if groups[curve.model] == group]
        lines = [np.stack([curve.depth, curve.value], -1) for curve in own if len(curve.depth) > 1]
        axes.add_collection(
            LineCollection(lines, colors=colour, linewidths=0.7, linestyles=[dash], alpha=faded, gid=f"lines {group}"),
            autolim=False,
        )
        dots = np.array([(curve.depth[0], curve.value[0]) for curve in own if len(curve.depth) == 1])
        if len(dots):
            axes.plot(*dots.T, marker, color=colour, markersize=3, markeredgewidth=0, alpha=0.8)
    middle = spread(found)
    axes.fill_between(GRID, middle.low, middle.high, color=style.INK, alpha=0.16, linewidth=0, zorder=2.4)
    axes.plot(GRID, middle.median, color=style.INK, linewidth=1.6, gid="median")
    axes.axhline(0, color=style.FAINT, linewidth=0.7, zorder=0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlabel("relative depth")
    values = np.concatenate([curve.value for curve in found]) if found else np.zeros(1)
    values = scales.drawable(values)
    scales.arcsinh_axis(axes, values, linear_width=_linear_width(values))


def _points(axes: Axes, results: Mapping[str, Result], fold: Fold, groups: Mapping[str, str]) -> None:
    looks = _look(groups)
    found: dict[str, list[tuple[float, float]]] = {group: [] for group in looks}
    for name, result in results.items():
        for row in model_rows(name, result):
            if row["fold"] == fold and None not in (row["qk_ratio"], row["ov_ratio"]):
                found[groups[name]].append((row["qk_ratio"], row["ov_ratio"]))
    for group, (colour, marker, _) in reversed(looks.items()):
        if found[group]:
            points: Any = {"markersize": 4, "markeredgewidth": 0.4, "markeredgecolor": "white", "alpha": 0.85}
            axes.plot(*np.array(found[group]).T, marker, color=colour, gid=f"points {group}", **points)
    every = scales.drawable(np.array([point for points in found.values() for point in points]).reshape(-1, 2))
    axes.axhline(0, color=style.FAINT, linewidth=0.7, zorder=0.5)
    axes.axvline(0, color=style.FAINT, linewidth=0.7, zorder=0.5)
    axes.set_xlabel("QK beta / alpha (arcsinh)")
    axes.set_ylabel("OV beta / alpha (arcsinh)")
    if len(every):
        scales.arcsinh_axis(axes, every[:, 1], linear_width=_linear_width(every[:, 1]))
        scales.arcsinh_axis(axes, every[:, 0], linear_width=_linear_width(every[:, 0]), which="x")


def _linear_width(values: Array) -> float:
    return float(np.median(np.abs(values))) or 1.0


def _legend(groups: Mapping[str, str]) -> Legend:
    counts = Counter(groups.values())
    entries: list[tuple[Artist, str]] = []
    for group, (colour, marker, dash) in _look(groups).items():
        look: Any = {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4, "linewidth": 1}
        entries.append((Line2D([], [], **look), f"{group} ({counts[group]})"))
    return [*entries, (Line2D([], [], color=style.INK, linewidth=1.6), "median")]
