"""The command ``report``: measure one model, write one HTML file, say where."""

from __future__ import annotations

import json
from operator import methodcaller
from pathlib import Path
from typing import Annotated

import typer

from attnlens.atomic import FileSet
from attnlens.cli import options
from attnlens.cli.console import command_line, note, tracked, write_stdout
from attnlens.outputs import Outputs


def report(
    model: options.Model = None,
    checkpoint: options.Checkpoint = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="MODEL", help="Show this model beside it; may be repeated."),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option("--train", metavar="RESULTS_DIR", help="Show the curves in this output folder of train-compare."),
    ] = None,
    fold: options.Folds = "both",
    num_heads: options.NumHeads = None,
    model_args: options.ModelArgs = None,
    weights: options.Weights = None,
    row_order: options.RowOrder = None,
    offline: options.Offline = False,
    remote: options.Remote = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", parser=options.as_typed, help="Write this HTML file.")
    ] = Path("report.html"),
    table: options.TableFile = None,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Write one self-contained HTML page about a model: every head's fit, verdict, heatmaps and spectra, by depth."""
    from attnlens.reports import report as write_report
    from attnlens.reports.training import training_files

    outputs = Outputs.of(model, checkpoint, compare, files=training_files(train), force=force)
    outputs.file(output, ".html")
    if table is not None:
        outputs.file(table, ".csv")
    page = write_report(
        model,
        checkpoint,
        compare=compare or [],
        train=train,
        fold=fold,
        num_heads=num_heads,
        model_args=options.parse_model_args(model_args),
        weights=weights,
        row_order=row_order,
        offline=offline,
        remote=remote,
        command=command_line(),
        progress=tracked("layers"),
    )
    with FileSet(outputs.check) as files:
        files.write(output, methodcaller("write", page.encode()))
        if table is not None:
            files.write(table, methodcaller("write", page.to_csv().encode()))
    if json_:
        write_stdout(json.dumps(page.to_json(), indent=1))
    note(f"wrote {output}, {len(page.encode()) / 1e6:.1f} MB: one file, open it in a browser")
