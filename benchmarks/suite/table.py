"""The tables in docs/benchmarks.md, made from benchmarks/results/suite.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnlens.atomic import write_text_atomic
from benchmarks.suite.cases import by_name

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
START, END = "<!-- made by python -m benchmarks.suite -->", "<!-- end -->"
TITLES = {
    "spectra": "Norm, mean diagonal and singular values of each head's W_QK",
    "eigenvalues": "Eigenvalues of each head's W_QK",
    "whole": "Singular values of the stored query matrix, all heads side by side",
}
HEAD = ("tool", "CPU time, 1 thread", "ratio", "wall time, 2 threads", "ratio", "memory", "ratio", "apart")


def seconds(value: float) -> str:
    """Return a time in the unit that suits it."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1000:.3g} ms"


def row(tool: str, measured: dict[str, Any], apart: dict[str, float] | None) -> str:
    """Return a tool's row; what was not measured is a dash."""
    cells = [tool]
    for threads, kind in (("1", "cpu_seconds"), ("2", "seconds")):
        entry = measured["threads"].get(threads)
        if entry is None:
            cells += ["-", "-"]
        else:
            cells += [f"{seconds(entry[kind]['median'])} (n = {entry['n']})", f"{entry[f'{kind}_ratio']:.3g}"]
    cells += [f"{measured['peak_mb']:.3g} MB", f"{measured['memory_ratio']:.3g}"]
    cells.append(f"{max(apart.values()):.0e}" if apart else "reference")
    return f"| {' | '.join(cells)} |"


def tables(result: dict[str, Any]) -> str:
    """Return a table for each task and size, and below them where they were made."""
    parts = []
    for task, title in TITLES.items():
        for case, tasks in result["measured"].items():
            if task not in tasks:
                continue
            apart = result["agreement"][case][task]
            rows = [row(tool, measured, apart.get(tool)) for tool, measured in tasks[task].items()]
            name = f"**{title}. {by_name(case).title}**"
            parts.append("\n".join([name, "", f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD), *rows]))
    return "\n\n".join([*parts, footer(result)])


def footer(result: dict[str, Any]) -> str:
    """Return one sentence with machine, versions and load."""
    machine = result["machine"]
    libraries = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    before, after = (result["load_average"][when][0] for when in ("before", "after"))
    return (
        f"`{result['command']}` on {result['time'][:10]}: {machine['cpu']}, {machine['cpus']} cores, load average "
        f"{before:.1f} before and {after:.1f} after. {libraries}. BLAS: {', '.join(machine['blas'])}."
    )


def fill(result: dict[str, Any], page: Path = PAGE) -> str:
    """Return the page's text with the tables between its two marks made anew.

    Raises `ValueError` where the page lacks the marks.
    """
    head, start, rest = page.read_text().partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{page.name} lacks the marks {START} and {END}")
    return f"{head}{START}\n{tables(result)}\n{END}{tail}"


def write(result: dict[str, Any], page: Path = PAGE) -> None:
    """Write the tables into the page."""
    write_text_atomic(page, fill(result, page))
