"""Time and memory of attnlens, TransformerLens' FactoredMatrix, WeightWatcher and the dense way on the same tensors.

    python -m benchmarks.suite
    python -m benchmarks.suite --case vit_s --runs 3 --output suite.json   # one size; the page is left alone

1. Every tool does each task in a process of its own, one BLAS thread: its peak of anonymous memory is taken and its
   numbers are compared with the dense float64 way's. Where they disagree nothing is timed and the command fails.
2. --runs times, in turn: every tool in a fresh process, with one BLAS thread and then with two (--threads), does each
   task for at least 0.3 s. The result is the median over processes, of wall and of CPU time.

A task on which a tool has spent more than --budget seconds is not repeated. A process that takes longer than --limit
seconds is ended and what it had not begun or finished is missing from the table: on a machine that is busy otherwise,
two threads that wait for each other take a hundred times as long. Tools that are not installed are left out and named.
Writes benchmarks/results/suite.json and the tables in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from attnlens.atomic import write_text_atomic
from benchmarks.suite.agreement import Apart, differences, disagreements
from benchmarks.suite.cases import CASES, Case, by_name
from benchmarks.suite.methods import REFERENCE, TOOLS
from benchmarks.suite.table import write
from benchmarks.suite.worker import found_file

RESULTS = Path(__file__).parents[1] / "results" / "suite.json"
PACKAGES = ("attnlens", "numpy", "scipy", "torch", "transformer-lens", "weightwatcher")
VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Lines = dict[str, dict[str, Any]]


def work(tool: str, folder: Path, threads: str, what: str, cells: list[str], limit: float) -> Lines:
    """Run the worker in a fresh process; return what it printed, by cell."""
    environment = {**os.environ, **dict.fromkeys(VARIABLES, threads)}
    command = [sys.executable, "-m", "benchmarks.suite.worker", tool, str(folder), what, *cells]
    try:
        text = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, timeout=limit).stdout
    except subprocess.TimeoutExpired as error:
        print(f"{tool}, {threads} threads: ended after {limit:.0f} s", file=sys.stderr, flush=True)
        text = error.stdout or b""
    lines = [
        json.loads(line) for line in text.decode().splitlines() if line.startswith("{")
    ]  # WeightWatcher prints too
    return {line.pop("cell"): line for line in lines}


def cells_of(tool: str, cases: Iterable[Case]) -> list[str]:
    return [f"{case.name}/{task}" for case in cases for task in case.tasks if task in TOOLS[tool].tasks]


def compare(cases: list[Case], folder: Path) -> dict[str, dict[str, dict[str, Apart]]]:
    """Return by case, task and tool how far the numbers kept in ``folder`` are from the dense float64 way's."""
    apart: dict[str, dict[str, dict[str, Apart]]] = {}
    for case in cases:
        for task in case.tasks:
            found = {}
            for tool in TOOLS:
                file = found_file(folder, case.name, task, tool)
                if file.exists():
                    with np.load(file) as stored:
                        found[tool] = dict(stored)
            reference = found.pop(REFERENCE)
            apart.setdefault(case.name, {})[task] = {
                tool: differences(numbers, reference, case.embed_dim) for tool, numbers in found.items()
            }
    return apart


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(
    tools: list[str], cases: list[Case], folder: Path, threads_counts: list[int], runs: int, budget: float, limit: float
) -> Iterator[Any]:
    """Yield after each run the times so far, by cell, tool and number of threads."""
    timed: Any = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for turn in range(runs):
        for threads in map(str, threads_counts):
            for tool in tools:
                cells = [
                    cell
                    for cell in cells_of(tool, cases)
                    if sum(run["seconds"] * run["repeats"] for run in timed[cell][tool][threads]) < budget
                    and len(timed[cell][tool][threads]) == turn  # one that was ended once is not begun again
                ]
                if cells:
                    for cell, line in work(tool, folder, threads, "seconds", cells, limit).items():
                        timed[cell][tool][threads].append(line)
        print(f"run {turn + 1} of {runs} done", file=sys.stderr, flush=True)
        yield timed


def summarised(timed: Any, memory: dict[str, Lines], tools: list[str], cases: list[Case]) -> dict[str, Any]:
    """Return by case, task and tool the medians and their ratios to attnlens'."""
    found: dict[str, Any] = {}
    for case in cases:
        for task in case.tasks:
            cell = f"{case.name}/{task}"
            rows: dict[str, Any] = {}
            for tool in tools:
                if cell not in memory[tool]:
                    continue
                row: dict[str, Any] = {"peak_mb": memory[tool][cell]["peak_mb"], "threads": {}}
                for threads, lines in timed[cell][tool].items():
                    if lines:
                        kinds = ("seconds", "cpu_seconds")
                        row["threads"][threads] = {"n": len(lines)}
                        row["threads"][threads] |= {kind: summary([line[kind] for line in lines]) for kind in kinds}
                rows[tool] = row
            base = rows["attnlens"]
            for row in rows.values():
                row["memory_ratio"] = row["peak_mb"] / base["peak_mb"]
                for threads, entry in row["threads"].items():
                    for kind in ("seconds", "cpu_seconds"):
                        entry[f"{kind}_ratio"] = entry[kind]["median"] / base["threads"][threads][kind]["median"]
            found.setdefault(case.name, {})[task] = rows
    return found


def machine() -> dict[str, Any]:
    """Return the processor and the BLAS libraries that numpy, scipy and torch bring."""
    import scipy.linalg  # noqa: F401  loads its BLAS
    import torch
    from threadpoolctl import threadpool_info

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    blas = {f"{info['internal_api']} {info['version']}" for info in threadpool_info() if info["user_api"] == "blas"}
    if torch.backends.mkl.is_available():
        blas.add("mkl (torch)")
    return {"cpu": cpu, "cpus": len(os.sched_getaffinity(0)), "blas": sorted(blas)}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(
    case: Annotated[list[str] | None, typer.Option(help="Only these sizes.")] = None,
    runs: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[list[int] | None, typer.Option(help="BLAS threads; 1 and 2 where it is not given.")] = None,
    budget: Annotated[float, typer.Option(help="Seconds a tool may spend on a task before its last run.")] = 60,
    limit: Annotated[float, typer.Option(help="Seconds a process may take.")] = 600,
    output: Annotated[Path, typer.Option()] = RESULTS,
) -> None:
    """Compare, then measure, then write."""
    cases = [by_name(name) for name in case] if case else list(CASES)
    missing = sorted({tool.needs for tool in TOOLS.values() if tool.missing and tool.needs})
    if missing:
        print(f"not installed and left out: {', '.join(missing)} (pip install --group bench)", file=sys.stderr)
    tools = [name for name, tool in TOOLS.items() if not tool.missing]
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for one in cases:
            W_Q, W_K = one.draw()
            np.savez(folder / f"{one.name}.npz", W_Q=W_Q, W_K=W_K)
        memory = {tool: work(tool, folder, "1", "memory", cells_of(tool, cases), limit) for tool in tools}
        apart = compare(cases, folder)
        wrong = [f"{name}: {line}" for name, found in apart.items() for line in disagreements(found)]
        if wrong:
            sys.exit("the tools disagree, nothing is timed:\n" + "\n".join(wrong))
        print("the tools agree", file=sys.stderr, flush=True)
        about = {
            "command": " ".join(["python -m benchmarks.suite", *sys.argv[1:]]),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(),
            "not_installed": missing,
        }
        for timed in measure(tools, cases, folder, threads or [1, 2], runs, budget, limit):
            load = {"before": before, "after": os.getloadavg()}
            measured = summarised(timed, memory, tools, cases)
            result = {**about, "load_average": load, "agreement": apart, "measured": measured}
            write_text_atomic(output, json.dumps(result, indent=1) + "\n")
    if output == RESULTS:
        write(json.loads(output.read_text()))


if __name__ == "__main__":
    typer.run(main)
