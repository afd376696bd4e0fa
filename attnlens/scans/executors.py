"""What a place that runs jobs must offer, so that a scan need not know where it runs."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Protocol

from attnlens.errors import AttnlensError
from attnlens.scans.plan import Job
from attnlens.scans.tables import Result
from attnlens.scans.worker import Settings


class WorkerLostError(AttnlensError):
    """The process or machine a job ran on is gone; the job may be tried again."""


class Executor(Protocol):
    """Runs jobs elsewhere, each by `worker.measure`."""

    def capacity(self) -> int:
        """Return how many jobs may run now, at least one."""
        ...

    def submit(self, job: Job, settings: Settings) -> Future[Result]:
        """Start a job; its future gives the result, or raises `WorkerLostError`."""
        ...

    def close(self) -> None:
        """Stop everything that runs, at once."""
        ...
