"""Draw one ViT-S four times side by side: timm's default, mimetic, fitted, and the pre-trained source of the fit.

    python scripts/draw_inits.py --checkpoint ../shared/data/vit_small_patch14_dinov2.safetensors

writes docs/figures/inits.png: the first 64 x 64 entries of W_QK of one head and of each layer's summed W_OV, effective
products, on one colour scale a circuit. The three initialised networks are the source's architecture with LayerScale 1,
seed 0, so that what is stored is what acts; `fitted` takes the source's effective parameters.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from torch import nn

from attnlens.circuits import Kind, layer_ov, qk_circuit
from attnlens.figures import save_figures, scales, style
from attnlens.figures.heatmaps import colour_scale
from attnlens.fit.fit_params import fit_params
from attnlens.heads import Array
from attnlens.inits import create_model
from attnlens.layouts import read_heads
from attnlens.models.open import open_model

ARCHITECTURE = "vit_small_patch14_dinov2"
LAYERS = (0, 2, 4, 6, 8, 10, 11)
CROP, ZOOM, GAP = 64, 2, 8
CIRCUITS: tuple[Kind, ...] = ("qk", "ov")


def corners(model: str | nn.Module, checkpoint: Path | None, head: int) -> dict[Kind, dict[int, Array]]:
    """Return the corner of each layer's effective QK of one head, and of its summed OV."""
    opened = open_model(model, checkpoint)
    found: dict[Kind, dict[int, Array]] = {"qk": {}, "ov": {}}
    for layer, spec in opened.architecture.indexed():
        if layer in LAYERS:
            weights = read_heads(spec, opened.checkpoint, layer)
            found["qk"][layer] = qk_circuit(weights, "effective").head(head).dense(CROP)
            found["ov"][layer] = layer_ov(weights, "effective").dense(CROP)
    return found


def draw(networks: dict[str, dict[Kind, dict[int, Array]]], head: int) -> Figure:
    """Lay the corners out: a row a layer, and for each circuit a column a network."""
    panel, left, right = CROP * ZOOM, 84.0, 105.0
    block = len(networks) * (panel + GAP)
    total = left + 2 * (block + right)
    heading = style.Heading(total)
    heading.add(f"{ARCHITECTURE}: three ways to start, and the pre-trained weights", 10, weight="bold")
    heading.add(
        f"Effective products (norm gain and LayerScale folded in), first {CROP} × {CROP} entries; "
        "one arcsinh colour scale for each circuit",
        8,
    )
    top = heading.height + 60
    figure = style.new_figure(total, top + len(LAYERS) * (panel + GAP) + 20)
    heading.write(figure)
    for place, circuit in enumerate(CIRCUITS):
        norm = colour_scale({i: dict(enumerate(n[circuit].values())) for i, n in enumerate(networks.values())})
        start = left + place * (block + right)
        words = f"W_QK of head {head}" if circuit == "qk" else "W_OV, sum over heads"
        style.add_text(figure, start, top - 52, words, 8.5)
        for column, (name, products) in enumerate(networks.items()):
            style.add_text(figure, start + column * (panel + GAP), top - 20, name, 7.5)
            for row, layer in enumerate(LAYERS):
                y = top + row * (panel + GAP)
                axes = style.add_axes(figure, start + column * (panel + GAP), y, panel, panel)
                image = axes.imshow(products[circuit][layer], cmap="RdBu_r", norm=norm, interpolation="none")
                axes.set_xticks([])
                axes.set_yticks([])
                if column == place == 0:
                    style.add_text(figure, 10, y + panel / 2 - 8, f"layer {layer}", 7.5)
        cax = style.add_axes(figure, start + block + 8, top, 14, 3 * (panel + GAP) - GAP)
        bar = figure.colorbar(image, cax=cax, extend="both")
        ticks = scales.arcsinh_ticks(-norm.limit, norm.limit, norm.linear_width, exact=True)
        bar.set_ticks(ticks, labels=[style.number(float(f"{tick:.2g}")) for tick in ticks])
        bar.minorticks_off()
        cax.tick_params(labelsize=7, length=2.5)
    return figure


def main() -> None:
    """Fit the source, make the networks, write the figure."""
    parser = argparse.ArgumentParser(description="Draw four networks' attention side by side.")
    parser.add_argument("--checkpoint", type=Path, required=True, help=f"weights of {ARCHITECTURE}")
    parser.add_argument("--head", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/figures"))
    given = parser.parse_args()
    params = fit_params(ARCHITECTURE, checkpoint=given.checkpoint, fold="effective")
    options = {"default": {}, "mimetic": {}, "fitted": {"params": params}}
    networks = {
        name: corners(
            create_model(ARCHITECTURE, init=name, seed=0, init_options=given_options, img_size=224, init_values=1.0),
            None,
            given.head,
        )
        for name, given_options in options.items()
    }
    networks["pre-trained"] = corners(ARCHITECTURE, given.checkpoint, given.head)
    save_figures({"inits": draw(networks, given.head)}, given.output)


if __name__ == "__main__":
    main()
