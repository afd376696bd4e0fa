"""The table in docs/benchmarks.md of what the commands take, made from benchmarks/results/speed.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnlens.atomic import write_text_atomic
from benchmarks.speed.rows import ROWS, UNITS, Quantity, Row

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
START, END = "<!-- made by python -m benchmarks.speed -->", "<!-- end of speed -->"
HEAD = ("what", "wall, s", "CPU, s", "peak, MiB", "private, MiB", "n", "goals")


def cells(values: dict[str, Any]) -> list[str]:
    """Return medians of time and memory, and n."""
    times = [f"{values[name]['median']:.3g}" for name in ("wall", "cpu")]
    return [*times, *(f"{values[name]['median']:.0f}" for name in ("peak_mib", "private_mib")), str(values["n"])]


def goals(row: Row, entry: dict[str, Any], result: dict[str, Any]) -> str:
    """Say of every goal whether it is met, else by how much not, and why."""
    said, missed = [], False
    for quantity, goal in row.goals.items():
        value = found(row, entry, result, quantity)
        if value is None:
            continue
        missed |= value > goal
        over = f"missed by {value - goal:.3g}, {value / goal:.2f} times" if value > goal else "met"
        said.append(f"{goal:.3g} {UNITS[quantity]}: {over} ({value:.3g})")
    return "; ".join(said) + (f". Why: {row.why}" if missed else "")


def found(row: Row, entry: dict[str, Any], result: dict[str, Any], quantity: Quantity) -> float | None:
    """Return the median that a goal is about; None where it was not measured."""
    if quantity == "busy":
        return entry["busy"]["wall"]["median"] if "busy" in entry else None
    if quantity == "private_mib":
        below = result.get(row.above)
        return entry[quantity]["median"] - below[quantity]["median"] if below else None
    return float(entry[quantity]["median"])


def table(result: dict[str, Any]) -> str:
    """Return the table, with what stands beside each row below it, and where all was measured."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    for name, entry in result.items():
        row = ROWS[name]
        lines.append(f"| {' | '.join([row.title, *cells(entry), goals(row, entry, result)])} |")
        for title, other in entry.get("rivals", {}).items():
            words = cells(other) if "wall" in other else ["-"] * 5
            says = row.rivals[title].says if "wall" in other else other["failed"]
            lines.append(f"| *{title}* | {' | '.join(words)} | {says} |")
    return "\n".join([*lines, "", *dict.fromkeys(footer(entry["machine"]) for entry in result.values())])


def footer(machine: dict[str, Any]) -> str:
    """Return one sentence with machine, versions, threads and load."""
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    threads = ", ".join(f"{name} {value}" for name, value in machine["threads"].items())
    return (
        f"`{machine['command'].strip()}` on {machine['time'][:16]}: {machine['processor']}, {machine['cpus']} cores, "
        f"{machine['cores']['free']} of them free; load average {machine['load'][0]:.1f} before and "
        f"{machine['load_after'][0]:.1f} after. {threads}. Python {machine['python']}, {versions}."
    )


def fill(result: dict[str, Any], page: Path = PAGE) -> str:
    """Return the page's text with the table between its two marks made anew; raises `ValueError` without the marks."""
    head, start, rest = page.read_text().partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{page.name} lacks the marks {START} and {END}")
    return f"{head}{START}\n{table(result)}\n{END}{tail}"


def write(result: dict[str, Any], page: Path = PAGE) -> None:
    """Write the table into the page."""
    write_text_atomic(page, fill(result, page))
