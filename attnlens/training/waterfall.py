"""The ladder's figure: what every rung adds to the one above it in the figure, drawn from default to pre-trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlens.figures import style
from attnlens.training.ladder import Step
from attnlens.training.metrics import Metric
from attnlens.training.results import Summary
from attnlens.training.statistics import LEVEL, Mean
from attnlens.words import counted

WIDTH = 608
"""Device pixels: a column of a paper, at the size its text is read at."""
_ROW, _LEFT, _PLOT = 30, 174, 196
_GAIN, _LOSS = "#0072B2", "#D55E00"
_ALPHA = 1 - LEVEL


def draw_waterfall(summary: Summary, ladder: Sequence[Step]) -> Figure:
    """Draw each rung as a bar from the mean of the rung before it to its own, with the interval of the step.

    Beside it stand the step and what is left to the last rung. Bars that go back are hatched.
    """
    metric, config = summary.config.metric, summary.config
    start = Mean.of(list(summary.finished[ladder[0].below].values()))
    with style.look():
        heading = style.Heading(WIDTH)
        heading.add(f"{config.dataset}: what each step of the ladder adds", 9.5, weight="bold")
        heading.add(
            f"{metric.title}, {counted(ladder[0].step.difference.n, 'seed')}; bars: step over the rung above; "
            f"whiskers: {LEVEL:.0%} interval of the step; hatched: {metric.worse} than the rung above",
            7.5,
        )
        notes = style.wrapped(_notes(ladder), WIDTH - 40, 7)
        rows = len(ladder) + 1
        top = heading.height + 24
        figure = style.new_figure(WIDTH, top + _ROW * rows + 72 + style.text_height(notes, 7))
        heading.write(figure)
        axes = style.add_axes(figure, _LEFT, top, _PLOT, _ROW * rows)
        _draw_bars(axes, start, ladder, metric)
        style.add_text(figure, _LEFT + _PLOT + 10, top - 20, f"step, {metric.unit}", 7.5, weight="bold")
        style.add_text(figure, WIDTH - 12, top - 20, "left", 7.5, weight="bold", ha="right")
        style.add_text(figure, _LEFT + _PLOT + 10, top + 7, f"starts at {metric.value(start.mean)}", 7.5)
        for row, step in enumerate(ladder, 1):
            place = top + _ROW * row + 7
            style.add_text(figure, _LEFT + _PLOT + 10, place, _told(step, metric), 7.5)
            style.add_text(figure, WIDTH - 12, place, _unsigned(step.left.mean, metric), 7.5, ha="right")
        style.add_text(figure, 20, top + _ROW * rows + 60, notes, 7)
    return figure


def _draw_bars(axes: Axes, start: Mean, ladder: Sequence[Step], metric: Metric) -> None:
    scale = metric.scale
    names = [ladder[0].below, *(f"{step.arm}{'' if step.nested else '†'}" for step in ladder)]
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    before = start.mean
    axes.plot([scale * before], [0], marker="D", markersize=4, color=style.INK, zorder=3)
    for row, step in enumerate(ladder, 1):
        pairs, better = step.step.difference, metric.favours(step.step.difference.mean)
        how: Any = {"facecolor": _GAIN} if better else {"facecolor": "white", "edgecolor": _LOSS, "hatch": "//////"}
        axes.barh(row, scale * pairs.mean, left=scale * before, height=0.56, linewidth=0.8, zorder=2, **how)
        axes.plot([scale * before] * 2, [row - 1, row], color=style.RULE, linewidth=0.7, zorder=1)
        if math.isfinite(pairs.low):
            whisker = [scale * (before + pairs.low), scale * (before + pairs.high)]
            axes.plot(whisker, [row, row], color=style.INK, linewidth=1.0, marker="|", markersize=5, zorder=3)
        before += pairs.mean
    axes.axvline(scale * before, color=style.FAINT, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
    axes.set_xlabel(f"{metric.title}, %" if metric.share else metric.title)
    axes.margins(x=0.06)


def _told(step: Step, metric: Metric) -> str:
    pairs, show = step.step.difference, metric.difference
    mark = "*" if step.step.t_holm < _ALPHA else ""
    text = show(pairs.mean) if math.isinf(pairs.low) else f"{show(pairs.mean)} [{show(pairs.low)}, {show(pairs.high)}]"
    return f"{text}{mark}".replace("-", "\N{MINUS SIGN}")


def _unsigned(value: float, metric: Metric) -> str:
    return metric.difference(value).removeprefix("+").replace("-", "\N{MINUS SIGN}")


def _notes(ladder: Sequence[Step]) -> str:
    other = "† keeps other things of the source than the rung above it, not more. "
    return (
        f"{'' if all(step.nested for step in ladder) else other}* Holm-corrected p < {_ALPHA:.2g} over all declared "
        f"contrasts. left: {ladder[-1].arm} minus the rung; dotted: {ladder[-1].arm}."
    )
