"""kill -9 of one process of several: of a rank that torchrun started, while the ranks train."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.trust.fault_checks import contents, leftovers
from benchmarks.trust.fault_commands import check_comparison, comparison, finished, fresh, small_source
from benchmarks.trust.fault_kills import Kills, resumable, whole_comparison
from benchmarks.trust.fault_runs import Child, Process

RANKS = 2
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
RUNS = ["--seeds", "3", "--epochs", "3"]


def kill_ranks(wanted: int, rng: random.Random, work: Path) -> Kills:
    """Kill one rank or the other after so many runs have ended, go on without torchrun, and compare."""
    found = Kills()
    base = [*comparison(small_source(work)), *RUNS]
    whole, _, _ = whole_comparison(base, work)
    runs = sum(name.startswith("runs/") for name in whole)
    while found.kills < wanted:
        folder = fresh(work / "ranks")
        victim = rng.randrange(RANKS)
        run = Process(base, folder, [*TORCHRUN, "-m", "attnlens"])
        goal = rng.randrange(runs)
        while run.running() and not _reached(folder / "out", goal):
            time.sleep(0.002)
        killed = _kill_rank(run.process.pid, victim)
        ended = run.wait()
        found.kills += killed
        found.tally[f"kills of rank {victim}"] += killed
        found.tally["runs that had ended by then"] += len(list(folder.glob("out/runs/*.json")))
        if killed and ended.code == 0:
            found.wrong.append("torchrun tells of no failure")
        found.wrong += check_comparison(folder / "out", whole, found.tally)
        found.most_leftovers = max(found.most_leftovers, len(leftovers(folder)))
        finished(Child(resumable(base, folder), folder).wait())
        found.after_next_run += len(leftovers(folder))
        equal = contents(folder / "out") == whole
        found.tally["comparisons resumed to their end"] += 1
        found.tally["of those equal to the one never killed"] += equal
        if not equal:
            found.wrong.append("a comparison that lost a rank and was resumed differs from the one never killed")
    return found


def _reached(output: Path, runs: int) -> bool:
    return (output / "config.json").is_file() and len(list(output.glob("runs/*.json"))) >= runs


def children(pid: int) -> list[int]:
    """Return the processes that a process has started, from all its threads."""
    found: list[int] = []
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def _kill_rank(launcher: int, rank: int) -> bool:
    for pid in children(launcher):
        with suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
                return True
    return False
