"""The shared look of the figures: sizes in device pixels, fonts, colours, ticks; nothing global stays changed."""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure

from attnlens.circuits import Fold, Kind
from attnlens.figure_styles import SCREEN_DPI, Style, chosen, use
from attnlens.figure_styles import current as current_style
from attnlens.printable import printable

DPI = SCREEN_DPI
"""Device pixels an inch that every figure is laid out for."""

current = current_style
INK, FAINT, RULE = "#222222", "#666666", "#b5b5b5"

# Okabe & Ito's palette (https://jfly.uni-koeln.de/color/), which stays distinct under the common colour blindnesses.
FOLD_COLOURS: Mapping[Fold, str] = {
    "raw": "#0072B2",
    "effective": "#D55E00",
    "centred": "#009E73",
    "balanced": "#CC79A7",
}
# Where two folds coincide, the broken line is drawn over the solid one.
FOLD_LINES: Mapping[Fold, Literal["-", "--", ":", "-."]] = {
    "raw": "--",
    "effective": "-",
    "centred": ":",
    "balanced": "-.",
}
FOLD_MARKERS: Mapping[Fold, str] = {"raw": "o", "effective": "^", "centred": "s", "balanced": "D"}
CIRCUIT_WORDS: Mapping[Kind, str] = {"qk": "W_QK = W_Q W_Kᵀ", "ov": "W_OV = W_V W_O"}

_RC: Any = {
    "font.size": 8.0,
    "text.usetex": False,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.facecolor": "white",
    "axes.grid": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": False,
    "figure.autolayout": False,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "image.composite_image": False,
    "path.simplify": True,
    "savefig.facecolor": "auto",
    "savefig.transparent": False,
    "savefig.bbox": None,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "attnlens",  # identifiers that do not change from run to run
    "pdf.fonttype": 42,
    "pdf.compression": 6,
}


PAPER_POINTS = 8.0
"""Size of all text of a paper's figure."""
_PAPER: Any = {
    **dict.fromkeys(
        [
            *("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"),
            *("legend.fontsize", "legend.title_fontsize", "figure.titlesize"),
        ],
        PAPER_POINTS,
    ),
    "axes.titlepad": 3.0,
    "axes.labelpad": 2.0,
    "xtick.major.pad": 2.0,
    "ytick.major.pad": 2.0,
    "figure.dpi": DPI,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.02,
    "figure.constrained_layout.hspace": 0.02,
    "figure.constrained_layout.wspace": 0.03,
    "legend.borderpad": 0.0,
    "legend.handlelength": 2.0,
    "legend.columnspacing": 1.2,
    "legend.labelspacing": 0.3,
}


def rc_settings() -> Any:
    """Return the current style's rc settings; the font's family stays the caller's."""
    here = current()
    return {**_RC, **_PAPER, "figure.figsize": (here.width, 0.7 * here.width)} if here.paper else _RC


@contextmanager
def figure_style(
    style: str | None = None,
    width: str | float | None = None,
    format: str | None = None,  # noqa: A002  (the word savefig uses)
    dpi: float | None = None,
) -> Iterator[Style]:
    """Draw and write every figure made within in this style, and give matplotlib its settings there.

    ``paper`` leaves out titles and prose, sets all text in 8 points and tells lines and signs apart in grayscale too;
    ``width`` is ``column`` (3.25 inches), ``page`` (6.75) or inches. ``default`` says on each figure what it shows.
    ``format`` (png, pdf, svg) and ``dpi`` (by default 150, of a paper 600) are those `save_figures` writes. Figures of
    pyplot made within have the settings too: axes of theirs can be handed to ``figure(name, ax=...)``. Raises
    `UsageError` for another style, width or format.
    """
    with use(chosen(style, width, format, dpi)) as settled, mpl.rc_context(rc_settings()):
        yield settled


@contextmanager
def look() -> Iterator[None]:
    """Hold the figures' rc settings while drawing or saving, and put the caller's back afterwards.

    Drawing into a caller's axes leaves the caller's settings as they are.
    """
    with boxes(), mpl.rc_context(None if current().given else rc_settings()):
        yield


@contextmanager
def boxes() -> Iterator[None]:
    """Draw the font's box for a letter it has not got, without matplotlib's warning of each, which shows it raw."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ |Matplotlib currently does not support", UserWarning)
        yield


def signed_colours(bad: str) -> Colormap:
    """Return the colours of values of both signs, ``bad`` where there is none.

    Blue, white and red. In a paper dark blue, grey and light yellow, lighter the larger the value, so that signs differ
    in grayscale too; white where there is none.
    """
    name, bad = ("cividis", "white") if current().paper else ("RdBu_r", bad)
    return mpl.colormaps[name].with_extremes(bad=bad)


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of ``width x height`` device pixels at `DPI`, on its own Agg canvas."""
    figure = Figure(figsize=(math.ceil(width) / DPI, math.ceil(height) / DPI), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Place axes by whole device pixels from the figure's top left corner, so that an image's pixels meet them."""
    total_width, total_height = (size * DPI for size in figure.get_size_inches())
    left, bottom = round(left), round(total_height) - round(top) - round(height)
    width, height = round(width), round(height)
    return figure.add_axes((left / total_width, bottom / total_height, width / total_width, height / total_height))


def add_text(figure: Figure, left: float, top: float, text: str, points: float, **how: Any) -> None:
    """Write literal text (no mathtext) whose top left corner is given in device pixels from the figure's."""
    if not text:
        return
    total_width, total_height = (size * DPI for size in figure.get_size_inches())
    settings = {"va": "top", "ha": "left", "parse_math": False, "linespacing": 1.3, **how}
    figure.text(left / total_width, 1 - top / total_height, text, fontsize=points, **settings)


class Heading:
    """Lines of text over a figure, gathered first so that the figure can be made tall enough for them."""

    def __init__(self, width: float, unit: float = 1.0) -> None:
        self.width, self.unit, self.height = width, unit, 14 * unit
        self.lines: list[tuple[float, str, float, dict[str, Any]]] = []

    def add(self, text: str, points: float, **how: Any) -> None:
        """Add a paragraph of ``points * unit``, broken to the figure's width."""
        points *= self.unit
        text = wrapped(text, self.width - 40 * self.unit, points)
        self.lines.append((self.height, text, points, how))
        self.height += text_height(text, points) + 4 * self.unit

    def write(self, figure: Figure) -> None:
        """Write the lines into the figure."""
        for top, text, points, how in self.lines:
            add_text(figure, 20 * self.unit, top, text, points, **how)


def pixels(points: float) -> float:
    """Convert typographic points to device pixels at `DPI`."""
    return points * DPI / 72


def wrapped(text: str, width: float, points: float) -> str:
    """Break `printable` text into lines that fit ``width`` device pixels, by the mean width of a letter of DejaVu Sans.

    Where the last line would hold a word or two, all lines are made shorter instead. No line break of the text's own
    is left: the name of a file makes no line.
    """
    text, letters = printable(text), max(20, int(width / pixels(0.57 * points)))
    lines = textwrap.wrap(text, letters)
    if len(lines) > 1 and len(lines[-1]) < 0.3 * letters:
        narrower = (textwrap.wrap(text, fewer) for fewer in range(letters, letters // 2, -1))
        lines = next((wrapped for wrapped in narrower if len(wrapped[-1]) >= 0.6 * len(wrapped[0])), lines)
    return "\n".join(lines)


def text_height(text: str, points: float) -> float:
    """Return the device pixels that lines of ``points`` take."""
    return pixels(1.3 * points) * len(text.splitlines())


def number(value: float) -> str:
    """Write a tick's value with a true minus sign."""
    return f"{value:g}".replace("-", "\N{MINUS SIGN}")


def label_step(positions: Sequence[float], room: float) -> int:
    """Return the step n of 1, 2, 5, 10, ... at which every n-th label keeps ``room`` to the next one."""
    if len(positions) < 2:
        return 1
    pitch = min(abs(b - a) for a, b in pairwise(positions))
    wanted = room / max(pitch, 1e-9)
    return next(step for power in range(9) for step in (10**power, 2 * 10**power, 5 * 10**power) if step >= wanted)


def fold_words(fold: Fold, circuits: Sequence[Kind]) -> str:
    """Say what a fold does to these circuits."""
    if fold == "raw":
        return "raw weights"
    folded = [
        "norm gain",
        *(["any LayerScale"] if "ov" in circuits else []),
        *(["centring"] if fold == "centred" else []),
    ]
    if fold == "balanced":
        return f"balanced ({', '.join(folded)} folded in, one gain a row and a column divided out)"
    return f"{fold} ({', '.join(folded[:-1])}{' and ' if folded[1:] else ''}{folded[-1]} folded in)"


def message_figure(model: str, message: str, ax: Any = None) -> Figure:
    """Draw a figure that says why there is nothing to draw, or say it in the first of the axes given."""
    if ax is not None:
        axes: Axes = (
            ax if isinstance(ax, Axes) else next(iter(ax.values() if isinstance(ax, Mapping) else np.ravel(ax)))
        )
        how: Any = {"ha": "center", "va": "center", "transform": axes.transAxes, "parse_math": False}
        axes.text(0.5, 0.5, printable(message), wrap=True, **how)
        axes.set_axis_off()
        figure = axes.get_figure(root=True)
        assert isinstance(figure, Figure)
        return figure
    paper = current().paper
    total = current().width * DPI if paper else 760
    heading = Heading(total)
    if not paper:
        heading.add(model, 10, weight="bold")
    heading.add(message, PAPER_POINTS if paper else 8.5)
    figure = new_figure(total, heading.height + 20)
    heading.write(figure)
    return figure


# Okabe & Ito's palette; patterns and marks of other numbers, so that no two of the first 35 lines share both.
COLOURS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)), (0, (7, 1.5, 3, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def line_style(index: int) -> dict[str, Any]:
    """Return colour, dash and mark of the arm at ``index``: any two of some dozen lines differ in dash or mark."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 3.5,
        "markeredgewidth": 0,
    }
