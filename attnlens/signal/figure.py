"""The figure of signal propagation: how alike tokens become by depth, and how far their kernel is from theory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from attnlens.figures import scales, style
from attnlens.figures.panels import Given, Place, open_panels
from attnlens.figures.style import line_style
from attnlens.heads import Array

_THEORY: Any = {"color": style.INK, "linewidth": 0.9, "linestyle": (0, (1.2, 1.6))}
"""Of theory's lines, dotted over the measured ones."""
TITLES = {"cosine": "mean cosine of two tokens", "error": "relative error of the kernel against theory (log scale)"}
PAPER_TITLES = {"cosine": "token cosine", "error": "kernel error (log)"}


class Measured(Protocol):
    """What the figure takes of a `Propagation`."""

    @property
    def model(self) -> str:
        """Name of the model."""
        ...

    @property
    def depth(self) -> int:
        """Number of blocks."""
        ...

    @property
    def seeds(self) -> int:
        """Number of networks an arm."""
        ...

    @property
    def arms(self) -> Mapping[str, Any]:
        """Arms by name."""
        ...

    def curve(self, arm: str, column: str) -> Array:
        """Return a column by seed and layer."""
        ...

    def described(self) -> str:
        """Say in a sentence what was measured."""
        ...


def draw_signal(propagation: Measured, *, ax: Given | None = None) -> Figure:
    """Draw mean cosine of tokens and relative kernel error against depth: mean and range over seeds, dotted theory.

    Panels: ``cosine``; and ``error``, unless no arm has a theory here.
    """
    with style.look():
        arms, looks = list(propagation.arms), _looks(propagation)
        errors = {
            (arm, name): _without_rounding(propagation.curve(arm, name))
            for arm in arms
            for name in ("kernel_error", "theory_error")
        }
        has_error = any(np.isfinite(values).any() for values in errors.values())
        has_theory = has_error or any(np.isfinite(propagation.curve(arm, "theory_cosine")).any() for arm in arms)
        told = [propagation.described()]
        if propagation.seeds > 1:
            told.append("Band: from least to largest seed.")
        if not has_error:
            told.append("No arm has a theory of its kernel here.")
        legend = [(Line2D([], [], **looks[arm]), arm) for arm in arms]
        panels = open_panels(
            [["cosine", "error"] if has_error else ["cosine"]],
            Place(75, 430 if has_error else 720, 320, gap=85, above=38, right=35, shape=0.8 if has_error else 0.62),
            [
                (f"{propagation.model}: signal propagation at the start", 10),
                (" ".join(told), 8),
            ],
            legend=[*legend, *([(Line2D([], [], **_THEORY), "theory")] if has_theory else [])],
            ax=ax,
        )
        titles = PAPER_TITLES if style.current().paper else TITLES
        for name, axes in panels.axes.items():
            measured, expected = ("cosine", "theory_cosine") if name == "cosine" else ("kernel_error", "theory_error")
            curves = {
                (arm, of): propagation.curve(arm, of) if name == "cosine" else errors[arm, of]
                for arm in arms
                for of in (measured, expected)
            }
            for arm in arms:
                _curve(axes, curves[arm, measured], looks[arm])
            for arm in arms:  # over all curves
                _theory(axes, curves[arm, expected])
            known = np.concatenate([values[np.isfinite(values)] for values in curves.values()])
            if name == "error":
                scales.log_y_axis(axes, float(known.min()), float(known.max()))
            else:
                scales.linear_y_axis(axes, min(0.0, float(known.min())), max(float(known.max()), 0.1))
            axes.set_xlim(0, propagation.depth)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if style.current().paper else 8))
            axes.set_xlabel("block" if style.current().paper else "block (0: the input)")
            if panels.given:
                axes.set_ylabel(titles[name])
            panels.title(name, titles[name])
        return panels.finish()


def _looks(propagation: Measured) -> dict[str, Any]:
    """Return each arm's line: thinner than the one before it, which it may lie on; marks stand apart from others'."""
    arms = list(propagation.arms)
    return {
        arm: {
            **line_style(index),
            "linewidth": max(1.0, 2.2 - 0.2 * index),
            "markevery": (0.25 * index / len(arms), 0.25),
        }
        for index, arm in enumerate(arms)
    }


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
