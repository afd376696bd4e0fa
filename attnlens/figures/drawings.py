"""Figures by name: one drawn into a caller's axes, or all, in a style said here or in the current one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from matplotlib.figure import Figure

from attnlens.errors import UsageError
from attnlens.figure_styles import chosen, use
from attnlens.figures import style
from attnlens.figures.panels import Given


class Drawing(Protocol):
    """Draws one figure in the current style."""

    def __call__(self, *, ax: Given | None = None) -> Figure:
        """Draw into the caller's axes, or into a figure of its own."""
        ...


def draw_all(
    drawings: Mapping[str, Drawing], figure_style: str | None = None, width: str | float | None = None
) -> dict[str, Figure]:
    """Draw every figure, in the order of their names' mapping."""
    with use(chosen(figure_style, width)), style.look():
        return {name: draw() for name, draw in drawings.items()}


def draw_one(
    drawings: Mapping[str, Drawing],
    name: str,
    ax: Given | None = None,
    figure_style: str | None = None,
    width: str | float | None = None,
) -> Figure:
    """Draw one figure by its name. Raises `UsageError` where there is none of the name, or ``ax`` does not suit it."""
    if name not in drawings:
        raise UsageError(f"figure {name!r} is not known: choose {', '.join(drawings)}")
    with use(chosen(figure_style, width, given=ax is not None)), style.look():
        return drawings[name](ax=ax)
