"""The command ``scan``: measure what is missing, print the table, write tables and the landscape."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import attnlens
from attnlens.cli import options
from attnlens.cli.console import command_line, note, tracked, write_lines, write_stdout
from attnlens.cli.sheet import Sheet
from attnlens.cli.tables import escape, number, print_sheet
from attnlens.errors import AttnlensError
from attnlens.words import counted

if TYPE_CHECKING:
    from attnlens.circuits import Fold
    from attnlens.scans.run import Scan

_STATISTICS = ("qk_ratio", "qk_diagonal_prominence", "ov_ratio", "ov_diagonal_prominence", "ov_negative_share")
_HEADINGS = ("QK β/α", "prom", "OV β/α", "prom", "OV β < 0")


def scan(
    patterns: Annotated[
        list[str],
        typer.Argument(
            metavar="PATTERN...",
            help="Names as for inspect; shell patterns over timm's pretrained names: 'vit_*dinov2*'; folders and "
            "files: 'runs/**'; ARCHITECTURE=FILES for files that do not say what they are of; @FILE, a list of these.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Write results, tables and figure to this folder, or go on in it.")
    ],
    fold: options.Folds = "both",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Measure so many models at a time. Default: one a core, here or of the cluster."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Run on the Ray cluster at this address, or auto. Default: in processes here.",
        ),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Measure again what failed. Default: only what is missing.")
    ] = False,
    num_heads: options.NumHeads = None,
    row_order: options.RowOrder = None,
    list_: Annotated[bool, typer.Option("--list", help="Print only the models that would be measured.")] = False,
    offline: options.Offline = False,
    remote: options.Remote = False,
    format_: options.FigureFormat = "png",
    dpi: options.Dpi = None,
    style: options.FigureStyle = "default",
    figure_width: options.FigureWidth = None,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Inspect every model the patterns match: a result file each, one table, one figure; stopped, it can go on."""
    from attnlens.scans.plan import plan_scan

    options.draw_in(style, figure_width, format_, dpi)
    if list_:
        plan = plan_scan(patterns)
        write_lines(job.name for job in plan.jobs)
        for message in plan.notes:
            note(message)
        return
    try:
        scanned = attnlens.scan(
            patterns,
            output,
            fold=fold,
            workers=workers,
            ray=ray,
            retry_failed=retry_failed,
            num_heads=num_heads,
            row_order=row_order,
            offline=offline,
            remote=remote,
            force=force,
            figure=format_,
            command=command_line(),
            progress=tracked("models"),
        )
    except KeyboardInterrupt:
        kept = len(list((output / "models").glob("*.json")))
        if kept:
            note(f"stopped: {counted(kept, 'result')} in {output / 'models'}; the same command goes on from there")
        raise
    for message in scanned.notes:
        note(message)
    shown: Fold = "effective" if "effective" in scanned.folds else (scanned.folds or ("raw",))[0]
    if json_:
        write_stdout(scanned.text)
    else:
        print_sheet(model_table(scanned, shown))
    for name, result in scanned.results.items():
        for label in result.get("labels", ()):
            note(f"{name}: {label}")
    for name, error in scanned.failed.items():
        note(f"failed: {name}: {error}")
    read = len(scanned.results) - len(scanned.failed)
    earlier = len(scanned.results) - scanned.measured
    note(
        f"{counted(len(scanned.results), 'model')}: {read} read, {len(scanned.failed)} failed, {earlier} of them done "
        "before" + (f"; {counted(scanned.lost, 'model')} begun again after its worker was lost" if scanned.lost else "")
    )
    note(f"wrote scan.csv, layers.csv, scan.json, landscape.{format_} and models/ to {output}")
    if not read:
        every = counted(len(scanned.results), "model")
        none = "the model could not" if len(scanned.results) == 1 else f"none of {every} could"
        raise AttnlensError(f"{none} be read: the errors are above and in scan.csv")


def model_table(scanned: Scan, fold: Fold) -> Sheet:
    """Build the table of one fold: a row a model, medians over its layers."""
    table = Sheet(
        title=f"[bold]{counted(len(scanned.results), 'model')}[/bold]: {fold} products, M ~ α Z + β I",
        caption="medians over layers; QK: mean over heads, OV: sum over heads; prom = mean(diag) / sd(off-diag)\n"
        "OV β < 0: share of layers",
    )
    table.label("model", key=True, least=16)
    table.number("layers", "heads", *_HEADINGS)
    for row in scanned.rows():
        if row["status"] == "ok" and row["fold"] == fold:
            layers = f"{row['layers']}" if row["layers"] == row["depth"] else f"{row['layers']}/{row['depth']}"
            table.add_row(escape(row["model"]), layers, row["heads"], *(_cell(row, name) for name in _STATISTICS))
        elif row["status"] != "ok":
            table.add_row(escape(row["model"]), "failed", style="dim")
    return table


def _cell(row: dict[str, Any], name: str) -> str:

    value = row[name]
    if value is None:
        return ""
    if name == "ov_negative_share":
        return f"{value:.0%}"
    return f"{value:.1f}" if name.endswith("prominence") else number(value)
