"""Work on independent layers in threads: linear algebra releases the interpreter, so two cores do twice as much."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = 4
"""Most layers at once: memory grows with each."""


def over_threads(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> list[Result]:
    """Return ``[function(item) for item in items]``, computed by one worker a core, each with BLAS on one thread.

    A BLAS that spreads one small product over all cores spends more on waiting than on work, and many times more on a
    machine that is busy otherwise. ``progress`` wraps the iteration over results. The first failure is raised at once
    and what has not begun is not begun.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(min(WORKERS, cores)) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            return [future.result() for future in progress(futures)]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
