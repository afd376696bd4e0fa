"""Figures of depthwise filters: mosaics of their covariances, what is said of them by depth, their spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from numpy.typing import NDArray

from attnlens.errors import UsageError
from attnlens.figures import style
from attnlens.figures.heatmaps import MAX_ENTRIES
from attnlens.figures.spectra import depth_bar, depth_colours, draw_lines
from attnlens.filters.closed_form import PARTS
from attnlens.heads import Array
from attnlens.layouts.depthwise.spec import FilterSpec, Kernel
from attnlens.statistics.table import StatsTable
from attnlens.words import counted

MEASURED, EXPECTED, LIMIT = "#0072B2", "#B5B5B5", "#D55E00"


class Covariance(NamedTuple):
    """One covariance to draw, ``[position, position]``, of filters of a kernel; ``caption`` goes above it."""

    matrix: Array
    kernel: Kernel
    caption: str


def draw_filters(
    stats: StatsTable,
    covariances: Mapping[int, tuple[Array, FilterSpec]],
    spectra: Mapping[int, Array],
    left_out: Mapping[str, Sequence[int]],
    *,
    model: str,
) -> dict[str, Figure]:
    """Draw ``filter_covariance``, ``filter_profile`` and ``filter_spectra`` of the layers that were read.

    ``left_out`` says what else acts on the filters, with the layers it is true of.
    """
    measured = {
        layer: Covariance(covariance, spec.kernel, f"layer {layer}: {spec.filters} of {_times(spec.kernel)}")
        for layer, (covariance, spec) in covariances.items()
    }
    notes = "; ".join(f"{why} ({len(layers)} of {counted(len(measured), 'layer')})" for why, layers in left_out.items())
    with style.look():
        return {
            "filter_covariance": draw_mosaics(
                {"": measured}, model=model, title="Covariance of each layer's depthwise filters", notes=notes
            ),
            "filter_profile": draw_filter_profile(stats, model=model, notes=notes),
            "filter_spectra": draw_filter_spectra(spectra, model=model),
        }


def draw_mosaics(rows: Mapping[str, Mapping[int, Covariance]], *, model: str, title: str, notes: str = "") -> Figure:
    """Draw covariances as k x k blocks of k x k images, a panel a layer; several ``rows`` stand below each other.

    Block p of a panel shows Sigma[p, q] over q. Each panel has its own linear scale, as layers differ in size: white is
    zero, and the colours end at the largest covariance of two different positions, so that variances may lie beyond.
    Raises `UsageError` when the panels are too large to draw.
    """
    layers = list(next(iter(rows.values())))
    images = {(row, layer): mosaic(*own[layer][:2]) for row, own in rows.items() for layer in layers}
    largest = max(max(image.shape) for image in images.values())
    if largest**2 * len(images) > MAX_ENTRIES:
        raise UsageError(
            f"covariances of {counted(len(layers), 'layer')} of filters are too large to draw: choose fewer layers "
            "with --layers"
        )
    target = 600 if len(layers) == 1 else 330 if len(layers) <= 4 else 180
    panel = max(target, largest)
    gap, caption, left = 34, 58, 40 + (110 if any(rows) else 0)
    columns = max(1, min(len(layers), (1560 - left) // (panel + gap)))
    columns = math.ceil(len(layers) / math.ceil(len(layers) / columns))  # no row much shorter than the others
    bands = [layers[start : start + columns] for start in range(0, len(layers), columns)]
    total = max(left + columns * (panel + gap) - gap + 40, 860)
    heading = style.Heading(total)
    heading.add(model, 10, weight="bold")
    heading.add(title, 8.5)
    heading.add(
        "Block p of a panel, at p's place in the kernel, is the image of the covariance of position p with every "
        "position q. Linear colours of each panel's own, blue negative, white zero, red positive; they end at the "
        "largest covariance of two different positions, written above in units of the mean variance",
        7.5,
        color=style.FAINT,
    )
    band = len(rows) * (panel + caption) + 20
    notes = style.wrapped(notes, total - 40, 7)
    bottom = heading.height + 20 + len(bands) * band
    figure = style.new_figure(total, bottom + 10 + style.text_height(notes, 7))
    heading.write(figure)
    style.add_text(figure, 20, bottom, notes, 7, color=style.FAINT)
    for i, own in enumerate(bands):
        for j, (row, covariances) in enumerate(rows.items()):
            top = heading.height + 20 + i * band + j * (panel + caption) + caption - 12
            style.add_text(figure, 20, top + panel / 2, row, 8, va="center")
            for k, layer in enumerate(own):
                place = (left + k * (panel + gap), top, panel)
                _panel(figure, place, images[row, layer], covariances[layer])
    return figure


def mosaic(covariance: Array, kernel: Kernel) -> Array:
    """Return the image of a covariance: block p holds Sigma[p, q] over q, blocks one pixel (NaN) apart."""
    h, w = kernel
    image = np.full((h * (h + 1) - 1, w * (w + 1) - 1), np.nan)
    for p, row in enumerate(covariance):
        top, left = (p // w) * (h + 1), (p % w) * (w + 1)
        image[top : top + h, left : left + w] = row.reshape(h, w)
    return image


def colour_limit(covariance: Array) -> float:
    """Return where a panel's colours end: the largest absolute covariance of two positions, else the variance."""
    off = np.abs(covariance - np.diag(np.diag(covariance))).max()
    return float(off) or float(np.abs(covariance).max()) or 1.0


def _panel(figure: Figure, place: tuple[float, float, float], image: Array, shown: Covariance) -> None:
    left, top, panel = place
    rows, columns = image.shape
    zoom = max(1, int(panel // max(rows, columns)))
    axes = style.add_axes(figure, left, top, columns * zoom, rows * zoom)
    limit = colour_limit(shown.matrix)
    colours = mpl.colormaps["RdBu_r"].with_extremes(bad="#dddddd")
    axes.imshow(image, cmap=colours, vmin=-limit, vmax=limit, interpolation="none", aspect="auto")
    axes.set_axis_off()
    share = limit / (float(np.trace(shown.matrix)) / len(shown.matrix) or 1.0)
    text = f"{shown.caption}\n±{style.number(float(f'{share:.2g}'))}"
    style.add_text(figure, left, top - 40, text, 6.5)


def draw_filter_profile(stats: StatsTable, *, model: str, notes: str = "") -> Figure:
    """Draw effective rank, explained shares, width and parts of the closed form by layer, beside chance."""
    rows = [record for record in stats.records() if record["verdict"] != "zeros"]
    if not rows:
        return style.message_figure(model, "All filters of this model are zero: there is nothing to draw.")
    layers = [int(record["layer"]) for record in rows]

    def column(name: str) -> Array:
        return np.array([float(record[name]) for record in rows])

    ceiling = ("1 - noise share", 1 - column("noise_share"), LIMIT)
    parts = zip((*PARTS, "isotropic"), (MEASURED, "#009E73", "#CC79A7", EXPECTED), strict=True)
    panels: list[tuple[str, bool, list[tuple[str, Array, str]]]] = [
        ("effective rank", True, [_chance(column("effective_rank_null")), _own(column("effective_rank"))]),
        (
            "explained beyond isotropy",
            False,
            [
                _chance(column("explained_null")),
                ceiling,
                ("of covariances", column("explained_covariances"), "#009E73"),
                _own(column("explained")),
            ],
        ),
        ("closed form: s ÷ side²", True, [_own(column("relative_s"))]),
        (
            "share of the trace",
            False,
            [
                *((part, column(f"{part}_share"), colour) for part, colour in parts),
                ("mean filter", column("mean_share"), LIMIT),
            ],
        ),
    ]
    left, gap, width, height = 120, 110, 440, 250
    total = left + 2 * width + gap + 30
    heading = style.Heading(total)
    heading.add(model, 10, weight="bold")
    heading.add("Covariance of depthwise filters by layer, and the closed form's fit to it", 8.5)
    heading.add(
        "Chance: filters of the same norms in random directions. An open point is a layer that cannot be told from it",
        7.5,
        color=style.FAINT,
    )
    top = heading.height + 50
    notes = style.wrapped(notes, total - 40, 7)
    bottom = top + 2 * height + 90 + 70
    figure = style.new_figure(total, bottom + 15 + style.text_height(notes, 7))
    heading.write(figure)
    style.add_text(figure, 20, bottom, notes, 7, color=style.FAINT)
    isotropic = np.array([record["verdict"] == "isotropic" for record in rows])
    for place, (label, logarithmic, series) in enumerate(panels):
        across, down = place % 2, place // 2
        axes = style.add_axes(figure, left + across * (width + gap), top + down * (height + 90), width, height)
        _lines(axes, layers, series, isotropic, logarithmic=logarithmic)
        style.layer_axis(axes, layers, width, labelled=True)
        axes.set_title(label, loc="left", pad=5)
    return figure


def _own(values: Array) -> tuple[str, Array, str]:
    return "measured", values, MEASURED


def _chance(values: Array) -> tuple[str, Array, str]:
    return "chance", values, EXPECTED


def _lines(
    axes: Axes,
    layers: Sequence[int],
    series: Sequence[tuple[str, Array, str]],
    isotropic: NDArray[np.bool_],
    *,
    logarithmic: bool,
) -> None:
    """Draw lines through the layers; of what is measured, points that are open where chance gives as much."""
    for name, values, colour in series:
        axes.plot(layers, values, "-", color=colour, linewidth=1.1, label=name)
        for chosen, fill in ((~isotropic, colour), (isotropic, "white")):
            axes.plot(np.array(layers)[chosen], values[chosen], "o", markersize=3, color=colour, markerfacecolor=fill)
    every = np.concatenate([values for _, values, _ in series])
    if logarithmic:
        style.log_y_axis(axes, float(every.min()), float(every.max()))
    else:
        style.linear_y_axis(axes, min(0.0, float(every.min())), max(1.0, float(every.max())))
    if len(series) > 1:
        axes.legend(loc="best", borderpad=0.2, handlelength=1.6)


def draw_filter_spectra(spectra: Mapping[int, Array], *, model: str) -> Figure:
    """Draw the eigenvalues of every layer's covariance in units of their mean, coloured by depth."""
    known = {layer: values[None] / values.mean() for layer, values in spectra.items() if values.any()}
    if not known:
        return style.message_figure(model, "All filters of this model are zero: there is nothing to draw.")
    layers = sorted(known)
    left, width, height = 100, 620, 440
    total = left + width + 140
    heading = style.Heading(total)
    heading.add(model, 10, weight="bold")
    heading.add("Eigenvalues of each layer's filter covariance, in units of their mean: 1 is isotropy", 8.5)
    top = heading.height + 30
    figure = style.new_figure(total, top + height + 70)
    heading.write(figure)
    axes = style.add_axes(figure, left, top, width, height)
    colours, depth = depth_colours(layers)
    draw_lines(axes, known, colours, depth, "eigenvalue")
    axes.axhline(1, color=style.FAINT, linewidth=0.7, zorder=0.5)
    axes.set_ylabel("eigenvalue ÷ mean")
    if len(layers) > 1:
        cax = style.add_axes(figure, left + width + 30, top, 18, height)
        depth_bar(figure, cax, ScalarMappable(depth, colours), layers)
    return figure


def _times(kernel: Kernel) -> str:
    return f"{kernel[0]} × {kernel[1]}"
