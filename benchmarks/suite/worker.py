"""One fresh process: `python -m benchmarks.suite.worker TOOL FOLDER seconds|memory CASE/TASK...`.

Loads the libraries on a tiny case, then repeats each task on the tensors in FOLDER for at least 0.3 s and prints as a
line of JSON the median wall and CPU seconds; with ``memory`` also the peak of anonymous memory (RssAnon, sampled each
millisecond by a thread) above what was there before, and the numbers found go into FOLDER.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.suite.cases import TINY, Weights
from benchmarks.suite.methods import TOOLS, Found, Run

LEAST = 0.3
TRIM = ctypes.CDLL(None).malloc_trim
"""Gives back what the task before has freed: kept by the allocator, it would hide what the next one takes."""


class Peak(threading.Thread):
    """Watches this process's anonymous memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over = threading.Event()
        self.base = self.peak = self.now()

    def now(self) -> float:
        """Return the anonymous memory in MB."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    def run(self) -> None:
        """Take the maximum until `over` is set."""
        while not self.over.wait(0.001):
            self.peak = max(self.peak, self.now())


def found_file(folder: Path, case: str, task: str, tool: str) -> Path:
    """Return where the numbers a tool found are kept."""
    return folder / f"{case}-{task}-{list(TOOLS).index(tool)}.npz"


def repeat(run: Run, W_Q: Weights, W_K: Weights) -> tuple[dict[str, Any], Found]:
    walls: list[float] = []
    cpus: list[float] = []
    while sum(walls) < LEAST:
        wall, cpu = time.perf_counter(), time.process_time()
        found = run(W_Q, W_K)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    times = {"seconds": statistics.median(walls), "cpu_seconds": statistics.median(cpus), "repeats": len(walls)}
    return times, found


def main() -> None:
    tool, folder, what, *cells = sys.argv[1:]
    for cell in cells:
        case, task = cell.split("/")
        run = TOOLS[tool].tasks[task]
        run(*TINY.draw())
        with np.load(Path(folder) / f"{case}.npz") as stored:
            W_Q, W_K = stored["W_Q"], stored["W_K"]
        gc.collect()
        TRIM(0)
        watch = Peak()
        if what == "memory":
            watch.start()
        line, found = repeat(run, W_Q, W_K)
        watch.over.set()
        if what == "memory":
            line["peak_mb"] = watch.peak - watch.base
            np.savez(found_file(Path(folder), case, task, tool), **found)
        print(json.dumps({"cell": cell, **line}), flush=True)


if __name__ == "__main__":
    main()
