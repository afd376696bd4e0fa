"""kill -9 at random moments: of commands that write once, and of comparisons, which go on afterwards."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.trust.fault_checks import contents, leftovers
from benchmarks.trust.fault_commands import (
    NAMES,
    Command,
    check_comparison,
    comparison,
    finished,
    fresh,
    judge,
    measure,
    often_saved,
    put_old,
    simple_commands,
    small_source,
)
from benchmarks.trust.fault_runs import KINDS, Child, Ended, Process, at_step, draw_aim, kill_self, kill_when


@dataclass
class Kills:
    """What the kills of one command came to."""

    kills: int = 0
    tally: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    most_leftovers: int = 0
    after_next_run: int = 0
    """Temporary files that are there when the next run has ended: 0 is promised."""

    def to_json(self) -> dict[str, Any]:
        """Return the counts."""
        return {
            "kills": self.kills,
            **{what: count for what, count in sorted(self.tally.items()) if count},
            "half_files_or_lost_ones": len(self.wrong),
            "most_temporary_files_left": self.most_leftovers,
            "temporary_files_after_the_next_run": self.after_next_run,
        }

    def next(self, real: int, rng: random.Random) -> tuple[str, bool]:
        """Say what the next kill aims at, and whether in a process of its own, of which ``real`` are wanted."""
        number = sum(self.tally[f"aimed at: {kind}"] for kind in KINDS)
        own = self.tally["in processes of their own"] < real and rng.random() < 0.5
        return (KINDS[number % 2] if own else KINDS[number % 3]), own  # steps are counted by a forked child only

    def note(self, kind: str, real: bool, ended: Ended, folder: Path) -> None:
        """Count a run that was to be killed."""
        killed = ended.code == -9
        self.kills += killed
        self.tally["ended before the kill"] += ended.code == 0
        self.tally[f"aimed at: {kind}"] += 1
        self.tally["in processes of their own"] += real and killed
        self.most_leftovers = max(self.most_leftovers, len(leftovers(folder)))
        if ended.code not in (0, -9):
            self.wrong.append(f"exit code {ended.code}: {ended.err}")


def kill_simple(command: Command, wanted: int, real: int, rng: random.Random, work: Path) -> Kills:
    """Kill a command that writes once until it was killed ``wanted`` times, ``real`` of them in own processes."""
    found = Kills()
    folder = fresh(work / f"{command.name}-killed")
    while found.kills < wanted:
        kind, own = found.next(real, rng)
        put_old(command, work, folder)
        aim = draw_aim(rng, kind, command.real_seconds if own else command.seconds, command.window, command.steps)
        before = at_step(aim.step, kill_self, folder) if aim.kind == "step" else None
        run = Process(command.new, folder) if own else Child(command.new, folder, before)
        ended = kill_when(run, aim, folder)
        found.note(kind, own, ended, folder)
        if ended.code == -9:
            found.wrong += judge(command, folder, found.tally, run.started)
    finished(Child(command.new, folder).wait())
    found.after_next_run = len(leftovers(folder))
    if contents(folder) != command.outputs["new"]:
        found.wrong.append(f"the run after the kills of {command.name} wrote something else")
    return found


def kill_comparisons(wanted: int, real: int, rng: random.Random, work: Path) -> Kills:
    """Kill comparisons, one to three times each, let the next resume end, and compare it with one never killed."""
    found = Kills()
    base = comparison(small_source(work))
    whole, seconds, steps = whole_comparison(base, work)
    start = finished(Process(base, fresh(work / "own")).wait()).seconds if real else 0.0
    while found.kills < wanted:
        folder, done = fresh(work / "killed"), set[str]()
        for _ in range(rng.randint(1, 3)):
            kind, own = found.next(real, rng)
            aim = draw_aim(rng, kind, start if own else seconds, seconds / 2, steps)
            arguments = resumable(base, folder)
            before = at_step(aim.step, kill_self, folder) if aim.kind == "step" else None
            run = Process(arguments, folder) if own else Child(arguments, folder, both(often_saved, before))
            ended = kill_when(run, aim, folder)
            found.note(kind, own, ended, folder)
            found.wrong += check_comparison(folder / "out", whole, found.tally)
            there = {path.name for path in folder.glob("out/runs/*.json")}
            found.wrong += [f"the finished run {name} is gone" for name in sorted(done - there)]
            if ended.code == -9:
                found.tally[_when(folder, run.started)] += 1
            done = there
        finished(Child(resumable(base, folder), folder).wait())
        found.after_next_run += len(leftovers(folder))
        equal = contents(folder / "out") == whole and not list(folder.glob("out/checkpoints/*"))
        found.tally["comparisons resumed to their end"] += 1
        found.tally["of those equal to the one never killed"] += equal
        if not equal:
            found.wrong.append("a resumed comparison differs from the one never killed")
    return found


def whole_comparison(base: list[str], work: Path) -> tuple[dict[str, str], float, int]:
    """Run a comparison whole: what it writes, how long it takes, its steps of writing."""
    Child(base, fresh(work / "cold")).wait()
    folder, told = fresh(work / "whole"), work / "whole.steps"
    ended = finished(Child(base, folder, both(often_saved, at_step(0, lambda: None, folder, told))).wait())
    return contents(folder / "out"), ended.seconds, int(told.read_text())


def resumable(base: list[str], folder: Path) -> list[str]:
    """Return the command line that starts a comparison, or goes on with the one that is there."""
    return [*base, "--resume"] if (folder / "out" / "config.json").is_file() else base


def _when(folder: Path, started: float) -> str:
    if leftovers(folder, newer_than=started):
        return "while writing"
    if (folder / "out" / "structure.png").is_file():
        return "after writing"
    return "between two writes" if (folder / "out" / "config.json").is_file() else "before writing"


def both(first: Callable[[], Any], second: Callable[[], Any] | None) -> Callable[[], Any]:
    """Return what does one thing in a child, then another."""

    def before() -> Any:
        first()
        return second() if second is not None else None

    return before


def shares(kills: int, own: int) -> list[tuple[str, int, int]]:
    """Spread kills, and those of processes of their own, over the commands, each in parts of some six."""
    kinds = (*NAMES, "train-compare")
    parts = max(len(kinds), kills // 6)
    cut = [
        (kinds[number % len(kinds)], *(whole // parts + (number < whole % parts) for whole in (kills, own)))
        for number in range(parts)
    ]
    return [(name, wanted, started) for name, wanted, started in cut if wanted]


def kill(name: str, wanted: int, own: int, rng: random.Random, work: Path) -> Kills:
    """Kill one command until it was killed ``wanted`` times, ``own`` of them in processes of their own."""
    if name == "train-compare":
        return kill_comparisons(wanted, own, rng, work)
    (command,) = simple_commands(work, [name])
    measure(command, work, real=own > 0)
    return kill_simple(command, wanted, own, rng, work)
