"""What `attnlens init` and `attnlens verify-init` do: build, initialise, write; read, compare, judge."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from attnlens.cli.console import note, write_stdout
from attnlens.cli.inspecting import format_layers
from attnlens.cli.terminal import escape, number, plain_table, print_wide
from attnlens.errors import UsageError
from attnlens.inits import Check, VerifyReport, init_file, initialisers, verify_init
from attnlens.inits.registry import find_initialiser


def run_init(
    model: str | None,
    *,
    init: str | None,
    params: Path | None,
    options: list[str],
    model_args: list[str],
    seed: int,
    output: Path,
    as_json: bool,
    command: list[str],
) -> None:
    """Write an initialised network; print what was done, and on stderr how to load the file."""
    name, settled = _chosen(init, params, options)
    arguments = parse_pairs("--model-arg", model_args)
    report = init_file(
        model, output, init=name, seed=seed, model_args=arguments, command=shlex.join(command), **settled
    )
    if as_json:
        write_stdout(json.dumps({"init": name, "seed": seed} if report is None else report.to_json(), indent=1))
    else:
        write_stdout(f"default, seed {seed}: timm's own draw" if report is None else str(report))
    note(f"wrote {output}: timm.create_model({_call(model, arguments, output)})")


def _call(model: str | None, arguments: dict[str, Any], output: Path) -> str:
    """Write the arguments of the timm call that loads a file."""
    name = "local-dir:attnlens/embedded" if model is None else model
    return ", ".join(
        [repr(name), *(f"{key}={value!r}" for key, value in arguments.items()), f"checkpoint_path={str(output)!r}"]
    )


def run_verify(
    model: str | None,
    checkpoint: Path | None,
    *,
    init: str | None,
    params: Path | None,
    options: list[str],
    seed: int | None,
    as_json: bool,
) -> None:
    """Compare a network with an initialiser, print a table or JSON; exit code 1 where a check failed."""
    name, settled = _chosen(init, params, options, default=None)
    report = verify_init(model, checkpoint, init=name, seed=seed, **settled)
    if as_json:
        write_stdout(json.dumps(report.to_json(), indent=1))
    else:
        print_wide(verify_table(report))
        for line in findings(report):
            write_stdout(line)
    for item in report.skipped:
        note(f"not compared: {item.name} {item.circuit} {item.reason}".replace("  ", " "))
    if not report.passed:
        raise typer.Exit(1)


def _chosen(
    init: str | None, params: Path | None, options: list[str], default: str | None = "mimetic"
) -> tuple[Any, dict[str, Any]]:
    """Return the initialiser's name (``fitted`` where parameters are given) and its options."""
    settled = parse_pairs("--option", options)
    if params is not None:
        chosen = find_initialiser(init or "fitted")
        if "params" not in chosen.options and not chosen.passes_on:
            able = [name for name, one in initialisers().items() if "params" in one.options or one.passes_on]
            raise UsageError(f"--params goes with --init {', '.join(able)}, not with {init!r}")
        settled["params"] = str(params)
    return init or ("fitted" if params is not None else default), settled


def parse_pairs(option: str, pairs: list[str]) -> dict[str, Any]:
    """Parse ``name=value``: a JSON value (a number, true, [1, 2]) or else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"{option} {pair!r} is not understood: give name=value, e.g. {option} alpha_qk=0.6")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def verify_table(report: VerifyReport) -> Table:
    """Build the table: a row for each layer and circuit, means over its heads and the worst deviation."""
    seed = "no seed" if report.seed is None else f"seed {report.seed}"
    how = "whole matrices" if report.whole else "statistics"
    products = any(check.circuit in ("qk", "ov") for check in report.checks)
    what = f"{report.fold} products" if products else "depthwise filters"
    table = plain_table(
        title=f"[bold]{escape(report.model)}[/bold] against {report.init}, {seed}: {what}, {how}",
        caption="means over heads; worst: largest deviation, of the matrix relative to its\n"
        "norm, else of α and β in units of their tolerance; of filters without a seed,\n"
        "of their covariance relative to its norm",
    )
    for name in ("layer", "circuit", "n", "requested α, β", "expected α, β", "found α, β", "worst", "passed"):
        table.add_column(name, justify="left" if name == "circuit" else "right", no_wrap=True)
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
        where = f"{len(checks)} {checks[0].circuit.upper() if len({c.circuit for c in checks}) == 1 else 'QK and OV'}"
        lines.append(
            f"known mistake: {name} ({where} products, layers {format_layers(sorted({c.layer for c in checks}))}), "
            f"e.g. {checks[0].name} {checks[0].circuit.upper()} head {checks[0].head}: {checks[0].problem}"
        )
    others = [check for check in report.checks if not check.passed and not check.mistake]
    lines += [f"failed: {c.name} {c.circuit.upper()} head {c.head}: {c.problem}" for c in others[:8]]
    if len(others) > 8:
        lines.append(f"failed: {len(others) - 8} more (--json lists them all)")
    passed = sum(check.passed for check in report.checks)
    lines.append(f"{'passed' if report.passed else 'FAILED'}: {passed} of {len(report.checks)} checks")
    return lines
