"""Jobs on a Ray cluster that exists already: a task a model, handed out again where a node is lost."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from attnlens.errors import AttnlensError, UsageError, first_line
from attnlens.scans.executors import WorkerLostError
from attnlens.scans.plan import Job
from attnlens.scans.tables import Result
from attnlens.scans.worker import Settings, measure


class RayExecutor:
    """One task of one CPU for each job; attnlens and the weights must be there on every node.

    Ray's own retries are off: a lost task comes back here as `WorkerLostError`, so that it is counted and begun again
    by the same rules as a lost process.
    """

    def __init__(self, address: str, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise UsageError("--ray needs Ray, which is not installed here: pip install 'attnlens[ray]'") from error
        self._ray, self._workers = ray, workers
        self._connected = not ray.is_initialized()
        if self._connected:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, OSError, RuntimeError) as error:
                raise AttnlensError(
                    f"no Ray cluster answers at {address!r} ({first_line(error)}): start one with "
                    "`ray start --head` and give its address, or auto on a machine of the cluster"
                ) from error
        self._task = ray.remote(num_cpus=1, max_retries=0)(measure)
        self._running: set[Any] = set()

    def capacity(self) -> int:
        """Return the CPUs of the nodes that are alive, at most the number of workers asked for."""
        cpus = int(self._ray.cluster_resources().get("CPU", 1))
        return max(1, min(cpus, self._workers or cpus))

    def submit(self, job: Job, settings: Settings) -> Future[Result]:
        """Start a task."""
        reference = self._task.remote(asdict(job), asdict(settings), 1)
        self._running.add(reference)
        told: Future[Result] = Future()
        reference.future().add_done_callback(lambda done: self._tell(done, told))
        told.add_done_callback(lambda _: self._running.discard(reference))
        return told

    def _tell(self, done: Future[Result], told: Future[Result]) -> None:
        """Pass a task's outcome on; what Ray itself raises means that a worker or node was lost."""
        error = done.exception()
        if error is None:
            told.set_result(done.result())
        elif isinstance(error, self._ray.exceptions.RayError) and not isinstance(
            error, self._ray.exceptions.RayTaskError
        ):
            told.set_exception(WorkerLostError(f"Ray lost it ({type(error).__name__})"))
        else:
            first = str(error).strip().splitlines()[-1]
            told.set_exception(
                AttnlensError(f"a job cannot run on the cluster ({first}): install the same attnlens on every node")
            )

    def close(self) -> None:
        """Cancel what runs and leave the cluster, which stays up."""
        for reference in tuple(self._running):
            self._ray.cancel(reference, force=True)
        if self._connected:
            self._ray.shutdown()
