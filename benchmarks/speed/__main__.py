"""Measure every command's wall time, CPU time and peak memory in processes of its own, beside goals and other ways.

    python -m benchmarks.speed                              # some six minutes, 5 GB of temporary disk
    python -m benchmarks.speed --rows inspect,help --repeats 5

Each row's command runs once unrecorded, which fills the caches of what is warm, then --repeats times, in turn with the
other rows. Rows with a goal for it run once more beside a process that keeps one core busy. A cold run has an empty
cache of attnlens and a file whose pages the operating system forgot; matplotlib's list of fonts is there, and Python's
bytecode, as behind an installation.
Weights are random (timm's own draws for ViT-B; of the giant, only attention is not zero): eigenvalues and fits of
trained ones may take another number of steps. The ViT-S is DINOv2's, from $ATTNLENS_TEST_DATA, where that is set.
WeightWatcher and TransformerLens run where --bench-python, an interpreter with the group ``bench``, has them.
Writes benchmarks/results/speed.json, rows that are not chosen staying as they are, and the table in docs/benchmarks.md.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from attnlens.atomic import write_text_atomic
from attnlens.threads import available_cores, free_cores
from benchmarks.speed.process import Run, busy_process, evicted, run, summary
from benchmarks.speed.rows import ROWS, Rival, Row
from benchmarks.speed.table import write
from benchmarks.speed.weights import weights_file

RESULTS = Path(__file__).parents[1] / "results" / "speed.json"
PACKAGES = ("attnlens", "numpy", "scipy", "torch", "timm", "matplotlib", "safetensors")
LONGEST = 1800.0
"""Seconds after which a command of attnlens hangs."""
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Bench:
    """Runs rows in one temporary folder."""

    def __init__(self, folder: Path, bench_python: str, limit: float) -> None:
        self.folder, self.bench_python, self.limit = folder, bench_python, limit
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "XDG_CACHE_HOME": str(folder / "cache"),
            "MPLCONFIGDIR": str(folder / "matplotlib"),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        }

    def row(self, row: Row) -> Run | None:
        """Run a row once; None where its weights are not at hand."""
        weights = weights_file(row.weights, self.folder)
        if weights is None:
            return None
        with tempfile.TemporaryDirectory(dir=self.folder) as out:
            environment = self.environment
            if row.cold:
                evicted(weights)
                environment = {**environment, "XDG_CACHE_HOME": str(Path(out) / "cache")}
            return inside(row, run(row.make(weights, Path(out)), environment, LONGEST))

    def rival(self, row: Row, rival: Rival) -> Run | str:
        """Run another way once, or say why it cannot be run."""
        weights = weights_file(row.weights, self.folder)
        python = self.bench_python if rival.needs else sys.executable
        if rival.needs and not imports(python, rival.needs):
            return f"{rival.needs} is not installed"
        try:
            process = [python, *rival.make(weights, self.folder)[1:]]
            return inside(row, run(process, self.environment, self.limit))
        except subprocess.TimeoutExpired:
            return f"ended after {self.limit:.0f} s"
        except subprocess.CalledProcessError as error:
            return str(error.stderr).strip().splitlines()[-1]


def imports(python: str, module: str) -> bool:
    """Whether an interpreter has a module."""
    code = f"import sys, importlib.util; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def inside(row: Row, found: Run) -> Run:
    """Return a run with the times that its process printed, where the row is about a part of it."""
    if not row.timed_inside:
        return found
    wall, cpu = found.output.split()[-2:]
    return found._replace(wall=float(wall), cpu=float(cpu))


def machine() -> dict[str, Any]:
    """Return what a time depends on."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(sys.argv[1:]),
        "cpus": os.cpu_count(),
        "cores": {"available": available_cores(), "free": free_cores()},
        "processor": cpu_name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "threads": {name: os.environ.get(name, "not set") for name in THREADS},
        "load": os.getloadavg(),
    }


def command(arguments: Sequence[str]) -> str:
    """Return the line that ran, of whole paths their last names alone."""
    words = [Path(word).name if Path(word).is_absolute() else word for word in arguments]
    return shlex.join(["python", "-m", "benchmarks.speed", *words])


def cpu_name() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(
    rows: Annotated[str, typer.Option(help="Measure these alone, separated by commas.")] = ",".join(ROWS),
    repeats: Annotated[int, typer.Option(min=1, help="Record so many runs of each.")] = 3,
    rivals: Annotated[bool, typer.Option(help="Run the other ways too, once each.")] = True,
    bench_python: Annotated[
        str, typer.Option(help="Interpreter that has WeightWatcher and TransformerLens.")
    ] = sys.executable,
    limit: Annotated[float, typer.Option(help="End another way that takes longer, in seconds.")] = 120.0,
    folder: Annotated[
        Path | None, typer.Option(help="Keep the random weights here. Default: a temporary folder.")
    ] = None,
) -> None:
    """Measure, and write the result and the table."""
    chosen = {name: ROWS[name] for name in rows.split(",")}
    about, begun = machine(), time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(folder or Path(temporary), bench_python, limit)
        found = measure(bench, chosen, repeats, rivals)
    about |= {"seconds": round(time.perf_counter() - begun), "load_after": os.getloadavg()}
    old = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    result = {**old, **{name: {**entry, "machine": about} for name, entry in found.items()}}
    result = {name: result[name] for name in ROWS if name in result}
    write_text_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    write(result)


def measure(bench: Bench, rows: dict[str, Row], repeats: int, rivals: bool) -> dict[str, dict[str, Any]]:
    """Return what each row took."""
    runs: dict[str, list[Run]] = {}
    for turn in range(repeats + 1):
        for name, row in rows.items():
            if turn and (name not in runs or (row.once and turn > 1)):
                continue
            before = os.getloadavg()[0]
            taken = bench.row(row)
            if taken is None:
                say(f"{name}: left out, its weights are not in $ATTNLENS_TEST_DATA")
                continue
            kept = runs.setdefault(name, [])
            kept += [taken] if turn else []
            say(
                f"{name}: {taken.wall:.2f} s, {taken.cpu:.2f} s CPU, {taken.peak_mib:.0f} MiB, load before {before:.1f}"
            )
    found = {name: summary(kept) for name, kept in runs.items()}
    for name in [name for name in found if "busy" in rows[name].goals]:
        with busy_process():
            taken = bench.row(rows[name])
        assert taken is not None
        found[name]["busy"] = summary([taken])
        say(f"{name}, beside a busy process: {taken.wall:.2f} s, {taken.cpu:.2f} s CPU")
    for name, title, rival in [(n, t, r) for n in found if rivals for t, r in rows[n].rivals.items()]:
        other = bench.rival(rows[name], rival)
        found[name].setdefault("rivals", {})[title] = summary([other]) if isinstance(other, Run) else {"failed": other}
        say(f"{name}, {title}: {f'{other.wall:.2f} s, {other.cpu:.2f} s CPU' if isinstance(other, Run) else other}")
    return found


if __name__ == "__main__":
    typer.run(main)
