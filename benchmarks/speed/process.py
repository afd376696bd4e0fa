"""One process at a time: its wall and CPU seconds and its peak memory, alone or beside a busy one."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EVERY = 0.005
"""Seconds between two looks at a process's anonymous memory."""


class Run(NamedTuple):
    """What one process took."""

    wall: float
    cpu: float
    peak_mib: float
    """Largest resident memory, pages of mapped files among it"""
    private_mib: float
    """Largest anonymous memory seen"""
    output: str


def run(command: Sequence[str], environment: Mapping[str, str], limit: float) -> Run:
    """Run a command to its end. Raises `subprocess.CalledProcessError`, `subprocess.TimeoutExpired`."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=dict(environment))
        peak = private = 0.0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            now = memory_mib(process.pid)
            peak, private = max(peak, now.get("VmHWM", 0.0)), max(private, now.get("RssAnon", 0.0))
            if time.perf_counter() - start > limit:
                process.kill()
                os.wait4(process.pid, 0)
                process.returncode = -9
                raise subprocess.TimeoutExpired(command, limit)
            time.sleep(EVERY)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        text = output.read().decode()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, text, errors.read().decode())
    return Run(wall, usage.ru_utime + usage.ru_stime, peak, private, text)


def memory_mib(pid: int) -> dict[str, float]:
    """Return a process's memory now, by the kernel's names; nothing where it has ended.

    ``ru_maxrss`` of a child begins at what its parent held when it was forked.
    """
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return {
            name: int(rest.split()[0]) / 1024 for name, _, rest in (x.partition(":") for x in lines) if "kB" in rest
        }
    return {}


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Return median, least and largest of each quantity, with n."""
    names = ("wall", "cpu", "peak_mib", "private_mib")
    values = {name: [getattr(one, name) for one in runs] for name in names}
    return {
        **{name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in values.items()},
        "n": len(runs),
    }


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """Keep one core busy inside."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(2)  # the guard of threads looks at the last minute's load and at what runs now
        yield
    finally:
        process.kill()
        process.wait()


def evicted(path: Path) -> None:
    """Let the operating system forget a file's pages, so that the next reader fetches them from the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
