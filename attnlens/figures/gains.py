"""Gains of balanced products: an image a side, layers down and channels across."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from attnlens.figures import style
from attnlens.heads import Array
from attnlens.statistics.gains import GainProfile

CLIP_PERCENTILE = 99.5


def draw_gains(profiles: Mapping[str, GainProfile], *, model: str, notes: str = "") -> Figure:
    """Draw log2 of every channel's gain, a row a layer, a panel a side of a circuit, on one colour scale."""
    if not profiles:
        return style.message_figure(model, f"There are no gains to draw: no product is balanced. {notes}")
    channels = max(profile.log_gains.shape[1] for profile in profiles.values())
    layers = max(profile.log_gains.shape[0] for profile in profiles.values())
    zoom = max(1, round(900 / channels))
    row = max(4, min(26, round(320 / layers)))
    width, height = channels * zoom, layers * row
    left, gap = 110, 75
    total = max(left + width + 130, 760)
    heading = style.Heading(total)
    heading.add(model, 10, weight="bold")
    heading.add("Gains divided out of the rows and columns of the balanced products: log2, by channel and layer", 8.5)
    heading.add(
        "0 is the root mean square of a side in a layer; QK: mean of the logarithm over heads, OV: of the layer's sum; "
        "r: mean correlation over channels of one layer with another",
        7.5,
        color=style.FAINT,
    )
    top = heading.height + 45
    notes = style.wrapped(notes, total - 40, 7)
    bottom = top + len(profiles) * (height + gap)
    figure = style.new_figure(total, bottom + 25 + style.text_height(notes, 7))
    heading.write(figure)
    style.add_text(figure, 20, bottom + 10, notes, 7, color=style.FAINT)
    scale = Normalize(*_limits([profile.log_gains for profile in profiles.values()]))
    for place, (side, profile) in enumerate(profiles.items()):
        axes = style.add_axes(figure, left, top + place * (height + gap), width, height)
        _panel(axes, profile, scale, height)
        shared = "" if np.isnan(profile.correlation) else f", r = {style.number(round(profile.correlation, 2))}"
        axes.set_title(f"{side}{shared}", loc="left", pad=4)
    cax = style.add_axes(figure, left + width + 30, top, 18, min(260, bottom - top - gap))
    bar = figure.colorbar(ScalarMappable(scale, mpl.colormaps["RdBu_r"]), cax=cax, extend="both")
    bar.outline.set_linewidth(0.5)
    bar.minorticks_off()
    cax.set_ylabel("log2 of the gain")
    return figure


def _limits(log_gains: list[Array]) -> tuple[float, float]:
    sizes = np.concatenate([np.abs(values[np.isfinite(values)]) for values in log_gains])
    reach = float(np.percentile(sizes, CLIP_PERCENTILE)) if sizes.size else 1.0
    return -(reach or 1.0), reach or 1.0


def _panel(axes: Axes, profile: GainProfile, scale: Normalize, height: float) -> None:
    colours = mpl.colormaps["RdBu_r"].with_extremes(bad="#d8d8d8")
    axes.imshow(profile.log_gains, cmap=colours, norm=scale, interpolation="none", aspect="auto")
    pitch = height / len(profile.layers)
    step = style.label_step([0, pitch], 24)
    axes.set_yticks(range(0, len(profile.layers), step), [str(layer) for layer in profile.layers[::step]])
    axes.set_ylabel("layer")
    axes.set_xlabel("channel", labelpad=1)
    for spine in axes.spines.values():
        spine.set_visible(False)
