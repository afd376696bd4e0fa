"""Work on independent layers in threads: linear algebra releases the interpreter, so two cores do twice as much."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

Progress = Callable[[Iterable[Any]], Iterable[Any]]

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = 4
"""Most layers at once: memory grows with each."""
IN_FLIGHT = 3 << 28
"""Bytes of float64 weights held at once; an item that takes more is worked on alone. Peak memory is some twice that."""
USER = "OMP_NUM_THREADS"
"""The variable by which a user says how many cores to use."""
CGROUPS = Path("/sys/fs/cgroup")
LOAD = Path("/proc/loadavg")

_LOOKS = 3
_BETWEEN = 0.001  # seconds

_share: ContextVar[int | None] = ContextVar("share", default=None)
_set_here: dict[str, str] = {}


def guard_threads() -> None:
    """Choose, before numpy and torch are imported, the threads of their linear algebra in this process.

    One for numpy's and scipy's, which `over_threads` runs a layer a core; for torch's as many as there are
    `free_cores`: threads that wait for each other on a busy machine take several times the processor time of one. A
    number in `USER` is left as it is and holds for both.
    """
    if USER not in os.environ:
        for name, threads in (("OPENBLAS_NUM_THREADS", 1), (USER, free_cores())):
            if name not in os.environ:
                os.environ[name] = _set_here[name] = str(threads)


def keep_memory() -> None:
    """Let glibc hand the same memory from one array to the next, in all threads of this process, as commands do.

    By itself it gives each thread an arena of its own, where the arrays of a layer leave gaps, and takes large ones
    from the kernel anew: a fault for each page, half of `inspect`'s. Elsewhere nothing changes.
    """
    import ctypes

    with suppress(OSError, AttributeError, TypeError):  # another C library, or none that can be named
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)


_MALLOC = {-8: 1, -3: 32 << 20, -1: 64 << 20}
"""M_ARENA_MAX, M_MMAP_THRESHOLD (its largest) and M_TRIM_THRESHOLD of glibc's malloc.h."""


@contextmanager
def limited_to(cores: int) -> Iterator[None]:
    """Use no more than ``cores`` cores inside: one of several processes that share a machine."""
    token = _share.set(cores)
    try:
        yield
    finally:
        _share.reset(token)


def available_cores() -> int:
    """Return the cores this process may use: of its affinity, its control group's quota, `USER` and its share."""
    limits = [_affinity(), _quota(), _share.get()]
    wanted = os.environ.get(USER, "")
    if wanted.isdecimal() and wanted != _set_here.get(USER):
        limits.append(int(wanted))
    return max(1, min(limit for limit in limits if limit is not None))


def free_cores() -> int:
    """Return how many of the `available_cores` nothing else keeps busy now, at least one."""
    return max(1, min(available_cores(), (os.cpu_count() or 1) - _busy_cores()))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota() -> int | None:
    """Return the cores that the control group of this process may keep busy, rounded up; None without a limit."""
    quotas = []
    for folder in (CGROUPS, *_own_groups()):
        with suppress(OSError, ValueError):  # version 2, where "max" stands for no limit
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        with suppress(OSError, ValueError):  # version 1, where -1 does
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            quotas.append(int(quota) / int(period))
    return min((math.ceil(quota) for quota in quotas if quota > 0), default=None)


def _own_groups() -> Iterator[Path]:
    """Yield the folders of this process's control groups and of those around them."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            root = CGROUPS / controllers if "cpu" in controllers.split(",") else CGROUPS
            if not controllers or root != CGROUPS:
                inner = root / path.lstrip("/")
                yield from (folder for folder in (inner, *inner.parents) if root == folder or root in folder.parents)


def _busy_cores() -> int:
    """Return how many cores other processes keep busy: by what runs in each of three looks, else by the load.

    The load is that of the last minute: it counts what ended a few seconds ago, such as the command before this one,
    and misses what began just now.
    """
    running: list[int] = []
    with suppress(OSError, ValueError, IndexError):
        while len(running) < _LOOKS and 0 not in running:
            if running:
                time.sleep(_BETWEEN)
            running.append(int(LOAD.read_text().split()[3].partition("/")[0]) - 1)  # this process runs too
        return max(0, min(running))
    try:
        return round(os.getloadavg()[0])
    except (AttributeError, OSError):  # Windows
        return 0


def beside(function: Callable[[], Result]) -> Callable[[], Result]:
    """Begin a call in a thread, where there is a second core; the function returned gives its result, or raises."""
    if available_cores() < 2:
        return function
    from concurrent.futures import Future
    from threading import Thread

    future: Future[Result] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # noqa: BLE001  # raised where the result is asked for
            future.set_exception(error)

    Thread(target=work, daemon=True).start()  # what fails meanwhile does not wait for it
    return future.result


def import_beside(*modules: str) -> None:
    """Begin to import modules that are needed later, while something else works outside the interpreter.

    What cannot be imported fails where it is needed.
    """
    from importlib import import_module
    from threading import Thread

    def work() -> None:
        with suppress(ImportError):
            for module in modules:
                import_module(module)

    Thread(target=work, daemon=True).start()


def over_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    *,
    largest: int = 0,
) -> list[Result]:
    """Return ``[function(item) for item in items]``, computed by one worker a core, each with BLAS on one thread.

    A BLAS that spreads one product over all cores spends more on waiting than on work, and many times more on a
    machine that is busy otherwise. ``largest`` is the bytes of float64 weights the largest item holds: there are fewer
    workers where `IN_FLIGHT` has no room for one a core. ``progress`` wraps the iteration over results. The first
    failure is raised at once and what has not begun is not begun.
    """
    from concurrent.futures import ThreadPoolExecutor

    from threadpoolctl import threadpool_limits

    workers = min(WORKERS, available_cores(), max(1, IN_FLIGHT // largest) if largest else WORKERS)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in progress(futures)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
