"""Running commands so that something can happen to them: a warm process forks a child a run, which runs the command."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.trust.fault_checks import leftovers

WATCHED = {"open": 1, "os.rename": 2, "os.link": 2, "os.chmod": 1, "os.remove": 1, "os.mkdir": 1, "tempfile.mkstemp": 1}
"""Audit events that are a step of writing, and how many of their arguments are paths: before each a kill may come.

Taking a lock and flushing to disk are two more; their argument is no path.
"""


@dataclass
class Ended:
    """How a command ended; ``code`` is negative for a signal."""

    code: int
    seconds: float
    out: str
    err: str

    @property
    def one_line(self) -> bool:
        """Whether it told of a failure as promised: one line that starts with the program's name, no traceback."""
        told = [line for line in self.err.splitlines() if line.startswith("attnlens: ")]
        return len(told) == 1 and "Traceback" not in self.err and "internal error" not in self.err


def warm() -> None:
    """Import everything the commands import, once: a forked child then starts in milliseconds."""
    import matplotlib.backends.backend_agg  # noqa: F401
    import rich.console
    import rich.measure
    import rich.table  # noqa: F401
    import timm  # noqa: F401
    import torch

    from attnlens.cli.app import COMMANDS, load_command

    for name in COMMANDS:
        load_command(name)
    used = ("fit.comparison", "fit.fit_params", "inits", "inspection", "composition", "training.comparison", "reports")
    for name in (*used, "fit.figures", "training.figures", "figures.composition", "signal.figure", "scans.landscape"):
        import_module(f"attnlens.{name}")

    torch.set_num_threads(1)


class Child:
    """A command in a forked process, its folder ``cwd``, its words in files beside that or beside ``words``.

    ``before`` is called in the child first; what it returns is called there at the end, where it can be.
    """

    def __init__(
        self, arguments: list[str], cwd: Path, before: Callable[[], Any] | None = None, words: Path | None = None
    ) -> None:
        self.words = _words(words or cwd)
        self.began, self.started = time.monotonic(), time.time()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                code = self._run(arguments, cwd, before)
            finally:
                os._exit(code)

    def _run(self, arguments: list[str], cwd: Path, before: Callable[[], Any] | None) -> int:
        from attnlens.cli import main

        os.chdir(cwd)
        for number, path in zip((1, 2), self.words, strict=True):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.argv = ["attnlens", *arguments]
        after = before() if before is not None else None
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        if callable(after):
            after()
        sys.stdout.flush()
        sys.stderr.flush()
        return int(code)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def running(self) -> bool:
        """Whether it has not ended; an ended child stays waitable."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, limit: float = 900) -> Ended:
        """Wait for its end; kill it after ``limit`` seconds."""
        deadline = time.monotonic() + limit
        while self.running():
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.002)
        _, status = os.waitpid(self.pid, 0)
        return _ended(os.waitstatus_to_exitcode(status), self.began, *self.words)


PYTHON = (sys.executable, "-m", "attnlens")


class Process:
    """A command in a process of its own, started as a user starts it."""

    def __init__(self, arguments: list[str], cwd: Path, start: Sequence[str] = PYTHON) -> None:
        self.words = _words(cwd)
        self.began, self.started = time.monotonic(), time.time()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        with self.words[0].open("w") as out, self.words[1].open("w") as err:
            self.process = subprocess.Popen([*start, *arguments], cwd=cwd, stdout=out, stderr=err, env=environment)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def wait(self, limit: float = 900) -> Ended:
        """Wait for its end."""
        return _ended(self.process.wait(limit), self.began, *self.words)


def _words(beside: Path) -> tuple[Path, Path]:
    """Return where a command says what it says: empty files, as one may be killed before it opens them."""
    out, err = (beside.parent / f"{beside.name}.{kind}" for kind in ("out", "err"))
    out.write_bytes(b"")
    err.write_bytes(b"")
    return out, err


def _ended(code: int, began: float, out: Path, err: Path) -> Ended:
    return Ended(code, time.monotonic() - began, out.read_text(), err.read_text())


def at_step(step: int, act: Callable[[], None], below: Path, told: Path | None = None) -> Callable[[], Any]:
    """Return what makes a child ``act`` at its ``step``-th event of `WATCHED` below a folder; ``told`` gets a count."""
    count, place = [0], str(below)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "fcntl.flock" or (event in WATCHED and _below(arguments[: WATCHED[event]], place)):
            count[0] += 1
            if count[0] == step:
                act()

    def before() -> Callable[[], Any]:
        sys.addaudithook(hook)
        flush = os.fsync
        os.fsync = lambda descriptor: (hook("fcntl.flock", ()), flush(descriptor))[1]
        return lambda: told.write_text(str(count[0])) if told else None

    return before


def _below(arguments: tuple[Any, ...], place: str) -> bool:
    for one in arguments:
        if isinstance(one, str | bytes | os.PathLike):
            path = os.path.join(os.getcwd(), os.fsdecode(one))  # noqa: PTH109, PTH118  # pathlib would call itself
            if path.startswith(place):
                return True
    return False


def kill_self() -> None:
    """Die as by ``kill -9``."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class Aim:
    """When to kill: at any moment of the run, after its first temporary file is seen, or at a step of its writing."""

    kind: str
    seconds: float = 0.0
    step: int = 0


KINDS = ("any moment", "writing", "step")


def draw_aim(rng: random.Random, kind: str, length: float, window: float, steps: int) -> Aim:
    """Draw when to kill a run of known length, writing window and number of steps."""
    seconds = rng.choice((0.0, rng.uniform(0, window))) if kind == "writing" else rng.uniform(0, length)
    return Aim(kind, seconds, rng.randint(1, max(1, steps)))


def kill_when(run: Child | Process, aim: Aim, folder: Path) -> Ended:
    """Kill a run at the moment drawn, or let it end where that comes first."""
    if aim.kind == "writing":
        while run.running() and not leftovers(folder, newer_than=run.started):
            time.sleep(0.0005)
    if aim.kind != "step":
        begin = time.monotonic() if aim.kind == "writing" else run.began
        while run.running() and time.monotonic() < begin + aim.seconds:
            time.sleep(0.0005)
        run.kill()
    return run.wait()
