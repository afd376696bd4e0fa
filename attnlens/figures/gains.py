"""Gains of balanced products: an image a side, layers down and channels across."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from attnlens.figures import scales, style
from attnlens.figures.panels import Given, Place, open_panels
from attnlens.heads import Array
from attnlens.statistics.gains import GainProfile

CLIP_PERCENTILE = 99.5
_NONE = "#d8d8d8"
"""Of layers without gains"""


def draw_gains(profiles: Mapping[str, GainProfile], *, model: str, notes: str = "", ax: Given | None = None) -> Figure:
    """Draw log2 of every channel's gain, a row a layer, a panel a side of a circuit, on one colour scale."""
    if not profiles:
        return style.message_figure(model, f"There are no gains to draw: no product is balanced. {notes}", ax)
    channels = max(profile.log_gains.shape[1] for profile in profiles.values())
    layers = max(profile.log_gains.shape[0] for profile in profiles.values())
    zoom = max(1, round(900 / channels))
    row = max(4, min(26, round(320 / layers)))
    width, height = channels * zoom, layers * row
    panels = open_panels(
        [[side] for side in profiles],
        Place(110, width, height, pitch=75, above=45, below=60, bar=130, right=0, shape=0.22, lowest=0.8),
        [
            (model, 10),
            ("Gains divided out of the rows and columns of the balanced products: log2, by channel and layer", 8.5),
            (
                (
                    "0 is the root mean square of a side in a layer; QK: mean of the logarithm over heads, OV: of the "
                    "layer's sum; r: mean correlation over channels of one layer with another"
                ),
                7.5,
            ),
        ],
        notes=notes,
        ax=ax,
    )
    scale = Normalize(*_limits([profile.log_gains for profile in profiles.values()]))
    for side, axes in panels.axes.items():
        profile = profiles[side]
        _panel(axes, profile, scale)
        axes.set_xlabel("channel" if panels.is_last(side) or not style.current().paper else "", labelpad=1)
        shared = "" if np.isnan(profile.correlation) else f", r = {style.number(round(profile.correlation, 2))}"
        panels.title(side, f"{side}{shared}")
    bar, _ = panels.colour_bar(ScalarMappable(scale, style.signed_colours(_NONE)), "log2 of the gain", "both")
    bar.minorticks_off()
    return panels.finish()


def _limits(log_gains: list[Array]) -> tuple[float, float]:
    sizes = np.concatenate([np.abs(values[np.isfinite(values)]) for values in log_gains])
    reach = float(np.percentile(sizes, CLIP_PERCENTILE)) if sizes.size else 1.0
    return -(reach or 1.0), reach or 1.0


def _panel(axes: Axes, profile: GainProfile, scale: Normalize) -> None:
    axes.imshow(profile.log_gains, cmap=style.signed_colours(_NONE), norm=scale, interpolation="none", aspect="auto")
    pitch = scales.length(axes, "y") / len(profile.layers)
    step = style.label_step([0, pitch], 24)
    axes.set_yticks(range(0, len(profile.layers), step), [str(layer) for layer in profile.layers[::step]])
    axes.set_ylabel("layer")
    for spine in axes.spines.values():
        spine.set_visible(False)
