"""Scales and ticks of axes: round numbers that bracket what is drawn, as many as there is room for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from attnlens.figures.style import DPI, label_step, number
from attnlens.heads import Array

SMALLEST = 1e-280
"""Smallest size that is drawn as another than zero: matplotlib takes limits of an axis below 2.2e-287 for none."""
_SPAN = 1e-300
"""The same as a share of the largest: beyond, the ratio of two sizes leaves float64."""
_ENDS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
"""First digits of the outermost ticks of scales that are not linear."""
_ROOM = {"x": 0.16, "y": 0.085}
"""Share of an axis' length that a label takes at least, in a panel of the usual size."""
_LABEL = {"x": 42.0, "y": 21.0}
"""Device pixels at `style.DPI` that a label takes of a smaller panel."""


def length(axes: Axes, which: str = "x") -> float:
    """Return the width or height of axes in device pixels at `style.DPI`."""
    box = axes.get_window_extent()
    return float((box.width if which == "x" else box.height) * DPI / axes.figure.dpi)


def _apart(axes: Axes, which: str) -> float:
    return max(_ROOM[which], min(0.45, _LABEL[which] / max(length(axes, which), 1.0)))


def drawable(values: Array) -> Array:
    """Return values with 0 for those too small to be drawn: below `SMALLEST`, or nothing beside the largest."""
    sizes = np.abs(values)
    least = max(SMALLEST, _SPAN * float(sizes.max(initial=0.0, where=np.isfinite(sizes))))
    return np.where(sizes < least, 0.0, values)


def layer_ticks(layers: Sequence[int], length: float, room: float) -> list[int]:
    """Return layer indices for an axis of ``length`` device pixels: each if ``room`` allows, else round steps."""
    per_layer = length / max(1, layers[-1] - layers[0] + 1)
    step = label_step([0, per_layer], room)
    return [layer for layer in layers if (layer - layers[0]) % step == 0]


def layer_axis(axes: Axes, layers: Sequence[int], labelled: bool) -> None:
    """Make x the layer index, with integer ticks where it is labelled."""
    margin = max(0.6, 0.02 * (layers[-1] - layers[0]))
    axes.set_xlim(layers[0] - margin, layers[-1] + margin)
    if not labelled:
        axes.set_xticks([])
        return
    ticks = layer_ticks(layers, length(axes), 30)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlabel("layer")


def log_y_axis(axes: Axes, low: float, high: float, room: str = "y") -> None:
    """Make y logarithmic, its ticks round numbers from below ``low`` to above ``high``, with ``room`` of their axis."""
    ticks = log_ticks(low, high, _apart(axes, room))
    spread = (ticks[-1] / ticks[0]) ** 0.03
    axes.set_yscale("log")
    axes.set_ylim(ticks[0] / spread, ticks[-1] * spread)
    _set(axes, "y", ticks)


def arcsinh_axis(axes: Axes, values: Array, linear_width: float, which: str = "y", room: str = "") -> None:
    """Make y or x linear within ``+-linear_width`` and logarithmic beyond, around ``values`` and 0.

    Its ticks have the room of its own labels, or of those of another axis.
    """
    limit = float(np.abs(values).max(initial=0.0)) or 1.0
    width = min(max(linear_width, 1e-3 * limit), limit)
    ticks = arcsinh_ticks(
        float(values.min(initial=0.0)), float(values.max(initial=0.0)), width, _apart(axes, room or which)
    )
    ends = np.arcsinh([min(ticks[0], values.min()) / width, max(ticks[-1], values.max()) / width])
    margin = 0.03 * (ends[1] - ends[0] or 1.0)
    low, high = (float(end) for end in np.sinh([ends[0] - margin, ends[1] + margin]) * width)
    (axes.set_yscale if which == "y" else axes.set_xscale)("asinh", linear_width=width)
    (axes.set_ylim if which == "y" else axes.set_xlim)(low, high)
    _set(axes, which, ticks)


def linear_y_axis(axes: Axes, low: float, high: float) -> None:
    """Make y linear, its ticks plain numbers from at most ``low`` to at least ``high``."""
    margin = 0.03 * (high - low)
    most = max(2, min(6, int(1 / _apart(axes, "y"))))
    ticks = even_ticks(low, high, most)
    axes.set_ylim(min(low - margin, ticks[0]), max(high + margin, ticks[-1]))
    _set(axes, "y", ticks)


def _set(axes: Axes, which: str, ticks: Sequence[float]) -> None:
    set_ticks: Any = axes.set_yticks if which == "y" else axes.set_xticks
    set_ticks(ticks, [number(tick) for tick in ticks])
    axes.minorticks_off()


def round_up(size: float) -> float:
    """Return the next larger number of the first digits 1, 2, 3, 4, 5, 6 and 8, or this one."""
    power = math.floor(math.log10(size))
    candidates = (digit * 10.0**p for p in (power, power + 1) for digit in _ENDS)
    return next(_plain(found) for found in candidates if found >= size * (1 - 1e-9))


def _round_down(size: float) -> float:
    power = math.floor(math.log10(size))
    candidates = (digit * 10.0**p for p in (power, power - 1) for digit in reversed(_ENDS))
    return next(_plain(found) for found in candidates if found <= size * (1 + 1e-9))


def log_ticks(low: float, high: float, apart: float = 0.085) -> list[float]:
    """Return round numbers from at most ``low`` to at least ``high``, ``apart`` of the axis from each other.

    Between the ends powers of ten, or 1-2-5 steps where those are few; even steps within less than a factor of 3.
    """
    if high < 3 * low:
        even = even_ticks(low, max(high, 1.05 * low), max(2, min(6, int(1 / apart))), slack=0)
        if even[0] > 0:
            return _spaced_on_log(even[0], even[-1], even, apart)
    ends = _round_down(low), round_up(max(high, 1.05 * low))
    first, last = math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1]))
    stride = math.ceil((last - first) / 6)
    powers = [10.0**power for power in range(first, last + 1, stride)]
    if sum(ends[0] < power < ends[1] for power in powers) < 2:
        powers = [step * 10.0**power for power in range(first, last + 1) for step in (1, 2, 5)]
    return _spaced_on_log(*ends, powers, apart)


def arcsinh_ticks(low: float, high: float, width: float, apart: float = 0.085, exact: bool = False) -> list[float]:
    """Return 0 and round numbers on both sides, from at most ``low`` to at least ``high`` of an arcsinh scale.

    They are ``apart`` of the scale from each other; an end as near to 0 as that has no tick. ``exact``: the outermost
    are ``low`` and ``high`` themselves, as of a scale that is clipped there.
    """
    below, above = abs(min(low, 0.0)), max(high, 0.0)
    if not exact:
        below, above = (round_up(end) if end else 0.0 for end in (below, above))
    reach = math.asinh(below / width) + math.asinh(above / width) or 1.0
    smallest = 1e-9 * max(below, above, width)
    ticks = [0.0]
    for sign, end in ((-1, below), (1, above)):
        if not end or math.asinh(end / width) / reach < apart:
            continue
        top = math.floor(math.log10(end))
        steps = [step * 10.0**p for p in range(top, math.floor(math.log10(smallest)) - 1, -1) for step in (5, 2, 1)]
        kept, place = [end], math.asinh(end / width) / reach
        for tick in steps:
            here = math.asinh(tick / width) / reach
            if tick < end and here >= apart and place - here >= apart:
                kept.append(tick)
                place = here
        ticks += [sign * _plain(tick) for tick in kept]
    return sorted(ticks)


def _spaced_on_log(low: float, high: float, inner: Sequence[float], apart: float) -> list[float]:
    """Return both ends and, of what lies between them, what is ``apart`` from the ends and from the one before."""
    ticks, room = [low], apart * math.log(high / low)
    for tick in inner:
        if low < tick < high and math.log(tick / ticks[-1]) >= room and math.log(high / tick) >= room:
            ticks.append(_plain(tick))
    return [*ticks, high]


def even_ticks(low: float, high: float, most: int = 6, slack: float = 0.1) -> list[float]:
    """Return the multiples of the shortest of 1-2-5 steps that give ``most`` steps or fewer, around [low, high].

    What lies ``slack`` of a step beyond a tick needs no other.
    """
    step = next(
        step * 10.0**power
        for power in range(math.floor(math.log10(high - low)) - 1, 400)
        for step in (1, 2, 5)
        if (high - low) / (step * 10.0**power) <= most
    )
    first, last = math.floor(low / step + slack), math.ceil(high / step - slack)
    return [_plain(multiple * step) for multiple in range(first, max(last, first + 1) + 1)]


def _plain(value: float) -> float:
    return float(f"{value:.12g}")
