"""The command ``compare``: print the distances between models, draw their profiles side by side."""

from __future__ import annotations

import json
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import attnlens
from attnlens.cli import options
from attnlens.cli.console import note, tracked, write_stdout
from attnlens.cli.filter_tables import filter_distance_table
from attnlens.cli.sheet import Sheet
from attnlens.cli.tables import escape, print_sheet
from attnlens.outputs import Outputs
from attnlens.vocabulary import FOLD
from attnlens.words import numbered

if TYPE_CHECKING:
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
    dpi: options.Dpi = None,
    style: options.FigureStyle = "default",
    figure_width: options.FigureWidth = None,
    table: options.TableFile = None,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Compare models: depth profiles side by side, and a distance between their structures."""
    options.draw_in(style, figure_width, format_, dpi)
    outputs = Outputs.of(models, checkpoints, force=force)
    if figures is not None:
        outputs.folder(figures)
    if table is not None:
        outputs.file(table, ".csv")
    comparison = attnlens.compare(
        *models,
        fold=FOLD(fold),
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
            note(f"{model}: {why}: {numbered(layers, 'layer')}")
    if json_:
        write_stdout(json.dumps(comparison.to_json(), indent=1))
    if comparison.distances and not json_:
        print_sheet(distance_table(comparison))
    if comparison.filter_distances and not json_:
        print_sheet(filter_distance_table(comparison))
    from attnlens.atomic import FileSet
    from attnlens.figures import save_figures

    folder = options.figure_folder(figures, comparison.models, *models, *(checkpoints or ()), weights, model_args)
    drawn = comparison.figures()
    with FileSet(outputs.check) as files:
        save_figures(drawn, folder, into=files.write)
        if table is not None:
            files.write(table, methodcaller("write", comparison.to_csv().encode()))
    note(f"wrote {' and '.join(f'{name}.{format_}' for name in drawn)} to {folder}")


def distance_table(comparison: Comparison) -> Sheet:
    """Build the table of distances between each pair of models."""
    table = Sheet(
        title=f"[bold]Distance between {comparison.fold} structures[/bold]",
        caption="identity: rms over depth of the difference in identity cosine / bound, 0 to 2\n"
        "noise: the same of log10 alpha",
    )
    table.label("first", "second", "circuit", key=True)
    table.number("identity", "noise")
    for row in comparison.distances:
        noise = "" if row["log_alpha"] is None else f"{row['log_alpha']:.3f}"
        table.add_row(
            escape(row["first"]), escape(row["second"]), row["circuit"].upper(), f"{row['identity_share']:.3f}", noise
        )
    return table
