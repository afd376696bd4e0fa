"""The ladder's figure: what every rung adds to the one above it in the figure, drawn from default to pre-trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from attnlens.figures import style
from attnlens.figures.panels import Given, Place, open_panels
from attnlens.training.ladder import Step
from attnlens.training.metrics import Metric
from attnlens.training.results import Summary
from attnlens.training.statistics import LEVEL, Mean
from attnlens.words import counted

_ROW = 30
_GAIN, _LOSS = "#0072B2", "#D55E00"
_ALPHA = 1 - LEVEL


def draw_waterfall(summary: Summary, ladder: Sequence[Step], *, ax: Given | None = None) -> Figure:
    """Draw each rung as a bar from the mean of the rung before it to its own, with the interval of the step.

    Beside it stand the step and what is left to the last rung; in a column of a paper the step alone. Bars that go back
    are hatched.
    """
    metric, config = summary.config.metric, summary.config
    start = Mean.of(list(summary.finished[ladder[0].below].values()))
    told = (
        f"{metric.title}, {counted(ladder[0].step.difference.n, 'seed')}; bars: step over the rung above; whiskers: "
        f"{LEVEL:.0%} interval of the step; hatched: {metric.worse} than the rung above"
    )
    narrow = style.current().paper and style.current().width < 5
    points = style.PAPER_POINTS if style.current().paper else 7.5
    beside = [
        (-1.0, f"step, {metric.unit}", "" if narrow else "left"),
        (0.0, f"from {metric.value(start.mean)}", ""),
        *(
            (float(row), _told(step, metric, short=narrow), "" if narrow else _unsigned(step.left.mean, metric))
            for row, step in enumerate(ladder, 1)
        ),
    ]
    longest = max(len(step) for _, step, _ in beside) + max(len(left) for *_, left in beside)
    ends = 5 + 0.63 * points * longest + 8  # points, of what is written beside the axes
    rows = len(ladder) + 1
    with style.look():
        panels = open_panels(
            [["waterfall"]],
            Place(
                185,
                330,
                _ROW * rows,
                above=46,
                below=62,
                right=style.pixels(ends) + 12,
                shape=0.04 * rows,
                lowest=0.17 * rows,
                least=0,
            ),
            [(f"{config.dataset}: what each step of the ladder adds", 9.5), (told, 7.5)],
            notes=_notes(ladder),
            ax=ax,
        )
        for axes in panels.axes.values():
            _draw_bars(axes, start, ladder, metric)
            for row, step, left in beside:
                for text, across, side in ((step, 5.0, "left"), (left, ends, "right")):
                    _write_beside(axes, row, text, across, ha=side, size=points, weight="bold" if row < 0 else "normal")
        return panels.finish()


def _write_beside(axes: Axes, row: float, text: str, across: float, **how: Any) -> None:
    """Write a text so many points to the right of the axes, at a row's height."""
    where: Any = {"xytext": (across, 0), "textcoords": "offset points", "annotation_clip": False, "va": "center"}
    axes.annotate(text, (1, row), xycoords=axes.get_yaxis_transform(), **where, **how)


def _draw_bars(axes: Axes, start: Mean, ladder: Sequence[Step], metric: Metric) -> None:
    scale = metric.scale
    names = [ladder[0].below, *(f"{step.arm}{'' if step.nested else '†'}" for step in ladder)]
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3 if style.current().paper else 6, min_n_ticks=3))
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


def _told(step: Step, metric: Metric, *, short: bool) -> str:
    pairs, show = step.step.difference, metric.difference
    mark = "*" if step.step.t_holm < _ALPHA else ""
    text = (
        show(pairs.mean)
        if short or math.isinf(pairs.low)
        else f"{show(pairs.mean)} [{show(pairs.low)}, {show(pairs.high)}]"
    )
    return f"{text}{mark}".replace("-", "\N{MINUS SIGN}")


def _unsigned(value: float, metric: Metric) -> str:
    return metric.difference(value).removeprefix("+").replace("-", "\N{MINUS SIGN}")


def _notes(ladder: Sequence[Step]) -> str:
    other = "† keeps other things of the source than the rung above it, not more. "
    return (
        f"{'' if all(step.nested for step in ladder) else other}* Holm-corrected p < {_ALPHA:.2g} over all declared "
        f"contrasts. left: {ladder[-1].arm} minus the rung; dotted: {ladder[-1].arm}."
    )
