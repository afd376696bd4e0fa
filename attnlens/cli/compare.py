"""The command ``compare``: print the distances between models, draw their profiles side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import attnlens
from attnlens.cli import options
from attnlens.cli.console import format_layers, note, tracked, write_stdout
from attnlens.cli.filter_tables import filter_distance_table
from attnlens.cli.tables import escape, print_wide

if TYPE_CHECKING:
    from rich.table import Table

    from attnlens.fit.comparison import Comparison


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL MODEL...", help="Models as for inspect.")],
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option("--checkpoint", "-c", help="Take weights from this file: one for each MODEL, in their order."),
    ] = None,
    num_heads: options.NumHeads = None,
    model_args: options.ModelArgs = None,
    weights: options.Weights = None,
    row_order: options.RowOrder = None,
    fold: options.ProductFold = "effective",
    offline: options.Offline = False,
    remote: options.Remote = False,
    figures: options.Figures = None,
    format_: options.FigureFormat = "png",
    dpi: options.Dpi = 150,
    json_: options.Json = False,
) -> None:
    """Compare models: depth profiles side by side, and a distance between their structures."""
    comparison = attnlens.compare(
        *models,
        fold=fold,
        checkpoints=checkpoints or [],
        num_heads=num_heads,
        model_args=options.parse_model_args(model_args),
        weights=weights,
        row_order=row_order,
        offline=offline,
        remote=remote,
        progress=tracked("layers"),
    )
    for model, said in comparison.left_out.items():
        for why, layers in said.items():
            note(f"{model}: {why}: layers {format_layers(layers)}")
    if json_:
        distances = {"distances": comparison.distances, "filter_distances": comparison.filter_distances}
        about = {"fold": fold, "models": comparison.models, "left_out": comparison.left_out}
        write_stdout(json.dumps({**about, **distances}, indent=1))
    if comparison.distances and not json_:
        print_wide(distance_table(comparison))
    if comparison.filter_distances and not json_:
        print_wide(filter_distance_table(comparison))
    from attnlens.figures import save_figures

    folder = options.figure_folder(figures, *comparison.models)
    drawn = comparison.figures()
    save_figures(drawn, folder, format_, dpi)
    note(f"wrote {' and '.join(f'{name}.{format_}' for name in drawn)} to {folder}")


def distance_table(comparison: Comparison) -> Table:
    """Build the table of distances between each pair of models."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"Distance between {comparison.fold} structures",
        caption="identity: rms over depth of the difference in identity cosine / bound, 0 to 2\n"
        "noise: the same of log10 alpha",
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in ("first", "second", "circuit", "identity", "noise"):
        table.add_column(name, justify="right" if name in ("identity", "noise") else "left")
    for row in comparison.distances:
        noise = "" if row["log_alpha"] is None else f"{row['log_alpha']:.3f}"
        table.add_row(
            escape(row["first"]), escape(row["second"]), row["circuit"].upper(), f"{row['identity_share']:.3f}", noise
        )
    return table
