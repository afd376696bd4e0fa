"""kill -9, full and read-only disks, things that vanish, two writers, a hub that misbehaves: counted.

``python -m benchmarks.trust.faults --kills 120 --seed 0`` puts the entry "faults" into benchmarks/results/trust.json;
docs/trust-faults.md says what each count is of. Exit code 1 where anything was not as promised.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported: a forked child has no threads of its parent's

AT_ONCE = 2 * (os.cpu_count() or 1)  # more and a command's 60 seconds are too few for the load alone
ALL_DISKS = "inspect,fit-params,init,compare,compose,signal,report,scan,train-compare,caches"


def parts(given: argparse.Namespace, work: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return what is tried, by name."""
    from benchmarks.trust.fault_disks import in_namespace, permitted
    from benchmarks.trust.fault_inputs import (
        misbehaving_hub,
        two_comparisons,
        two_writers,
        vanishing_folders,
        vanishing_inputs,
    )
    from benchmarks.trust.fault_kills import kill, shares
    from benchmarks.trust.fault_planted import failing_comparison, failing_writes
    from benchmarks.trust.fault_workers import kill_ranks

    draws = given.draws

    def killed(title: str, name: str, wanted: int, own: int, rng: random.Random) -> dict[str, Any]:
        found = kill(name, wanted, own, rng, work / title)
        return {**found.to_json(), "wrong": found.wrong}

    def ranks(title: str, rng: random.Random) -> dict[str, Any]:
        found = kill_ranks(draws, rng, work / title)
        return {**found.to_json(), "wrong": found.wrong}

    def disks(_title: str, _rng: random.Random) -> dict[str, Any]:
        reason = permitted()
        return {"not_tried": reason} if reason else in_namespace(draws, given.seed, ALL_DISKS)

    named: dict[str, Callable[[str, random.Random], dict[str, Any]]] = {
        "disks": disks,
        "ranks_killed": ranks,
        "failing_writes": lambda title, rng: failing_writes(4 * draws, rng, work / title).to_json(),
        "failing_comparisons": lambda title, rng: failing_comparison(4 * draws, rng, work / title).to_json(),
        "inputs_that_vanish": lambda title, _: vanishing_inputs(work / title).to_json(),
        "folders_that_vanish": lambda title, rng: vanishing_folders(draws, rng, work / title).to_json(),
        "two_writers": lambda title, _: two_writers(draws, work / title).to_json(),
        "two_comparisons": lambda title, rng: two_comparisons(draws, rng, work / title).to_json(),
        "hub": lambda title, _: misbehaving_hub(work / title).to_json(),
    }
    for number, (name, wanted, own) in enumerate(shares(given.kills, given.own)):
        named[f"kills {number} {name}"] = lambda title, rng, name=name, wanted=wanted, own=own: killed(
            title, name, wanted, own, rng
        )
    return {title: partial(part, title, random.Random(f"{given.seed} {title}")) for title, part in named.items()}


def run(given: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Try everything, each part in a process forked from this one, and return the counts."""
    from benchmarks.trust.fault_runs import warm

    warm()
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")  # of attnlens; matplotlib has found its own
    chosen = {title: part for title, part in parts(given, work).items() if title in (given.only or [title])}
    found: dict[str, Any] = {}
    titles: dict[int, str] = {}
    for title, part in chosen.items():
        if len(titles) == AT_ONCE:
            ended(titles, work, found)
        (work / title).mkdir()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                (work / f"{title}.json").write_text(json.dumps(part()))
                code = 0
            except Exception:  # noqa: BLE001  # told, and seen by the parent
                traceback.print_exc()
            finally:
                os._exit(code)
        titles[pid] = title
    while titles:
        ended(titles, work, found)
    return {title: found[title] for title in chosen}


def ended(titles: dict[int, str], work: Path, found: dict[str, Any]) -> None:
    """Wait for one of the parts that are on their way, by process, and keep its counts."""
    pid = 0
    while pid not in titles:
        pid, status = os.wait()
    title = titles.pop(pid)
    found[title] = json.loads((work / f"{title}.json").read_text()) if status == 0 else {"wrong": ["it broke off"]}
    sys.stderr.write(f"{title}: {found[title]}\n")


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Return the counts over all parts."""
    killed = [one for title, one in found.items() if title.startswith("kills ")]

    def total(what: str) -> int:
        return sum(one.get(what, 0) for one in killed)

    by_command: dict[str, int] = {}
    for title, one in found.items():
        if title.startswith("kills "):
            name = title.split()[2]
            by_command[name] = by_command.get(name, 0) + one.get("kills", 0)
    return {
        "kills": total("kills"),
        "kills_by_command": by_command,
        "kills_in_processes_of_their_own": total("in processes of their own"),
        "kills_before_writing": total("before writing"),
        "kills_while_writing": total("while writing"),
        "kills_between_two_writes": total("between two writes"),
        "kills_after_writing": total("after writing"),
        "half_files_or_lost_ones": total("half_files_or_lost_ones"),
        "temporary_files_after_the_next_run": total("temporary_files_after_the_next_run"),
        "sets_of_files_from_two_runs": total("sets of files from two runs"),
        "comparisons_resumed": total("comparisons resumed to their end"),
        "of_those_equal_to_the_one_never_killed": total("of those equal to the one never killed"),
        "wrong": sum(len(one.get("wrong", [])) for one in found.values()),
        "parts": found,
    }


def main() -> None:
    """Run the benchmark and keep its counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=120, help="In all, spread over the commands.")
    parser.add_argument("--own", type=int, default=20, help="Of these, in processes started as users do.")
    parser.add_argument("--draws", type=int, default=3, help="Disks, folders and pairs of writers of each kind.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="PART", help="Run this part again and replace its counts.")
    given = parser.parse_args()
    began = time.monotonic()
    with TemporaryDirectory() as folder:
        found = run(given, Path(folder))
    from benchmarks.trust.record import RESULTS, record

    command, seconds = f"python -m benchmarks.trust.faults --kills {given.kills} --seed {given.seed}", 0.0
    again: list[str] = []
    if given.only:
        known = json.loads(RESULTS.read_text())["faults"]
        found, seconds = {**known["parts"], **found}, known["seconds"]
        again = [*known["run_again"], *given.only]
    counts = {"load": f"{os.getloadavg()[2]:.1f} over the last 15 minutes", "run_again": again, **summary(found)}
    record("faults", command, seconds + time.monotonic() - began, counts)
    sys.exit(bool(counts["wrong"]))


if __name__ == "__main__":
    main()
