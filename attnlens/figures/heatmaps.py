"""Heatmaps: one image of every product's top-left corner, layers down and heads across, on one colour scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from attnlens.circuits import Fold, Kind
from attnlens.circuits.factored import exponent_of
from attnlens.errors import UsageError
from attnlens.figures import scales, style
from attnlens.figures.panels import Given, Place, open_panels
from attnlens.heads import Array
from attnlens.statistics.corners import fits_float32
from attnlens.statistics.table import ALL_HEADS

Panels = Mapping[int, Mapping[int | str, Array]]
"""Corners of products by layer and head, ``all`` being the sum over a layer's heads."""
Shape = tuple[int, int]

CLIP_PERCENTILE = 99.5
MAX_ENTRIES = 40_000_000
"""Largest image that is drawn; its colours alone take four bytes an entry, and rendering several times that."""
MAX_SIDE = 60_000
"""Largest side of it: the canvas, labels included, must be below 2^16 pixels"""


class ArcsinhNorm(Normalize):
    """Map [-clip, clip] to [0, 1]: 1/2 + arcsinh(x / w) / (2 arcsinh(clip / w)), linear within +-w, w ``linear_width``.

    Matplotlib's own AsinhNorm does the same, but transforms the whole image each time it is asked for its limits.
    """

    def __init__(self, linear_width: float, clip: float) -> None:
        super().__init__(-clip, clip)
        self.linear_width, self.limit = linear_width, clip
        self._half = math.asinh(clip / linear_width)

    def __call__(self, value: Any, clip: bool | None = None) -> Any:  # noqa: ARG002  (Normalize's signature)
        """Return the place of ``value`` on the colour map; what lies beyond the limits falls outside [0, 1]."""
        with np.errstate(over="ignore"):  # beyond all limits
            return 0.5 + np.arcsinh(np.asanyarray(value) / self.linear_width) / (2 * self._half)

    def inverse(self, value: Any) -> Any:
        """Return the entry shown at a place of the colour map."""
        return np.sinh((2 * np.asanyarray(value) - 1) * self._half) * self.linear_width


@dataclass(frozen=True)
class Mosaic:
    """Every panel in one image, NaN where there is none; lengths are in image pixels, one a matrix entry."""

    image: NDArray[np.floating]
    corners: Mapping[tuple[int, int | str], tuple[int, int]]
    """Top and left pixel of the panel of a layer and head."""
    layer_centres: Mapping[int, float]
    head_centres: Mapping[int | str, float]
    gap: int


def compose(panels: Panels) -> Mosaic:
    """Lay the panels out: a row a layer, a column a head, and the sum over heads in a column set apart on the right.

    Raises `UsageError` when the image would be too large to render.
    """
    shapes = [panel.shape for row in panels.values() for panel in row.values()]
    width = max(columns for _, columns in shapes)
    gap = max(1, round(0.06 * width))
    heads = sorted({head for row in panels.values() for head in row if isinstance(head, int)})
    lefts: dict[int | str, int] = {head: index * (width + gap) for index, head in enumerate(heads)}
    if any(ALL_HEADS in row for row in panels.values()):
        lefts[ALL_HEADS] = len(heads) * (width + gap) + 2 * gap
    heights = {layer: max(panel.shape[0] for panel in row.values()) for layer, row in panels.items()}
    tops = dict(zip(heights, np.cumsum([0, *(height + gap for height in heights.values())]).tolist(), strict=False))
    size = (sum(heights.values()) + gap * (len(heights) - 1), max(lefts.values()) + width)
    if size[0] * size[1] > MAX_ENTRIES or max(size) > MAX_SIDE:
        raise UsageError(
            f"a heatmap of {size[1]} x {size[0]} entries is too large to draw (at most {MAX_ENTRIES:,} in all, and "
            f"{MAX_SIDE:,} a side): show a smaller corner of each product, or fewer layers"
        )
    wide = any(not fits_float32(panel) for row in panels.values() for panel in row.values())
    image = np.full(size, np.nan, dtype=np.float64 if wide else np.float32)
    corners = {(layer, head): (tops[layer], lefts[head]) for layer, row in panels.items() for head in row}
    for (layer, head), (top, left) in corners.items():
        panel = panels[layer][head]
        image[top : top + panel.shape[0], left : left + panel.shape[1]] = panel
    return Mosaic(
        image=image,
        corners=corners,
        layer_centres={layer: tops[layer] + (height - 1) / 2 for layer, height in heights.items()},
        head_centres={head: left + (width - 1) / 2 for head, left in lefts.items()},
        gap=gap,
    )


def colour_scale(panels: Panels) -> ArcsinhNorm:
    """Return the colour scale all panels share: symmetric, arcsinh, clipped at a high percentile of the entries.

    colour = asinh(entry / w) / asinh(clip / w), w the median over panels of a panel's rms. Within +-w the scale is all
    but linear. Beyond, it is logarithmic: products of one model differ in size up to a hundredfold from layer to
    layer, and a linear scale that suits the largest shows the others as blank. Entries too small to be drawn are zero.
    """
    entries = np.concatenate([np.abs(panel).ravel() for row in panels.values() for panel in row.values()])
    limits = float(np.percentile(entries, CLIP_PERCENTILE)), float(entries.max())
    clip = next((limit for limit in limits if limit >= scales.SMALLEST), 1.0)
    typical = float(np.median([_root_mean_square(panel) for row in panels.values() for panel in row.values()]))
    return ArcsinhNorm(max(typical, 1e-3 * clip), clip)


def _root_mean_square(panel: NDArray[np.floating]) -> np.floating:
    """Return the root mean square of entries of any size: that of the entries over a power of two, times it."""
    exponent = exponent_of(panel)
    unit = np.ldexp(panel, -exponent)
    return np.ldexp(np.sqrt(np.mean(unit**2)), exponent)


def draw_heatmap(
    panels: Panels,
    full: Mapping[int, Shape],
    *,
    model: str,
    circuit: Kind,
    fold: Fold,
    notes: str = "",
    ax: Given | None = None,
) -> Figure:
    """Draw every panel at one or more whole device pixels an entry, with layer and head labels and a colour bar.

    ``full`` gives the shape of each layer's whole product; ``notes`` is written under the image. Without panels the
    figure says that there are none. In a paper, and in a caller's axes, an entry is as large as there is room for.
    """
    if not panels:
        missing = f"There is no {style.CIRCUIT_WORDS[circuit]} to draw ({fold})."
        return style.message_figure(model, f"{missing} {notes}", ax)
    mosaic, scale = compose(panels), colour_scale(panels)
    rows, columns = mosaic.image.shape
    label = f"entry of {circuit_name(circuit)} (arcsinh scale)"
    if ax is not None or style.current().paper:
        place = Place(0, 0, 0, shape=rows / columns)
        sheet = open_panels([[circuit]], place, [], ax=ax)
        axes = sheet.axes[circuit]
        image = _show(axes, mosaic, scale, panels, zoom=None)
        _ticks(axes, mosaic)
        bar, cax = sheet.colour_bar(image, label, _extend(image))
        _bar_ticks(bar, cax, scale)
        return sheet.finish()
    zoom = _zoom(rows, columns)
    height, width = rows * zoom, columns * zoom
    unit = min(1.8, max(1.0, math.sqrt(max(width / 1100, height / 1700))))  # larger figures get larger letters
    bar_height = max(150 * unit, min(height, 420 * unit))
    left, right = 75 * unit, 165 * unit
    total = max(left + width + right, 760 * unit)
    left += math.floor((total - left - width - right) / 2)
    heading = style.Heading(total, unit)
    heading.add(model, 10, weight="bold")
    heading.add(
        f"{style.CIRCUIT_WORDS[circuit]} of every head{_and_sum(mosaic)}, {style.fold_words(fold, [circuit])}", 8.5
    )
    heading.add(f"{_crop_words(panels, full)}. {_scale_words(scale)}", 7.5, color=style.FAINT)
    top = heading.height + 50 * unit
    notes = style.wrapped(notes, total - 40 * unit, 7 * unit)
    below = 25 * unit + style.text_height(notes, 7 * unit)
    figure = style.new_figure(total, top + max(height, bar_height) + below)
    heading.write(figure)
    style.add_text(figure, 20 * unit, top + max(height, bar_height) + 15 * unit, notes, 7 * unit, color=style.FAINT)
    axes = style.add_axes(figure, left, top, width, height)
    image = _show(axes, mosaic, scale, panels, zoom)
    _label(axes, mosaic, zoom, unit)
    cax = style.add_axes(figure, left + width + 30 * unit, top, 18 * unit, bar_height)
    bar = figure.colorbar(image, cax=cax, extend=_extend(image))
    bar.outline.set_linewidth(0.5)
    _bar_ticks(bar, cax, scale)
    cax.tick_params(labelsize=7.5 * unit, length=2.5 * unit)
    cax.set_ylabel(label, fontsize=8 * unit, labelpad=4 * unit)
    return figure


def circuit_name(circuit: Kind) -> str:
    """Return W_QK or W_OV."""
    return style.CIRCUIT_WORDS[circuit].partition(" ")[0]


def _zoom(rows: int, columns: int) -> int:
    """Return the device pixels a side of one entry: as many as keep the figure at the size of a page, at least one."""
    fits = (zoom for zoom in (5, 4, 3, 2) if max(rows, columns) * zoom <= 1700 and rows * columns * zoom**2 <= 1.6e6)
    return next(fits, 1)


def _show(axes: Axes, mosaic: Mosaic, scale: ArcsinhNorm, panels: Panels, zoom: int | None) -> AxesImage:
    """Draw the image, and where it has a zoom, around every panel a hairline in the gap that covers no entry."""
    colours = style.signed_colours("white")
    image = axes.imshow(mosaic.image, cmap=colours, norm=scale, interpolation="none", aspect="auto")
    if zoom is None:
        return image
    out = 0.5 + 0.5 / zoom
    frames = []
    for (layer, head), (top, left) in mosaic.corners.items():
        rows, columns = panels[layer][head].shape
        x0, x1, y0, y1 = left - out, left + columns - 1 + out, top - out, top + rows - 1 + out
        frames.append([(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)])
    hairlines = LineCollection(frames, colors=style.RULE, linewidths=72 / style.DPI, clip_on=False)
    hairlines.set_snap(False)  # they are in the middle of a device pixel; snapping would move half of them onto entries
    axes.add_collection(hairlines, autolim=False)
    return image


def _label(axes: Axes, mosaic: Mosaic, zoom: int, unit: float) -> None:
    """Write head and layer numbers beside the image, as plain texts: two dozen axis ticks would cost more than it."""
    points, above, beside = 7.5 * unit, -0.5 - 9 * unit / zoom, -0.5 - 10 * unit / zoom
    heads = {head: x for head, x in mosaic.head_centres.items() if head != ALL_HEADS}
    step = style.label_step([x * zoom for x in heads.values()], style.pixels(2.0 * points))
    labels = [(x, str(head)) for head, x in list(heads.items())[::step]]
    if ALL_HEADS in mosaic.head_centres:
        labels.append((mosaic.head_centres[ALL_HEADS], "sum"))
    for x, label in labels:
        axes.text(x, above, label, ha="center", va="bottom", fontsize=points, gid="head")
    step = style.label_step([y * zoom for y in mosaic.layer_centres.values()], style.pixels(1.4 * points))
    for layer, y in list(mosaic.layer_centres.items())[::step]:
        axes.text(beside, y, str(layer), ha="right", va="center", fontsize=points, gid="layer")
    middle_x, middle_y = float(np.mean(list(heads.values()))), (mosaic.image.shape[0] - 1) / 2
    axes.text(middle_x, above - 22 * unit / zoom, "head", ha="center", va="bottom", fontsize=8 * unit)
    axes.text(
        beside - 28 * unit / zoom, middle_y, "layer", ha="right", va="center", rotation="vertical", fontsize=8 * unit
    )
    axes.set_axis_off()


def _ticks(axes: Axes, mosaic: Mosaic) -> None:
    """Number layers and heads by ticks, as many as there is room for."""
    rows, columns = mosaic.image.shape
    heads = {head: x for head, x in mosaic.head_centres.items() if head != ALL_HEADS}
    step = style.label_step([x * scales.length(axes) / columns for x in heads.values()], 34)
    places = {str(head): x for head, x in list(heads.items())[::step]}
    if ALL_HEADS in mosaic.head_centres:
        places["sum"] = mosaic.head_centres[ALL_HEADS]
    axes.set_xticks(list(places.values()), list(places))
    layers = mosaic.layer_centres
    step = style.label_step([y * scales.length(axes, "y") / rows for y in layers.values()], 22)
    axes.set_yticks(list(layers.values())[::step], [str(layer) for layer in layers][::step])
    axes.xaxis.set_ticks_position("top")
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _extend(image: AxesImage) -> str:
    """Say whether entries lie beyond the limits of the colour scale."""
    scale = image.norm
    assert isinstance(scale, ArcsinhNorm)
    clipped = bool(np.ma.max(np.ma.abs(np.ma.asarray(image.get_array()))) > scale.limit)
    return "both" if clipped else "neither"


def _bar_ticks(bar: Colorbar, cax: Axes, scale: ArcsinhNorm) -> None:
    """Tick 0, round numbers, and the limits themselves."""
    apart = max(0.09, min(0.3, 24 / max(scales.length(cax, "y"), 1)))
    ticks = scales.arcsinh_ticks(-scale.limit, scale.limit, scale.linear_width, apart, exact=True)
    bar.set_ticks(ticks, labels=[style.number(float(f"{tick:.2g}")) for tick in ticks])
    bar.minorticks_off()


def _and_sum(mosaic: Mosaic) -> str:
    return " and of each layer's sum" if ALL_HEADS in mosaic.head_centres else ""


def _crop_words(panels: Panels, full: Mapping[int, Shape]) -> str:
    """Say how much of the products the panels show."""
    drawn = {layer: next(iter(row.values())).shape for layer, row in panels.items()}
    wholes = sorted({full[layer] for layer in drawn})
    of = " to ".join(f"{rows} × {columns}" for rows, columns in dict.fromkeys((wholes[0], wholes[-1])))
    cropped = [layer for layer, shape in drawn.items() if shape != full[layer]]
    if not cropped:
        return f"Panels show all {of} entries of each product"
    shape = max(drawn[layer] for layer in cropped)
    where = "" if len(cropped) == len(drawn) else ", or all where there are fewer"
    return f"Panels show the first {shape[0]} × {shape[1]} of {of} entries of each product{where}"


def _scale_words(scale: ArcsinhNorm) -> str:
    clip, width = style.number(float(f"{scale.limit:.2g}")), style.number(float(f"{scale.linear_width:.2g}"))
    return (
        f"One colour scale for all: arcsinh, near-linear within ±{width} and logarithmic beyond, "
        f"clipped at ±{clip}, the {CLIP_PERCENTILE}th percentile of |entries|"
    )
