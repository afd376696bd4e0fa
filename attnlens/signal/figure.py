"""The figure of signal propagation: how alike tokens become by depth, and how far their kernel is from theory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from attnlens.figures import style
from attnlens.figures.style import line_style
from attnlens.heads import Array
from attnlens.signal.propagation import Propagation
from attnlens.signal.rewire import with_or_without
from attnlens.words import counted

WIDTH = 1050
_THEORY: Any = {"color": style.INK, "linewidth": 0.9, "linestyle": (0, (1.2, 1.6))}
"""Of theory's lines, dotted over the measured ones."""


def draw_signal(propagation: Propagation) -> Figure:
    """Draw mean cosine of tokens and relative kernel error against depth: mean and range over seeds, dotted theory."""
    with style.look():
        heading = style.Heading(WIDTH)
        heading.add(f"{propagation.model}: signal propagation at the start", 10, weight="bold")
        heading.add(describe(propagation), 8)
        top = heading.height + 14
        arms = list(propagation.arms)
        figure = style.new_figure(WIDTH, top + 455 + 22 * ((len(arms) + 1) // 5))
        heading.write(figure)
        panels = [style.add_axes(figure, left, top + 20, 415, 320) for left in (75, 595)]
        panels[0].set_title("mean cosine of two tokens", loc="left")
        panels[1].set_title("relative error of the kernel against theory", loc="left")
        columns = ("kernel_error", "theory_error")
        errors = {(arm, name): _without_rounding(propagation.curve(arm, name)) for arm in arms for name in columns}
        looks = _looks(propagation)
        for arm in arms:
            _curve(panels[0], propagation.curve(arm, "cosine"), looks[arm])
            _curve(panels[1], errors[arm, "kernel_error"], looks[arm])
        for arm in arms:  # over all curves
            _theory(panels[0], propagation.curve(arm, "theory_cosine"))
            _theory(panels[1], errors[arm, "theory_error"])
        style.linear_y_axis(panels[0], min(0.0, *(np.nanmin(propagation.curve(arm, "cosine")) for arm in arms)), 1.0)
        _error_axis(panels[1], list(errors.values()))
        for axes in panels:
            axes.set_xlim(0, propagation.depth)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            axes.set_xlabel("block (0: the input)")
        handles = [Line2D([], [], label=arm, **looks[arm]) for arm in arms]
        handles.append(Line2D([], [], label="theory", **_THEORY))
        figure.legend(handles=handles, loc="lower center", ncols=5, columnspacing=1.4)
    return figure


def describe(propagation: Propagation) -> str:
    """Say in a sentence what was measured."""
    parts = f"{with_or_without(propagation.skips)} skips and {with_or_without(propagation.norms)} norms"
    mlp = {"keep": "MLPs as they are", "tailored": "tailored MLPs", "none": "no MLPs"}[propagation.mlp]
    which = "causal" if propagation.causal else "bidirectional"
    return (
        f"{counted(propagation.depth, 'block')} {parts}, {mlp}; width {propagation.embed_dim}, "
        f"{propagation.tokens} random tokens, {which}. "
        f"Mean over {counted(propagation.seeds, 'seed')} of {counted(propagation.sequences, 'sequence')}"
        f"{', band from least to largest seed' if propagation.seeds > 1 else ''}."
    )


def _looks(propagation: Propagation) -> dict[str, Any]:
    """Return each arm's line: thinner than the one before it, and broken where it lies on an earlier one."""
    looks: dict[str, Any] = {}
    curves: list[Array] = []
    for index, arm in enumerate(propagation.arms):
        curve = propagation.curve(arm, "cosine").mean(0)
        hides = any(np.abs(curve - other).max() < 5e-3 for other in curves)
        looks[arm] = {
            **line_style(index),
            "linewidth": max(1.2, 3.0 - 0.4 * index),
            "linestyle": (0, (3, 3)) if hides else "-",
        }
        curves.append(curve)
    return looks


def _curve(axes: Axes, values: Array, look: dict[str, Any]) -> None:
    if np.isnan(values).all():
        return
    layers = np.arange(values.shape[1])
    axes.fill_between(layers, values.min(0), values.max(0), color=look["color"], alpha=0.2, linewidth=0)
    axes.plot(layers, values.mean(0), **look)


def _theory(axes: Axes, values: Array) -> None:
    if not np.isnan(values).all():
        axes.plot(np.arange(values.shape[1]), values[0], **_THEORY)


def _without_rounding(values: Array) -> Array:
    """Leave errors of rounding out: where all tokens are one, in theory and in the network."""
    return np.where(values > 1e-9, values, np.nan)


def _error_axis(axes: Axes, curves: Sequence[Array]) -> None:
    known = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    if known.size:
        style.log_y_axis(axes, float(known.min()), float(known.max()))
        return
    axes.text(0.5, 0.5, "no arm has a theory here", ha="center", va="center", transform=axes.transAxes)
    axes.set_yticks([])
