"""The command that looks at networks at their start: signal."""

from __future__ import annotations

import json
import math
import shlex
import sys
from enum import StrEnum
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attnlens.cli.app import app
from attnlens.cli.options import Debug, Dpi, FigureFormat, FormatChoice

if TYPE_CHECKING:
    from rich.table import Table

    from attnlens.heads import Array
    from attnlens.signal.propagation import Propagation


class MlpChoice(StrEnum):
    """What becomes of the MLPs."""

    keep = "keep"
    tailored = "tailored"
    none = "none"


@app.command(short_help="See how alike tokens become by depth.")
def signal(
    model: Annotated[
        str | None,
        typer.Argument(help="timm name of a plain ViT, model folder or gpt-tiny; default: as the shipped ViT."),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: softmax, value-skipinit, shaped, e-spa, u-spa, and every initialiser that needs no "
            "option; default: default, mimetic and these five."
        ),
    ] = None,
    depth: Annotated[int | None, typer.Option(min=1, help="Blocks; default: the model's.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="Patches of a ViT, a square, or context; default: the model's.")
    ] = None,
    skips: Annotated[bool, typer.Option("--skips/--no-skips", help="Skips of every block.")] = True,
    norms: Annotated[bool, typer.Option("--norms/--no-norms", help="Norms of every block.")] = True,
    mlp: Annotated[
        MlpChoice | None,
        typer.Option(help="keep, the default with skips; tailored to the depth, the default without; or none."),
    ] = None,
    eta: Annotated[
        float, typer.Option(min=0, max=1, help="Cosine that tailored MLPs alone would bring orthogonal tokens to.")
    ] = 0.2,
    options: Annotated[
        list[str] | None,
        typer.Option("--option", help="Of an arm, name=value: gamma and distance of e-spa, rho of u-spa; several."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Networks an arm.")] = 5,
    sequences: Annotated[int, typer.Option(min=1, help="Random sequences of tokens a network.")] = 4,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for figure and tables; default: figures/<model>.")
    ] = None,
    format_: FigureFormat = FormatChoice.png,
    dpi: Dpi = 150,
    json_: Annotated[bool, typer.Option("--json", help="Print signal.json on stdout in place of the table.")] = False,
    debug: Debug = False,  # noqa: ARG001  # read from sys.argv in main, listed here for --help
) -> None:
    """Measure how alike random tokens become by depth before training, beside theory: table, CSV, JSON and a figure."""
    from attnlens.atomic import FileSet
    from attnlens.cli.console import note, tracked, write_stdout
    from attnlens.cli.initialising import parse_pairs
    from attnlens.cli.inspecting import figure_folder
    from attnlens.cli.terminal import print_wide
    from attnlens.figures import save_figures
    from attnlens.provenance import run_provenance
    from attnlens.signal.arms import ARMS
    from attnlens.signal.figure import draw_signal
    from attnlens.signal.propagation import propagate

    found = propagate(
        model,
        ARMS if arms is None else [word.strip() for word in arms.split(",") if word.strip()],
        depth=depth,
        tokens=tokens,
        seeds=seeds,
        sequences=sequences,
        skips=skips,
        norms=norms,
        mlp=None if mlp is None else mlp.value,
        eta=eta,
        options=parse_pairs("--option", options or []),
        progress=tracked("networks"),
    )
    folder = figure_folder(output, found.model)
    record = {**found.to_json(), "provenance": {**run_provenance(), "command": shlex.join(["attnlens", *sys.argv[1:]])}}
    text = json.dumps(record, indent=1)
    with FileSet() as files:
        save_figures({"signal": draw_signal(found)}, folder, format_.value, dpi, into=files.write)
        files.write(folder / "signal.csv", methodcaller("write", found.table.to_csv().encode()))
        files.write(folder / "signal.json", methodcaller("write", f"{text}\n".encode()))
    if json_:
        write_stdout(text)
    else:
        print_wide(signal_table(found))
    note(f"wrote signal.csv, signal.json and signal.{format_.value} to {folder}")


def signal_table(found: Propagation) -> Table:
    """Build the table: an arm a row, mean over seeds and standard deviation of one seed at four depths."""
    from attnlens.cli.terminal import escape, plain_table
    from attnlens.signal.figure import describe

    table = plain_table(
        title=f"[bold]{escape(found.model)}[/bold]: mean cosine of two tokens behind a block",
        caption=f"{describe(found)[:-1]}\n± standard deviation over seeds; error: of the kernel, relative to theory; "
        "by chance: expected of\nrandom coordinates; entries: mean square of the tokens behind the last block",
    )
    layers = sorted({0, round(found.depth / 4), round(found.depth / 2), found.depth})
    names = ["arm", *(f"block {layer}" if layer else "input" for layer in layers)]
    for name in (*names, "theory", "error", "by chance", "entries"):
        table.add_column(name, justify="left" if name == "arm" else "right", no_wrap=True)
    for arm in found.arms:
        cosine, error = found.curve(arm, "cosine"), found.curve(arm, "kernel_error")[:, -1].mean()
        theory, chance = (found.curve(arm, name)[0, -1] for name in ("theory_cosine", "theory_error"))
        cells = [_spread(cosine[:, layer]) for layer in layers]
        last = [_cell(value) for value in (theory, error, chance)]
        table.add_row(arm, *cells, *last, f"{found.curve(arm, 'mean_square')[:, -1].mean():.1e}")
    return table


def _spread(values: Array) -> str:
    """Write mean ± standard deviation over seeds; the mean alone of one seed."""
    mean = f"{values.mean():.3f}"
    return f"{mean} ± {values.std(ddof=1):.3f}" if len(values) > 1 else mean


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}" if value >= 5e-4 else f"{value:.0e}"
