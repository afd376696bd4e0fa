"""Failures planted at one step of writing at a time: of every command all outputs are old then, or all are new."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from attnlens.atomic import sweep
from benchmarks.trust.fault_checks import contents, leftovers, states
from benchmarks.trust.fault_commands import (
    NAMES,
    Command,
    check_comparison,
    comparison,
    finished,
    fresh,
    measure,
    often_saved,
    put_old,
    simple_commands,
    small_source,
)
from benchmarks.trust.fault_inputs import Cases
from benchmarks.trust.fault_kills import both, resumable, whole_comparison
from benchmarks.trust.fault_runs import Child, Ended, at_step

REASONS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


def failing(reason: int) -> Callable[[], None]:
    """Return what fails as the system does."""

    def fail() -> None:
        raise OSError(reason, os.strerror(reason))

    return fail


def spaced(steps: int, draws: int, rng: random.Random) -> list[int]:
    """Return as many steps, one drawn from each of as many parts of all of them."""
    parts = min(draws, steps)
    edges = [1 + steps * part // parts for part in range(parts + 1)]
    return [rng.randrange(low, high) for low, high in pairwise(edges)]


def failing_writes(draws: int, rng: random.Random, work: Path, names: Sequence[str] = NAMES) -> Cases:
    """Let one step of a command's writing fail, over outputs that are there: all old and one line, or all new."""
    found = Cases()
    for command in simple_commands(work, names):
        measure(command, work, real=False)
        for step in spaced(command.steps, draws, rng):
            put_old(command, work, folder := fresh(work / "failing"))
            plant = at_step(step, failing(rng.choice(REASONS)), folder)
            ended = Child(command.new, folder, plant).wait()
            wrong = half_done(command, folder, ended)
            found.expect(f"{command.name} that cannot take a step of writing", not wrong, (step, wrong, ended))
    return found


def half_done(command: Command, folder: Path, ended: Ended) -> list[str]:
    """Return what is neither all old, with an error of one line, nor all new; a scan keeps models that are done."""
    now = states(folder, command.outputs["old"], command.outputs["new"])
    wrong = [] if ended.code == 0 or (ended.code == 1 and ended.one_line) else [f"exit code {ended.code}"]
    for files in command.sets:
        kinds = {now[name] for name in files}
        wanted = [{"new"}] if ended.code == 0 else [{"old"}, {"new"}] if files != command.sets[-1] else [{"old"}]
        wrong += [] if kinds in wanted else [f"{name}: {now[name]}" for name in sorted(files)]
    return wrong + _not_swept(folder)


def _not_swept(folder: Path) -> list[str]:
    """Return the temporary files that the next command would leave there."""
    for place in {path.parent for path in leftovers(folder)}:
        sweep(place)
    return [f"{path} is left" for path in leftovers(folder)]


def failing_comparison(draws: int, rng: random.Random, work: Path) -> Cases:
    """Let one step of a comparison's writing fail: an error of one line, nothing half, and a resume that ends."""
    found = Cases()
    base = [*comparison(small_source(work)), "--table", "table.csv"]
    whole, _, steps = whole_comparison(base, work)
    table = contents(work / "whole")["table.csv"]
    for step in spaced(steps, draws, rng):
        folder = fresh(work / "failing")
        plant = at_step(step, failing(rng.choice(REASONS)), folder)
        ended = Child(base, folder, both(often_saved, plant)).wait()
        wrong = [] if ended.code == 0 or (ended.code == 1 and ended.one_line) else [f"exit code {ended.code}"]
        wrong += check_comparison(folder / "out", whole, found.cases)
        there = contents(folder).get("table.csv")
        wrong += [] if there == (table if ended.code == 0 else None) else ["--table is there without the others"]
        wrong += _not_swept(folder)
        if ended.code == 1:
            finished(Child(resumable(base, folder), folder).wait())
        wrong += [] if contents(folder) == contents(work / "whole") else ["gone on with, it differs"]
        found.expect("train-compare that cannot take a step of writing", not wrong, (step, wrong, ended))
    return found
