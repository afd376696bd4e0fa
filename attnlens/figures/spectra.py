"""Spectra: the singular values of every head's product, coloured by depth."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from attnlens.circuits import Fold, Kind
from attnlens.figures import style
from attnlens.heads import Array

TITLES: Mapping[Kind, str] = {"qk": "QK", "ov": "OV"}
FLOOR = 1e-6
"""Singular values below this share of the largest are rounding, not spectrum, and stay below the axis."""


def draw_spectra(spectra: Mapping[tuple[int, Kind, Fold], Array], fold: Fold, *, model: str, notes: str = "") -> Figure:
    """Draw a thin line a head, QK beside OV, over a logarithmic axis; early layers are dark, late ones light."""
    chosen = {key[:2]: values for key, values in spectra.items() if key[2] == fold}
    circuits = [circuit for circuit in TITLES if any(kind == circuit for _, kind in chosen)]
    layers = sorted({layer for layer, _ in chosen})
    if not layers:
        return style.message_figure(model, f"There is no product to draw ({fold}). {notes}")
    left, gap, width, height = 100, 90, 470, 440
    bar = left + len(circuits) * (width + gap) - gap + 30
    total = bar + (110 if len(layers) > 1 else 0)
    heading = style.Heading(total)
    heading.add(model, 10, weight="bold")
    heading.add(f"Singular values of each head's product, {style.fold_words(fold, circuits)}", 8.5)
    top = heading.height + 40
    notes = style.wrapped(notes, total - 40, 7)
    bottom = top + height + 70
    figure = style.new_figure(total, bottom + 15 + style.text_height(notes, 7))
    heading.write(figure)
    style.add_text(figure, 20, bottom, notes, 7, color=style.FAINT)
    colours, depth = depth_colours(layers)
    for i, circuit in enumerate(circuits):
        axes = style.add_axes(figure, left + i * (width + gap), top, width, height)
        own = {layer: values for (layer, kind), values in chosen.items() if kind == circuit}
        draw_lines(axes, own, colours, depth)
        axes.set_title(f"{TITLES[circuit]}: {style.CIRCUIT_WORDS[circuit]}", loc="left", pad=5)
        if i == 0:
            axes.set_ylabel("singular value")
    if len(layers) > 1:
        depth_bar(figure, style.add_axes(figure, bar, top, 18, height), ScalarMappable(depth, colours), layers)
    return figure


def depth_colours(layers: list[int]) -> tuple[ListedColormap, Normalize]:
    """Return the colours of depth, early layers dark and late ones light, and their scale."""
    colours = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.9, 256)))
    return colours, Normalize(layers[0], max(layers[-1], layers[0] + 1))


def draw_lines(
    axes: Axes, spectra: Mapping[int, Array], colours: ListedColormap, depth: Normalize, of: str = "singular value"
) -> None:
    """Draw each layer's spectra ``[head, value]`` into axes, coloured by depth."""
    lines: list[tuple[int, int, Array]] = []
    largest = max(float(values.max()) for values in spectra.values()) or 1.0
    rank = max(values.shape[-1] for values in spectra.values())
    for layer, values in spectra.items():
        index = np.arange(1, values.shape[-1] + 1)
        shown = np.where(values > FLOOR * largest, values, np.nan)
        lines += [(head, layer, np.stack([index, line], -1)) for head, line in enumerate(shown)]
    lines.sort(key=lambda line: line[:2])  # head by head, so that no layer as a whole is painted over
    crowd = min(1.0, (150 / len(lines)) ** 0.5)
    curves = [curve for _, _, curve in lines]
    collection = LineCollection(
        curves, linewidths=0.4 + 0.4 * crowd, alpha=0.45 + 0.4 * crowd, cmap=colours, norm=depth
    )
    collection.set_array([layer for _, layer, _ in lines])
    axes.add_collection(collection, autolim=False)
    visible = np.concatenate([curve[:, 1] for curve in curves])
    visible = visible[np.isfinite(visible)]
    low, high = (float(visible.min()), float(visible.max())) if visible.size else (0.1, 1.0)
    style.log_y_axis(axes, low, high)
    axes.set_xlim(1 - 0.02 * rank, rank * 1.02)
    step = style.label_step(range(1, rank + 1), rank / 8)
    axes.set_xticks([1, *range(step, rank + 1, step)] if step > 1 else range(1, rank + 1))
    axes.set_xlabel(f"index of {of}")


def depth_bar(figure: Figure, cax: Axes, colours: ScalarMappable, layers: list[int]) -> None:
    """Draw the colour bar of depth."""
    bar = figure.colorbar(colours, cax=cax)
    bar.set_ticks(style.layer_ticks(layers, cax.get_window_extent().height, 26))
    bar.minorticks_off()
    bar.outline.set_linewidth(0.5)
    cax.set_ylabel("layer")
