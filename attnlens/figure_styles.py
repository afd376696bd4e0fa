"""The style that figures are drawn and written in: chosen here, without matplotlib, and held for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from attnlens.errors import UsageError
from attnlens.vocabulary import FIGURE_FORMAT, FIGURE_STYLE, FIGURE_WIDTH

WIDTHS = {"column": 3.25, "page": 6.75}
"""Inches of a column and of both columns of a paper of two."""
SCREEN_DPI, PAPER_DPI = 150, 600
"""Dots an inch of png, where none are said"""


@dataclass(frozen=True)
class Style:
    """How figures are drawn and written: for a screen with what they show said on them, or for a paper."""

    paper: bool = False
    width: float = WIDTHS["column"]
    """Inches, of a paper's figure"""
    format: str = "png"
    dpi: float = SCREEN_DPI
    given: bool = False
    """Whether what is drawn goes into a caller's axes, whose settings are left alone"""


_SCREEN = Style()
_current: ContextVar[Style] = ContextVar("style", default=_SCREEN)


def current() -> Style:
    """Return the style that figures are drawn in here."""
    return _current.get()


def chosen(
    style: str | None = None,
    width: str | float | None = None,
    format: str | None = None,  # noqa: A002  (the word savefig uses)
    dpi: float | None = None,
    *,
    given: bool = False,
) -> Style:
    """Return a style by its words; what is left out is as in the current one. Raises `UsageError` for other words."""
    before = current()
    paper = before.paper if style is None else FIGURE_STYLE(style) == "paper"
    if width is not None and not paper:
        raise UsageError("a width is of a paper's figures: choose the style paper too, or leave the width out")
    usual = before.dpi if paper == before.paper else PAPER_DPI if paper else SCREEN_DPI
    return Style(
        paper=paper,
        width=before.width if width is None else _inches(width),
        format=before.format if format is None else FIGURE_FORMAT(format),
        dpi=usual if dpi is None else dpi,
        given=given,
    )


def _inches(width: str | float) -> float:
    try:
        inches = float(width)
    except ValueError:
        return WIDTHS[FIGURE_WIDTH(width)]
    if not 1 <= inches <= 40:
        raise UsageError(f"a figure {inches:g} inches wide cannot be laid out: choose column, page, or 1 to 40 inches")
    return inches


def settle(style: Style) -> None:
    """Make a style the current one, until the `use` around this ends."""
    _current.set(style)


@contextmanager
def use(style: Style) -> Iterator[Style]:
    """Hold a style as the current one."""
    token = _current.set(style)
    try:
        yield style
    finally:
        _current.reset(token)
