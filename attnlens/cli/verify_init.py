"""The command ``verify-init``: read a network, compare it with an initialiser, judge it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

import attnlens
from attnlens.cli import options
from attnlens.cli.console import note, write_lines, write_stdout
from attnlens.cli.init import choose_initialiser
from attnlens.cli.sheet import Sheet
from attnlens.cli.tables import escape, number, print_sheet
from attnlens.errors import UsageError
from attnlens.words import counted, numbered

if TYPE_CHECKING:
    from attnlens.inits import Check, VerifyReport


def verify_init(
    model: Annotated[
        str | None,
        typer.Argument(
            help="timm name (with or without tag), hf-hub: or local-dir: name, checkpoint file or folder; default: "
            "what --checkpoint says it is of."
        ),
    ] = None,
    checkpoint: options.Checkpoint = None,
    model_args: options.ModelArgs = None,
    init: options.InitName = None,
    params: options.ParamsFile = None,
    gains: options.Gains = None,
    pairs: options.InitOptions = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Compare whole matrices with the draw of this seed. Default: the seed that the file states; where it "
            "states none, compare statistics.",
        ),
    ] = None,
    json_: options.Json = False,
) -> None:
    """Compare attention or filters with what an initialiser makes, and name known mistakes: exit code 1 if it fails.

    A file written by `attnlens init` says itself what to compare it with.
    """
    if model is None and checkpoint is None:
        raise UsageError(
            "verify-init needs a network to look at: give --checkpoint FILE for a file that attnlens init wrote, MODEL "
            "--checkpoint FILE --init NAME for another"
        )
    name, given = choose_initialiser(init, params, pairs, gains)
    arguments = options.parse_model_args(model_args)
    report = attnlens.verify_init(model, checkpoint, init=name, seed=seed, model_args=arguments, **given)
    if json_:
        write_stdout(json.dumps(report.to_json(), indent=1))
    else:
        print_sheet(verify_table(report))
        write_lines(findings(report))
    for item in report.skipped:
        note(f"not compared: {item.name} {item.circuit} {item.reason}".replace("  ", " "))
    if not report.passed:
        raise typer.Exit(1)


def verify_table(report: VerifyReport) -> Sheet:
    """Build the table: a row for each layer and circuit, means over its heads and the worst deviation."""
    seed = "no seed" if report.seed is None else f"seed {report.seed}"
    how = "whole matrices" if report.whole else "statistics"
    products = any(check.circuit in ("qk", "ov") for check in report.checks)
    what = f"{report.fold} products" if products else "depthwise filters"
    table = Sheet(
        title=f"[bold]{escape(report.model)}[/bold] against {escape(report.init)}, {seed}: {what}, {how}",
        caption="means over heads; worst: largest deviation, of the matrix relative to its "
        "norm, else of α and β in units of their tolerance; of filters without a seed, "
        "of their covariance relative to its norm",
    )
    table.number("layer", key=True)
    table.label("circuit", key=True)
    table.number("n", "requested α, β", "expected α, β", "found α, β")
    table.number("worst", "passed", group=1)
    groups = dict.fromkeys((check.layer, check.circuit, isinstance(check.head, str)) for check in report.checks)
    for layer, circuit, summed in groups:
        rows = [c for c in report.checks if (c.layer, c.circuit, isinstance(c.head, str)) == (layer, circuit, summed)]
        titles = {"bias": "biases", "filters": "filters", "ov": "OV sum" if summed else "OV"}
        title = titles.get(circuit, circuit.upper())
        pairs = [_pair(rows, kind) for kind in ("requested_", "expected_", "")]
        passed = sum(row.passed for row in rows)
        mark = f"{passed}/{len(rows)}" if passed == len(rows) else f"[bold red]{passed}/{len(rows)}[/bold red]"
        table.add_row(str(layer), title, str(len(rows)), *pairs, _worst(rows), mark)
    return table


def _pair(rows: list[Check], kind: str) -> str:

    alpha, beta = (sum(getattr(row, f"{kind}{name}") for row in rows) / len(rows) for name in ("alpha", "beta"))
    return "" if math.isnan(alpha) else f"{number(alpha)}, {number(beta)}"


def _worst(rows: list[Check]) -> str:

    errors = [row.matrix_error for row in rows if not math.isnan(row.matrix_tolerance)]
    if errors:
        return f"{max(errors):.1e}"
    away = [
        abs(getattr(row, name) - getattr(row, f"expected_{name}")) / getattr(row, f"{name}_tolerance")
        for row in rows
        for name in ("alpha", "beta")
    ]
    return f"{max(away):.2f}"


def findings(report: VerifyReport) -> list[str]:
    """Say in lines what failed: recognised mistakes first, then one line for each kind of other problem."""
    lines = []
    for name, checks in report.mistakes.items():
        kind = checks[0].circuit.upper() if len({c.circuit for c in checks}) == 1 else "QK and OV"
        where = f"{counted(len(checks), f'{kind} product')}, {numbered({c.layer for c in checks}, 'layer')}"
        lines.append(
            f"known mistake: {name} ({where}), "
            f"e.g. {checks[0].name} {checks[0].circuit.upper()} head {checks[0].head}: {checks[0].problem}"
        )
    others = [check for check in report.checks if not check.passed and not check.mistake]
    lines += [f"failed: {c.name} {c.circuit.upper()} head {c.head}: {c.problem}" for c in others[:8]]
    if len(others) > 8:
        lines.append(f"failed: {len(others) - 8} more (--json lists them all)")
    passed = sum(check.passed for check in report.checks)
    lines.append(f"{'passed' if report.passed else 'FAILED'}: {passed} of {counted(len(report.checks), 'check')}")
    return lines
