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
from attnlens.figures import scales, style
from attnlens.figures.panels import Given, Panels, Place, open_panels
from attnlens.heads import Array

TITLES: Mapping[Kind, str] = {"qk": "QK", "ov": "OV"}
FLOOR = 1e-6
"""Singular values below this share of the largest are rounding, not spectrum, and stay below the axis."""


def draw_spectra(
    spectra: Mapping[tuple[int, Kind, Fold], Array],
    fold: Fold,
    *,
    model: str,
    notes: str = "",
    ax: Given | None = None,
) -> Figure:
    """Draw a thin line a head, QK beside OV, over a logarithmic axis; early layers are dark, late ones light.

    Panels: ``qk`` and ``ov``.
    """
    chosen = {key[:2]: values for key, values in spectra.items() if key[2] == fold}
    circuits: list[Kind] = [circuit for circuit in TITLES if any(kind == circuit for _, kind in chosen)]
    layers = sorted({layer for layer, _ in chosen})
    if not layers:
        return style.message_figure(model, f"There is no product to draw ({fold}). {notes}", ax)
    panels = open_panels(
        [circuits],
        Place(100, 470, 440, gap=90, bar=110 if len(layers) > 1 else 0, right=0, least=0, shape=0.9),
        [(model, 10), (f"Singular values of each head's product, {style.fold_words(fold, circuits)}", 8.5)],
        notes=notes,
        ax=ax,
    )
    colours, depth = depth_colours(layers)
    for name, axes in panels.axes.items():
        own = {layer: values for (layer, kind), values in chosen.items() if kind == name}
        draw_lines(axes, own, colours, depth)
        circuit: Kind = "qk" if name == "qk" else "ov"
        words = f": {style.CIRCUIT_WORDS[circuit]}" * (not style.current().paper)
        panels.title(name, f"{TITLES[circuit]}{words}")
        if panels.is_first(name):
            axes.set_ylabel("singular value (log)" if style.current().paper else "singular value (log scale)")
    if len(layers) > 1:
        depth_bar(panels, ScalarMappable(depth, colours), layers)
    return panels.finish()


def depth_colours(layers: list[int]) -> tuple[ListedColormap, Normalize]:
    """Return the colours of depth, early layers dark and late ones light, and their scale."""
    colours = ListedColormap(mpl.colormaps["viridis"](np.linspace(0, 0.9, 256)))
    return colours, Normalize(layers[0], max(layers[-1], layers[0] + 1))


def draw_lines(
    axes: Axes, spectra: Mapping[int, Array], colours: ListedColormap, depth: Normalize, of: str = "singular value"
) -> None:
    """Draw each layer's spectra ``[head, value]`` into axes, coloured by depth."""
    lines: list[tuple[int, int, Array]] = []
    largest = max(float(values.max()) for values in spectra.values())
    largest = largest if largest >= scales.SMALLEST else 1.0
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
    scales.log_y_axis(axes, low, high)
    axes.set_xlim(1 - 0.02 * rank, rank * 1.02)
    step = style.label_step(range(1, rank + 1), rank * max(1 / 8, 45 / max(scales.length(axes), 46)))
    axes.set_xticks([1, *range(step, rank + 1, step)] if step > 1 else range(1, rank + 1))
    axes.set_xlabel("index" if style.current().paper else f"index of {of}")


def depth_bar(panels: Panels, colours: ScalarMappable, layers: list[int]) -> None:
    """Draw the colour bar of depth."""
    bar, cax = panels.colour_bar(colours, "layer")
    bar.set_ticks(scales.layer_ticks(layers, scales.length(cax, "y"), 26))
    bar.minorticks_off()
