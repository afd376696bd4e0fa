"""The command ``signal``: measure networks at their start; print a table, write it and a figure."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from attnlens.cli import options
from attnlens.cli.console import command_line, note, tracked, write_stdout
from attnlens.cli.sheet import Sheet
from attnlens.cli.tables import escape, print_sheet
from attnlens.outputs import Outputs

if TYPE_CHECKING:
    from attnlens.heads import Array
    from attnlens.signal.propagation import Propagation


def signal(
    model: Annotated[
        str | None,
        typer.Argument(help="timm name of a plain ViT, model folder or gpt-tiny; default: as the shipped ViT."),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Measure these arms, separated by commas: softmax, value-skipinit, shaped, e-spa, u-spa, and every "
            "initialiser that needs no option. Default: default, mimetic and these five."
        ),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, max=options.MOST_BLOCKS, help="Build so many blocks. Default: the model's.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=2, max=1 << 16, help="Feed so many patches, a square, or so long a context. Default: the model's."
        ),
    ] = None,
    skips: Annotated[bool, typer.Option("--skips/--no-skips", help="Keep the skip connections of every block.")] = True,
    norms: Annotated[bool, typer.Option("--norms/--no-norms", help="Keep the norms of every block.")] = True,
    mlp: Annotated[
        Literal["keep", "tailored", "none"] | None,
        typer.Option(
            help="Keep the MLPs, tailor them to the depth, or drop them. Default: keep with skips, tailored without."
        ),
    ] = None,
    eta: Annotated[
        float,
        typer.Option(min=0, max=1, help="Tailor MLPs so that alone they bring orthogonal tokens to this cosine."),
    ] = 0.2,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            help="Pass name=value to the arms that have it, as often as needed: gamma, distance (e-spa), rho (u-spa).",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, max=9999, help="Draw so many networks an arm.")] = 5,
    sequences: Annotated[
        int, typer.Option(min=1, max=9999, help="Feed so many random sequences of tokens to each network.")
    ] = 4,
    output: options.ModelFolder = None,
    format_: options.FigureFormat = "png",
    dpi: options.Dpi = None,
    style: options.FigureStyle = "default",
    figure_width: options.FigureWidth = None,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Measure how alike random tokens become by depth before training, beside theory: table, CSV, JSON and a figure."""
    from operator import methodcaller

    from attnlens.atomic import FileSet
    from attnlens.figures import save_figures
    from attnlens.provenance import run_provenance
    from attnlens.signal.arms import ARMS
    from attnlens.signal.propagation import propagate

    options.draw_in(style, figure_width, format_, dpi)
    outputs = Outputs.of(model, force=force)
    if output is not None:
        outputs.folder(output, ("signal.csv", "signal.json"))
    propagation = propagate(
        model,
        ARMS if arms is None else options.split_words(arms),
        depth=depth,
        tokens=tokens,
        seeds=seeds,
        sequences=sequences,
        skips=skips,
        norms=norms,
        mlp=mlp,
        eta=eta,
        options=options.parse_pairs("--option", pairs),
        progress=tracked("networks"),
    )
    folder = options.figure_folder(output, [propagation.model], model)
    record = {
        "schema": "attnlens.signal",
        "schema_version": 1,
        **propagation.to_json(),
        "provenance": {**run_provenance(), "command": command_line()},
    }
    with FileSet(outputs.check) as files:
        save_figures({"signal": propagation.figure()}, folder, into=files.write)
        files.write(folder / "signal.csv", methodcaller("write", propagation.table.to_csv().encode()))
        text = json.dumps({**record, "files": files.hashes()}, indent=1)
        files.write(folder / "signal.json", methodcaller("write", f"{text}\n".encode()))
    if json_:
        write_stdout(text)
    else:
        print_sheet(signal_table(propagation))
    note(f"wrote signal.csv, signal.json and signal.{format_} to {folder}")


def signal_table(propagation: Propagation) -> Sheet:
    """Build the table: an arm a row, mean over seeds and standard deviation of one seed at four depths."""
    table = Sheet(
        title=f"[bold]{escape(propagation.model)}[/bold]: mean cosine of two tokens behind a block",
        caption=f"{propagation.described()[:-1]}\n± standard deviation over seeds; error: of the kernel, relative to "
        "theory; by chance: expected of random coordinates; entries: mean square of the tokens behind the last block",
    )
    layers = sorted({0, round(propagation.depth / 4), round(propagation.depth / 2), propagation.depth})
    table.label("arm", key=True)
    table.number(*(f"block {layer}" if layer else "input" for layer in layers))
    table.number("theory", "error", "by chance", "entries", group=1)
    for arm in propagation.arms:
        cosine, error = propagation.curve(arm, "cosine"), propagation.curve(arm, "kernel_error")[:, -1].mean()
        theory, chance = (propagation.curve(arm, name)[0, -1] for name in ("theory_cosine", "theory_error"))
        cells = [_spread(cosine[:, layer]) for layer in layers]
        last = [_cell(value) for value in (theory, error, chance)]
        table.add_row(arm, *cells, *last, f"{propagation.curve(arm, 'mean_square')[:, -1].mean():.1e}")
    return table


def _spread(values: Array) -> str:
    """Write mean ± standard deviation over seeds; the mean alone of one seed."""
    mean = f"{values.mean():.3f}"
    return f"{mean} ± {values.std(ddof=1):.3f}" if len(values) > 1 else mean


def _cell(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3f}" if value >= 5e-4 else f"{value:.0e}"
