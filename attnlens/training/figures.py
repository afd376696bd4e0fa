"""Figures of a training comparison: its metric through training, and alpha and beta through training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from attnlens.figures import style
from attnlens.figures.panels import Given, Place, open_panels
from attnlens.figures.style import line_style
from attnlens.heads import Array
from attnlens.training.results import Summary
from attnlens.training.structure import Structure
from attnlens.words import counted

QUANTITIES = {"qk_beta": "QK beta", "ov_beta": "OV beta", "qk_alpha": "QK alpha", "ov_alpha": "OV alpha"}


def draw_curves(summary: Summary, *, ax: Given | None = None) -> Figure:
    """Draw each arm's mean of the metric over its seeds against the epoch, with the band from worst to best seed."""
    metric, target = summary.config.metric, summary.config.target
    scale, paper = metric.scale, style.current().paper
    way = "; lower is better" if metric.lower_is_better else ""
    told = (
        f"mean and range over seeds; dashed: the {scale * target:g}{'%' if metric.share else ''} of epochs-to-X"
        f"{way}. {_state(summary)}"
    )
    curves = {}
    for arm, by_seed in summary.curves.items():
        diverged = {seed for name, seed, _ in summary.diverged if name == arm}
        epochs, values = curve_matrix([curve for seed, curve in by_seed.items() if seed not in diverged])
        if len(epochs):
            curves[arm] = epochs, scale * values
    looks = {arm: _look(index, len(summary.curves)) for index, arm in enumerate(summary.curves)}
    names = {arm: arm if paper else _counted(summary, arm) for arm in curves}
    with style.look():
        panels = open_panels(
            [["curves"]],
            Place(75, 790, 400, above=20, right=35, shape=0.62),
            [(f"{_title(summary)}: {metric.title} through training", 10), (told, 8)],
            legend=[(Line2D([], [], **looks[arm]), names[arm]) for arm in curves],
            ax=ax,
        )
        for axes in panels.axes.values():
            axes.axhline(scale * target, color=style.FAINT, linewidth=0.8, linestyle="--", zorder=0)
            for arm, (epochs, values) in curves.items():
                _band(axes, epochs, values, looks[arm], names[arm])
            axes.set_xlabel("epoch")
            axes.set_ylabel(f"{metric.title}, %" if metric.share else metric.title)
            _epoch_axis(axes, summary.config.recipe.epochs)
        return panels.finish()


def _look(index: int, count: int) -> dict[str, Any]:
    """Return an arm's line, its marks apart from those of the others."""
    return {**line_style(index), "linewidth": 1.2, "markevery": (0.2 * index / max(count, 1), 0.2)}


def _band(axes: Axes, epochs: Array, values: Array, look: Mapping[str, Any], label: str) -> None:
    """Draw the mean over seeds and the band from least to largest."""
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, linewidth=0)
    axes.plot(epochs, np.nanmean(values, 0), label=label, **look)


def _counted(summary: Summary, arm: str) -> str:
    """Name an arm with the number of its runs that finished, and of those that are under way."""
    finished, diverged = len(summary.finished[arm]), sum(name == arm for name, _, _ in summary.diverged)
    going = len(summary.curves[arm]) - finished - diverged
    return f"{arm} (n = {finished}{f', {going} not finished' * bool(going)})"


def curve_matrix(curves: Sequence[Sequence[tuple[float, float]]]) -> tuple[Array, Array]:
    """Return the epochs measured and ``[seed, epoch]`` values, NaN where a seed was not measured."""
    epochs = sorted({epoch for curve in curves for epoch, _ in curve})
    values = np.full((len(curves), len(epochs)), np.nan)
    for row, curve in enumerate(curves):
        for epoch, value in curve:
            values[row, epochs.index(epoch)] = value
    return np.array(epochs, dtype=np.float64), values


def draw_structure(
    summary: Summary, pretrained: Structure | None, source: str, fold: str = "effective", *, ax: Given | None = None
) -> Figure:
    """Draw alpha and beta of each arm, mean over layers and seeds, against the epoch; a source's mean as a rule."""
    runs = {
        arm: [[(float(e), fits) for e, fits in lines] for lines in s.values()] for arm, s in summary.structure.items()
    }
    told = f"{_title(summary)}: structure through training", _state(summary)
    return structure_figure(*told, runs, summary.config.recipe.epochs, pretrained, source, fold, ax=ax)


def structure_figure(
    title: str,
    state: str,
    runs: Mapping[str, Sequence[Sequence[tuple[float, Structure]]]],
    epochs: float,
    pretrained: Structure | None = None,
    source: str = "",
    fold: str = "effective",
    *,
    ax: Given | None = None,
) -> Figure:
    """Draw alpha and beta, mean over layers and runs, by a name for each group of ``runs``, against the epoch.

    Panels: ``qk_beta``, ``ov_beta``, ``qk_alpha``, ``ov_alpha``.
    """
    dotted = "" if pretrained is None else f"; dotted: the pre-trained {source}"
    told = (
        f"{fold} products, M ≈ α Z + β I: mean over layers (QK: and heads; OV: summed over heads) and seeds, band "
        f"over seeds{dotted}. {state}"
    )
    looks = {arm: _look(index, len(runs)) for index, arm in enumerate(runs)}
    legend = [(Line2D([], [], **looks[arm]), arm) for arm in runs]
    if pretrained is not None:
        legend.append((Line2D([], [], **_SOURCE), f"{source}, pre-trained"))
    with style.look():
        panels = open_panels(
            [["qk_beta", "ov_beta"], ["qk_alpha", "ov_alpha"]],
            Place(90, 360, 200, gap=85, pitch=68, above=38, right=25),
            [(title, 10), (told, 8)],
            legend=legend,
            ax=ax,
        )
        for name, axes in panels.axes.items():
            panels.title(name, QUANTITIES[name])
            if pretrained is not None and pretrained[fold][name]:
                axes.axhline(float(np.mean(pretrained[fold][name])), zorder=5, **_SOURCE)
            for arm, group in runs.items():
                epochs_, values = curve_matrix(_means(group, name, fold))
                if len(epochs_):
                    _band(axes, epochs_, values, looks[arm], arm)
            _epoch_axis(axes, epochs)
            axes.set_xlabel("epoch" if panels.is_last(name) else "")
            if panels.given:
                axes.set_ylabel(QUANTITIES[name])
        return panels.finish()


_SOURCE: Any = {"color": style.FAINT, "linewidth": 2, "linestyle": (0, (1, 2))}
"""Of the rule that stands for the pre-trained model"""


def _means(group: Sequence[Sequence[tuple[float, Structure]]], name: str, fold: str) -> list[list[tuple[float, float]]]:
    """Return a curve a run: the mean over layers at each epoch that it was measured and is a number."""
    curves = [
        [(epoch, float(np.mean(fits[fold][name]))) for epoch, fits in lines if fits[fold][name]] for lines in group
    ]
    numbers = [[(epoch, mean) for epoch, mean in curve if np.isfinite(mean)] for curve in curves]
    return [curve for curve in numbers if curve]


def _epoch_axis(axes: Axes, epochs: float) -> None:
    axes.set_xlim(0, epochs)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if style.current().paper else 8))


def has_structure(summary: Summary) -> bool:
    """Whether any run's products were measured: a network without attention has none."""
    measured = [fits for by_seed in summary.structure.values() for lines in by_seed.values() for _, fits in lines]
    return any(values for fits in measured for fold in fits.values() for values in fold.values())


def _title(summary: Summary) -> str:
    config = summary.config
    return f"{config.dataset}{', depthwise filters frozen' if config.freeze_filters else ''}"


def _state(summary: Summary) -> str:
    runs = sum(map(len, summary.finished.values()))
    return f"{runs} of {counted(summary.expected, 'run')} finished."
