"""Figures of a training comparison: its metric through training, and alpha and beta through training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from attnlens.figures import style
from attnlens.figures.style import line_style
from attnlens.heads import Array
from attnlens.training.results import Summary
from attnlens.training.structure import Structure
from attnlens.words import counted

WIDTH = 900
QUANTITIES = {"qk_beta": "QK beta", "ov_beta": "OV beta", "qk_alpha": "QK alpha", "ov_alpha": "OV alpha"}


def draw_curves(summary: Summary) -> Figure:
    """Draw each arm's mean of the metric over its seeds against the epoch, with the band from worst to best seed."""
    metric, target = summary.config.metric, summary.config.target
    scale = metric.scale
    with style.look():
        heading = style.Heading(WIDTH)
        heading.add(f"{_title(summary)}: {metric.title} through training", 10, weight="bold")
        way = "; lower is better" if metric.lower_is_better else ""
        heading.add(
            f"mean and range over seeds; dashed: the {scale * target:g}{'%' if metric.share else ''} of epochs-to-X"
            f"{way}. {_state(summary)}",
            8,
        )
        figure = style.new_figure(WIDTH, heading.height + 430)
        heading.write(figure)
        axes = style.add_axes(figure, 70, heading.height + 10, 480, 350)
        axes.axhline(scale * target, color=style.RULE, linewidth=0.8, linestyle="--", zorder=0)
        for index, (arm, curves) in enumerate(summary.curves.items()):
            diverged = {seed for name, seed, _ in summary.diverged if name == arm}
            epochs, values = curve_matrix([curve for seed, curve in curves.items() if seed not in diverged])
            if not len(epochs):
                continue
            how = line_style(index)
            axes.fill_between(
                epochs,
                scale * np.nanmin(values, 0),
                scale * np.nanmax(values, 0),
                color=how["color"],
                alpha=0.15,
                linewidth=0,
            )
            axes.plot(epochs, scale * np.nanmean(values, 0), label=_counted(summary, arm), linewidth=1.3, **how)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"{metric.title}, %" if metric.share else metric.title)
        _epoch_axis(axes, summary.config.recipe.epochs)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


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


def draw_structure(summary: Summary, pretrained: Structure | None, source: str, fold: str = "effective") -> Figure:
    """Draw alpha and beta of each arm, mean over layers and seeds, against the epoch; a source's mean as a rule."""
    runs = {
        arm: [[(float(e), fits) for e, fits in lines] for lines in s.values()] for arm, s in summary.structure.items()
    }
    told = f"{_title(summary)}: structure through training", _state(summary)
    return structure_figure(*told, runs, summary.config.recipe.epochs, pretrained, source, fold)


def structure_figure(
    title: str,
    state: str,
    runs: Mapping[str, Sequence[Sequence[tuple[float, Structure]]]],
    epochs: float,
    pretrained: Structure | None = None,
    source: str = "",
    fold: str = "effective",
) -> Figure:
    """Draw alpha and beta, mean over layers and runs, by a name for each group of ``runs``, against the epoch."""
    with style.look():
        heading = style.Heading(WIDTH)
        heading.add(title, 10, weight="bold")
        dotted = "" if pretrained is None else f"; dotted: the pre-trained {source}"
        heading.add(
            f"{fold} products, M ≈ α Z + β I: mean over layers (QK: and heads; OV: summed over heads) and seeds, band "
            f"over seeds{dotted}. {state}",
            8,
        )
        top = heading.height + 10
        figure = style.new_figure(WIDTH, top + 620 + 20 * (len(runs) // 4))
        heading.write(figure)
        for index, (name, label) in enumerate(QUANTITIES.items()):
            left, row = 70 + 435 * (index % 2), index // 2
            axes = style.add_axes(figure, left, top + 260 * row + 20, 350, 195)
            axes.set_title(label, loc="left")
            _draw_quantity(axes, runs, pretrained, name, fold)
            _epoch_axis(axes, epochs)
            if row:
                axes.set_xlabel("epoch")
        handles = [Line2D([], [], linewidth=1.3, label=arm, **line_style(index)) for index, arm in enumerate(runs)]
        if pretrained is not None:
            handles.append(
                Line2D([], [], color=style.FAINT, linewidth=2, linestyle=(0, (1, 2)), label=f"{source}, pre-trained")
            )
        figure.legend(handles=handles, loc="lower center", ncols=4, columnspacing=1.2)
    return figure


def _draw_quantity(
    axes: Axes,
    runs: Mapping[str, Sequence[Sequence[tuple[float, Structure]]]],
    pretrained: Structure | None,
    name: str,
    fold: str,
) -> None:
    if pretrained is not None and pretrained[fold][name]:
        axes.axhline(
            float(np.mean(pretrained[fold][name])), color=style.FAINT, linewidth=2, linestyle=(0, (1, 2)), zorder=5
        )
    for index, group in enumerate(runs.values()):
        curves = [
            [(epoch, float(np.mean(fits[fold][name]))) for epoch, fits in lines if fits[fold][name]] for lines in group
        ]
        epochs, values = curve_matrix([curve for curve in curves if curve])
        if not len(epochs):
            continue
        how = line_style(index)
        axes.fill_between(
            epochs, np.nanmin(values, 0), np.nanmax(values, 0), color=how["color"], alpha=0.15, linewidth=0
        )
        axes.plot(epochs, np.nanmean(values, 0), linewidth=1.3, **how)


def _epoch_axis(axes: Axes, epochs: float) -> None:
    axes.set_xlim(0, epochs)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))


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
