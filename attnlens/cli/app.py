"""The commands and their options."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from attnlens import __version__

app = typer.Typer(
    name="attnlens",
    help="Look inside pre-trained attention weights: how much of W_Q W_K^T and W_V W_proj is identity plus noise.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class FoldChoice(StrEnum):
    """What is folded into the products."""

    raw = "raw"
    effective = "effective"
    centred = "centred"
    both = "both"
    all = "all"


class FormatChoice(StrEnum):
    """Formats a figure can be written in."""

    png = "png"
    pdf = "pdf"
    svg = "svg"


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"attnlens {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Look inside pre-trained attention weights: how much of W_Q W_K^T and W_V W_proj is identity plus noise."""


Model = Annotated[
    str | None,
    typer.Argument(
        help="timm name (with or without tag), hf-hub: or local-dir: name, checkpoint file or folder; "
        "default: the small ViT shipped with attnlens.",
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option("--checkpoint", "-c", help="File the weights come from; MODEL then names the architecture."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")]


@app.command()
def inspect(
    model: Model = None,
    checkpoint: CheckpointOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for figures and tables; default: figures/<model>.")
    ] = None,
    fold: Annotated[
        FoldChoice,
        typer.Option(
            help="raw products; effective ones with norm gain and LayerScale folded in; centred: effective, with "
            "LayerNorm's centring too; both: raw and effective; all: the three."
        ),
    ] = FoldChoice.both,
    layers: Annotated[str | None, typer.Option(help="Layers to read, e.g. 0-3,11; default: all.")] = None,
    layer_spectra: Annotated[
        bool, typer.Option("--layer-spectra", help="Also the eigenvalue statistics of layer sums: O(d^3) a layer.")
    ] = False,
    include_channel: Annotated[
        bool, typer.Option("--include-channel", help="Also read channel attention, labelled as what it is.")
    ] = False,
    include_linear: Annotated[
        bool, typer.Option("--include-linear", help="Also read linear attention, labelled as what it is.")
    ] = False,
    crop: Annotated[int, typer.Option(min=2, help="Dimensions of each product the heatmaps show.")] = 64,
    format_: Annotated[FormatChoice, typer.Option("--format", help="Format of the figures.")] = FormatChoice.png,
    dpi: Annotated[int, typer.Option(min=20, max=1200, help="Resolution of the figures.")] = 150,
    json_: Annotated[bool, typer.Option("--json", help="Print stats.json on stdout in place of the table.")] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Fit every head's QK and OV circuit to alpha * noise + beta * identity: table, CSV, JSON and figures."""
    from attnlens.cli.inspecting import run_inspect

    run_inspect(
        model,
        checkpoint,
        output=output,
        fold=fold.value,
        layers=layers,
        layer_spectra=layer_spectra,
        include=[kind for kind, asked in (("channel", include_channel), ("linear", include_linear)) if asked],
        crop=crop,
        format_=format_.value,
        dpi=dpi,
        as_json=json_,
        command=["attnlens", *sys.argv[1:]],
    )
