"""Work on independent layers in threads: linear algebra releases the interpreter, so two cores do twice as much."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    pass
Progress = Callable[[Iterable[Any]], Iterable[Any]]

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = 4
"""Most layers at once: memory grows with each."""
IN_FLIGHT = 3 << 28
"""Bytes of float64 weights held at once; an item that takes more is worked on alone. Peak memory is some twice that."""

_share: ContextVar[int | None] = ContextVar("share", default=None)


@contextmanager
def limited_to(cores: int) -> Iterator[None]:
    """Use no more than ``cores`` cores inside: one of several processes that share a machine."""
    token = _share.set(cores)
    try:
        yield
    finally:
        _share.reset(token)


def available_cores() -> int:
    """Return the cores this process may run on, or its share of them."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, _share.get() or found)


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
    workers = min(WORKERS, available_cores(), max(1, IN_FLIGHT // largest) if largest else WORKERS)
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in progress(futures)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
