"""Composition of heads: one image of every earlier head against every later head, in blocks of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from attnlens.figures import scales, style
from attnlens.figures.panels import Given, Place, open_panels
from attnlens.heads import Array

TITLES: Mapping[str, str] = {
    "q": "Q-composition, ‖W_OV W_QK‖ / (‖W_OV‖ ‖W_QK‖): what a head wrote asks",
    "k": "K-composition, ‖W_OV W_QKᵀ‖ / (‖W_OV‖ ‖W_QK‖): what a head wrote is asked for",
    "v": "V-composition, ‖W_OV W_OV‖ / (‖W_OV‖ ‖W_OV‖): what a head wrote is carried on",
}
CLIP_PERCENTILE = 99.5
MOST_HEADS = 1600
"""Heads of all layers in one image, whose memory grows with their square."""
SIDE = 720
"""Device pixels a side that the image is about as large as, a whole number for each pair of heads."""


Pair = tuple[int, int]


def draw_composition(
    logs: Mapping[Pair, Array],
    heads: Mapping[int, int],
    kind: str,
    *,
    model: str,
    fold: str,
    ax: Given | None = None,
) -> Figure:
    """Draw log2(score / baseline): rows are heads that write, columns heads that read, white is the baseline.

    ``logs`` holds ``[earlier head, later head]`` by earlier and later layer, ``heads`` the heads of every layer.
    Entries without composition are grey, in a paper white. One colour scale to the 99.5th percentile of the absolute
    values.
    """
    number = sum(heads.values())
    if number > MOST_HEADS:
        return style.message_figure(
            model,
            f"{number:,} heads are too many to draw their {kind.upper()}-composition (at most {MOST_HEADS:,}): choose "
            "fewer layers.",
            ax,
        )
    image, starts = mosaic(logs, heads)
    shown = np.abs(image[np.isfinite(image)])
    if not shown.size:
        return style.message_figure(model, f"There is no {kind.upper()}-composition to draw.", ax)
    limit = max(float(np.percentile(shown, CLIP_PERCENTILE)), 1e-6)
    zoom = max(1, SIDE // len(image))
    side, left = len(image) * zoom, 85
    total = left + side + 150
    if ax is not None or style.current().paper:
        return _compact(image, starts, kind, limit, list(heads), ax)
    with style.look():
        heading = style.Heading(total)
        heading.add(model, 10, weight="bold")
        heading.add(f"{TITLES[kind]}, {fold}", 8.5)
        heading.add(
            "log2 of score / baseline; the baseline 1/√d is the root mean square for unrelated directions; "
            f"clipped at the {CLIP_PERCENTILE}th percentile",
            7.5,
            color=style.FAINT,
        )
        top = heading.height + 50
        figure = style.new_figure(total, top + side + 30)
        heading.write(figure)
        axes = style.add_axes(figure, left, top, side, side)
        drawn = _show(axes, image, starts, kind, limit)
        _labels(axes, list(heads), starts, len(image))
        cax = style.add_axes(figure, left + side + 30, top, 18, min(side, 420))
        bar = figure.colorbar(drawn, cax=cax, extend="both" if shown.max() > limit else "neither")
        bar.outline.set_linewidth(0.5)
        cax.set_ylabel("log2(score / baseline)")
    return figure


def mosaic(blocks: Mapping[Pair, Array], heads: Mapping[int, int]) -> tuple[Array, Array]:
    """Return all layers' heads side by side, NaN where no block is; and where each layer begins, the size last."""
    starts = np.cumsum([0, *heads.values()])
    place = dict(zip(heads, starts[:-1].tolist(), strict=True))
    image = np.full((starts[-1], starts[-1]), np.nan)
    for (first, second), block in blocks.items():
        rows, columns = block.shape
        image[place[first] : place[first] + rows, place[second] : place[second] + columns] = block
    return image, starts


def _compact(image: Array, starts: Array, kind: str, limit: float, layers: Sequence[int], ax: Given | None) -> Figure:
    """Draw into a paper's figure or a caller's axes."""
    with style.look():
        panels = open_panels([[kind]], Place(0, 0, 0, shape=1.0), [], ax=ax)
        axes = panels.axes[kind]
        drawn = _show(axes, image, starts, kind, limit)
        _labels(axes, layers, starts, len(image))
        beyond = bool(np.nanmax(np.abs(image[np.isfinite(image)])) > limit)
        panels.colour_bar(drawn, "log2(score / baseline)", "both" if beyond else "neither")
        return panels.finish()


def _show(axes: Axes, image: Array, starts: Array, kind: str, limit: float) -> AxesImage:
    """Draw the image with a hairline between layers."""
    colours = style.signed_colours("#e4e4e4")
    drawn = axes.imshow(
        image, cmap=colours, norm=Normalize(-limit, limit), interpolation="none", aspect="auto", gid=kind
    )
    _frames(axes, starts, len(image))
    return drawn


def _frames(axes: Axes, starts: Array, size: int) -> None:
    """Draw a hairline between layers."""
    ends = [-0.5, size - 0.5]
    lines = [[(at - 0.5, end) for end in ends] for at in starts[1:-1]]
    lines += [[(end, at - 0.5) for end in ends] for at in starts[1:-1]]
    axes.add_collection(LineCollection(lines, colors=style.RULE, linewidths=0.4), autolim=False)


def _labels(axes: Axes, layers: Sequence[int], starts: Array, size: int) -> None:
    centres = (starts[:-1] + starts[1:] - 1) / 2
    step = style.label_step([centre * scales.length(axes) / size for centre in centres], 26)
    names = [str(layer) for layer in layers[::step]]
    axes.set_xticks(centres[::step], names)
    axes.set_yticks(centres[::step], names)
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("layer of the head that reads")
    axes.set_ylabel("layer of the head that writes")
    axes.tick_params(length=0)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
