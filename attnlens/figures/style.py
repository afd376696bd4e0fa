"""The shared look of the figures: sizes in device pixels, fonts, colours, ticks; nothing global stays changed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from attnlens.circuits import Fold, Kind
from attnlens.heads import Array

DPI = 150
"""Device pixels an inch that every figure is laid out for."""

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


@contextmanager
def look() -> Iterator[None]:
    """Hold the figures' rc settings while drawing or saving, and put the caller's back afterwards."""
    with mpl.rc_context(_RC):
        yield


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
    """Break text into lines that fit ``width`` device pixels, by the mean width of a letter of DejaVu Sans.

    Where the last line would hold a word or two, all lines are made shorter instead.
    """
    letters = max(20, int(width / pixels(0.57 * points)))
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


def message_figure(model: str, message: str) -> Figure:
    """Draw a figure that says why there is nothing to draw."""
    heading = Heading(760)
    heading.add(model, 10, weight="bold")
    heading.add(message, 8.5)
    figure = new_figure(760, heading.height + 20)
    heading.write(figure)
    return figure


def layer_ticks(layers: Sequence[int], length: float, room: float) -> list[int]:
    """Return layer indices for an axis of ``length`` device pixels: each if ``room`` allows, else round steps."""
    per_layer = length / max(1, layers[-1] - layers[0] + 1)
    step = label_step([0, per_layer], room)
    return [layer for layer in layers if (layer - layers[0]) % step == 0]


def layer_axis(axes: Axes, layers: Sequence[int], length: float, labelled: bool) -> None:
    """Make x the layer index, with integer ticks where it is labelled."""
    margin = max(0.6, 0.02 * (layers[-1] - layers[0]))
    axes.set_xlim(layers[0] - margin, layers[-1] + margin)
    if not labelled:
        axes.set_xticks([])
        return
    ticks = layer_ticks(layers, length, 30)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("layer")


def log_y_axis(axes: Axes, low: float, high: float) -> None:
    """Make y logarithmic around [low, high], its ticks labelled in plain numbers."""
    spread = max(high / low, 1.5) ** 0.06
    low, high = low / spread, high * spread
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    _y_ticks(axes, log_ticks(low, high))


def arcsinh_y_axis(axes: Axes, values: Array, linear_width: float) -> None:
    """Make y linear within ``+-linear_width`` and logarithmic beyond, around ``values`` and 0."""
    low, high, width = _arcsinh_range(values, linear_width)
    axes.set_yscale("asinh", linear_width=width)
    axes.set_ylim(low, high)
    _y_ticks(axes, arcsinh_ticks(low, high, width))


def arcsinh_x_axis(axes: Axes, values: Array, linear_width: float) -> None:
    """Make x what `arcsinh_y_axis` makes y."""
    low, high, width = _arcsinh_range(values, linear_width)
    axes.set_xscale("asinh", linear_width=width)
    axes.set_xlim(low, high)
    ticks = arcsinh_ticks(low, high, width, apart=0.42)  # labels are wider than high
    axes.set_xticks(ticks, [number(tick) for tick in ticks])
    axes.minorticks_off()


def _arcsinh_range(values: Array, linear_width: float) -> tuple[float, float, float]:
    """Return both ends of an axis around ``values`` and 0, and a linear width it can be drawn with."""
    limit = float(np.abs(values).max(initial=0.0)) or 1.0
    width = min(max(linear_width, 1e-3 * limit), limit)
    places = np.arcsinh([min(values.min(), 0.0) / width, max(values.max(), 0.0) / width])
    margin = 0.07 * (places[1] - places[0] or 1.0)
    low, high = (float(end) for end in np.sinh([places[0] - margin, places[1] + margin]) * width)
    return low, high, width


def linear_y_axis(axes: Axes, low: float, high: float) -> None:
    """Make y linear around [low, high], its ticks labelled in plain numbers."""
    margin = 0.06 * (high - low)
    axes.set_ylim(low - margin, high + margin)
    _y_ticks(axes, [tick for tick in _even_ticks(low, high) if low - margin <= tick <= high + margin])


def _y_ticks(axes: Axes, ticks: Sequence[float]) -> None:
    axes.set_yticks(ticks, [number(tick) for tick in ticks])
    axes.minorticks_off()


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten in [low, high]; in 1-2-5 steps where those are few, evenly spaced where these are."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = last - first
    stride = 1 if decades <= 7 else math.ceil(decades / 6)
    for powers, steps in ((range(first, last + 1, stride), (1,)), (range(first, last + 1), (1, 2, 5))):
        ticks = [step * 10.0**power for power in powers for step in steps]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 3:
            return ticks
    return [tick for tick in _even_ticks(low, high) if low <= tick <= high]


def arcsinh_ticks(low: float, high: float, width: float, apart: float = 0.2) -> list[float]:
    """Return 0 and round numbers in [low, high], far enough apart on an arcsinh scale for their labels."""
    limit = max(-low, high)
    ticks: list[float] = []
    previous = 2.0
    power = math.floor(math.log10(limit))
    for tick in (step * 10.0**p for p in range(power, power - 9, -1) for step in (5, 2, 1)):
        here = math.asinh(tick / width) / math.asinh(limit / width)
        if apart <= here <= 1 and previous - here >= apart:
            ticks.append(tick)
            previous = here
    return [tick for tick in (*(-tick for tick in ticks), 0.0, *reversed(ticks)) if low <= tick <= high]


def _even_ticks(low: float, high: float) -> list[float]:
    """Return the shortest of 1-2-5 steps that gives at most seven ticks."""
    step = next(
        step * 10.0**power
        for power in range(math.floor(math.log10(high - low)) - 1, 400)
        for step in (1, 2, 5)
        if (high - low) / (step * 10.0**power) <= 6
    )
    return [float(f"{multiple * step:.12g}") for multiple in range(math.floor(low / step), math.ceil(high / step) + 1)]


# Okabe & Ito's palette; beyond seven arms the line's pattern tells them apart.
COLOURS = ("#222222", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", ":")


def line_style(index: int) -> dict[str, Any]:
    """Return the colour and dash of the arm at ``index``."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}
