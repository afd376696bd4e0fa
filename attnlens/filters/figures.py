"""Figures of depthwise filters: mosaics of their covariances, what is said of them by depth, their spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from attnlens.errors import UsageError
from attnlens.figures import scales, style
from attnlens.figures.drawings import Drawing
from attnlens.figures.heatmaps import MAX_ENTRIES
from attnlens.figures.panels import Given, Place, open_panels
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


def filter_drawings(
    stats: StatsTable,
    covariances: Mapping[int, tuple[Array, FilterSpec]],
    spectra: Mapping[int, Array],
    left_out: Mapping[str, Sequence[int]],
    *,
    model: str,
) -> dict[str, Drawing]:
    """Return what draws ``filter_covariance``, ``filter_profile`` and ``filter_spectra`` of the layers that were read.

    ``left_out`` says what else acts on the filters, with the layers it is true of.
    """
    measured = {
        layer: Covariance(covariance, spec.kernel, f"layer {layer}: {spec.filters} of {_times(spec.kernel)}")
        for layer, (covariance, spec) in covariances.items()
    }
    notes = "; ".join(f"{why} ({len(layers)} of {counted(len(measured), 'layer')})" for why, layers in left_out.items())
    title = "Covariance of each layer's depthwise filters"
    return {
        "filter_covariance": partial(draw_mosaics, {"": measured}, model=model, title=title, notes=notes),
        "filter_profile": partial(draw_filter_profile, stats, model=model, notes=notes),
        "filter_spectra": partial(draw_filter_spectra, spectra, model=model),
    }


def draw_mosaics(
    rows: Mapping[str, Mapping[int, Covariance]],
    *,
    model: str,
    title: str,
    notes: str = "",
    ax: Given | None = None,
) -> Figure:
    """Draw covariances as k x k blocks of k x k images, a panel a layer; several ``rows`` stand below each other.

    Block p of a panel shows Sigma[p, q] over q. Each panel has its own linear scale, as layers differ in size: white is
    zero, and the colours end at the largest covariance of two different positions, so that variances may lie beyond.
    A panel is named by its layer, after its row where it has one. Raises `UsageError` when the panels are too large to
    draw.
    """
    layers = list(next(iter(rows.values())))
    images = {(row, layer): mosaic(*own[layer][:2]) for row, own in rows.items() for layer in layers}
    largest = max(max(image.shape) for image in images.values())
    if largest**2 * len(images) > MAX_ENTRIES:
        raise UsageError(
            f"covariances of {counted(len(layers), 'layer')} of filters are too large to draw: choose fewer layers "
            "with --layers"
        )
    if ax is not None or style.current().paper:
        return _compact(rows, images, ax)
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


def _compact(
    rows: Mapping[str, Mapping[int, Covariance]], images: Mapping[tuple[str, int], Array], ax: Given | None
) -> Figure:
    """Draw the panels into a paper's figure or a caller's axes."""
    layers = list(next(iter(rows.values())))
    across = min(len(layers), 8 if style.current().width > 5 else 4)
    named = {(row, layer): f"{row} {layer}".replace("\n", " ").strip() for row, layer in images}
    bands = [layers[start : start + across] for start in range(0, len(layers), across)]
    grid = [[named[row, layer] for layer in band] for band in bands for row in rows]
    panels = open_panels(grid, Place(0, 0, 0, shape=1.0), [], ax=ax)
    for (row, layer), name in named.items():
        if name in panels.axes:
            axes, shown = panels.axes[name], rows[row][layer]
            _show(axes, images[row, layer], shown)
            where = f"{layer}: " if row == next(iter(rows)) else ""
            panels.title(name, f"{where}±{_share(shown)}")
    engine = panels.figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine) and not panels.given:
        engine.set(wspace=0.08)
    return panels.finish()


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
    _show(style.add_axes(figure, left, top, columns * zoom, rows * zoom), image, shown)
    style.add_text(figure, left, top - 40, f"{shown.caption}\n±{_share(shown)}", 6.5)


def _show(axes: Axes, image: Array, shown: Covariance) -> None:
    limit = colour_limit(shown.matrix)
    colours = style.signed_colours("#dddddd")
    axes.imshow(image, cmap=colours, vmin=-limit, vmax=limit, interpolation="none", aspect="auto")
    axes.set_axis_off()


def _share(shown: Covariance) -> str:
    """Write where the colours end, in units of the mean variance."""
    share = colour_limit(shown.matrix) / (float(np.trace(shown.matrix)) / len(shown.matrix) or 1.0)
    return style.number(float(f"{share:.2g}"))


_CHANCE = "Chance: filters of the same norms in random directions. An open point is a layer that cannot be told from it"
Series = tuple[str, Array]
"""Name and values by layer of a line; the name says how it is drawn."""
_LOOKS: Mapping[str, dict[str, Any]] = {
    "measured": {"color": MEASURED, "linestyle": "-", "marker": "o"},
    "chance": {"color": EXPECTED, "linestyle": "--", "marker": "s"},
    "1 - noise share": {"color": LIMIT, "linestyle": ":", "marker": "v"},
    "of covariances": {"color": "#009E73", "linestyle": "-.", "marker": "D"},
    "mean filter": {"color": LIMIT, "linestyle": ":", "marker": "X"},
    "isotropic": {"color": EXPECTED, "linestyle": "-", "marker": "P"},
    **{
        part: {"color": colour, "linestyle": dash, "marker": marker}
        for part, colour, dash, marker in zip(
            PARTS, (MEASURED, "#009E73", "#CC79A7"), ("-", "--", "-."), ("<", "^", ">"), strict=True
        )
    },
}


def draw_filter_profile(stats: StatsTable, *, model: str, notes: str = "", ax: Given | None = None) -> Figure:
    """Draw effective rank, explained shares, width and parts of the closed form by layer, beside chance.

    Panels: ``effective_rank``, ``explained``, ``relative_s`` and ``shares``.
    """
    rows = [record for record in stats.records() if record["verdict"] != "zeros"]
    if not rows:
        return style.message_figure(model, "All filters of this model are zero: there is nothing to draw.", ax)
    layers = [int(record["layer"]) for record in rows]

    def column(name: str) -> Array:
        return np.array([float(record[name]) for record in rows])

    series: dict[str, list[Series]] = {
        "effective_rank": [("chance", column("effective_rank_null")), ("measured", column("effective_rank"))],
        "explained": [
            ("chance", column("explained_null")),
            ("1 - noise share", 1 - column("noise_share")),
            ("of covariances", column("explained_covariances")),
            ("measured", column("explained")),
        ],
        "relative_s": [("measured", column("relative_s"))],
        "shares": [
            *((part, column(f"{part}_share")) for part in (*PARTS, "isotropic")),
            ("mean filter", column("mean_share")),
        ],
    }
    paper = style.current().paper
    used = list(dict.fromkeys(name for lines in series.values() for name, _ in lines))
    panels = open_panels(
        [["effective_rank", "explained"], ["relative_s", "shares"]],
        Place(120, 440, 250, gap=110, pitch=90, above=44),
        [
            (model, 10),
            ("Covariance of depthwise filters by layer, and the closed form's fit to it", 8.5),
            (_CHANCE, 7.5),
        ],
        notes=notes,
        legend=[(_handle(name), name) for name in used] if ax is None else (),
        ax=ax,
    )
    isotropic = np.array([record["verdict"] == "isotropic" for record in rows])
    for name, axes in panels.axes.items():
        _lines(axes, layers, series[name], isotropic, logarithmic=name in ("effective_rank", "relative_s"))
        scales.layer_axis(axes, layers, labelled=not paper or panels.is_last(name))
        panels.title(name, PAPER_TITLES[name] if paper else TITLES[name])
        if panels.given and len(series[name]) > 1:
            axes.legend(*zip(*((_handle(line), line) for line, _ in series[name]), strict=True), loc="best")
        if panels.given:
            axes.set_ylabel(PAPER_TITLES[name])
    return panels.finish()


TITLES = {
    "effective_rank": "effective rank (log scale)",
    "explained": "explained beyond isotropy",
    "relative_s": "closed form: s ÷ side² (log scale)",
    "shares": "share of the trace",
}
PAPER_TITLES = {**TITLES, "effective_rank": "rank (log)", "explained": "explained", "relative_s": "s ÷ side² (log)"}


def _handle(name: str) -> Line2D:
    return Line2D([], [], linewidth=1.1, markersize=3, **_LOOKS[name])


def _lines(
    axes: Axes,
    layers: Sequence[int],
    series: Sequence[Series],
    isotropic: NDArray[np.bool_],
    *,
    logarithmic: bool,
) -> None:
    """Draw lines through the layers; marks of what is measured, open where chance gives as much."""
    for name, values in series:
        look = {**_LOOKS[name], "markersize": 3, "linewidth": 1.1}
        axes.plot(layers, values, **look)
        axes.plot(
            np.array(layers)[isotropic], values[isotropic], **{**look, "linestyle": "none"}, markerfacecolor="white"
        )
    every = np.concatenate([values for _, values in series])
    if logarithmic:
        scales.log_y_axis(axes, float(every.min()), float(every.max()))
    else:
        scales.linear_y_axis(axes, min(0.0, float(every.min())), max(1.0, float(every.max())))


def draw_filter_spectra(spectra: Mapping[int, Array], *, model: str, ax: Given | None = None) -> Figure:
    """Draw the eigenvalues of every layer's covariance in units of their mean, coloured by depth."""
    known = {layer: values[None] / values.mean() for layer, values in spectra.items() if values.any()}
    if not known:
        return style.message_figure(model, "All filters of this model are zero: there is nothing to draw.", ax)
    layers = sorted(known)
    panels = open_panels(
        [["spectra"]],
        Place(100, 620, 440, above=30, bar=110 if len(layers) > 1 else 0, shape=0.7),
        [(model, 10), ("Eigenvalues of each layer's filter covariance, in units of their mean: 1 is isotropy", 8.5)],
        ax=ax,
    )
    colours, depth = depth_colours(layers)
    for axes in panels.axes.values():
        draw_lines(axes, known, colours, depth, "eigenvalue")
        axes.axhline(1, color=style.FAINT, linewidth=0.7, zorder=0.5)
        scale = "log" if style.current().paper else "log scale"
        axes.set_ylabel(f"eigenvalue ÷ mean ({scale})")
    if len(layers) > 1:
        depth_bar(panels, ScalarMappable(depth, colours), layers)
    return panels.finish()


def _times(kernel: Kernel) -> str:
    return f"{kernel[0]} × {kernel[1]}"
