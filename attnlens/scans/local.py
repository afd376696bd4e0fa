"""Jobs in processes of this machine: each worker holds one job at a time, so that a crash is of one known model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from threading import Lock

from attnlens.scans.executors import WorkerLostError
from attnlens.scans.plan import Job
from attnlens.scans.tables import Result
from attnlens.scans.worker import Settings
from attnlens.threads import available_cores

# The folder of the package goes last on the path of a worker: it is found there however the parent came by it.
_START = "import sys; sys.path.append(sys.argv[1]); from attnlens.scans.worker import main; main()"
_ROOT = str(Path(__file__).parents[2])


class LocalExecutor:
    """``workers`` processes, by default one a core; a process that is lost is replaced."""

    def __init__(self, workers: int | None = None) -> None:
        self._workers = workers or available_cores()
        self._cores = max(1, available_cores() // self._workers)
        self._pool = ThreadPoolExecutor(self._workers)
        self._idle: SimpleQueue[_Process | None] = SimpleQueue()
        self._all: set[_Process] = set()
        self._lock, self._closed = Lock(), False
        for _ in range(self._workers):
            self._idle.put(None)

    def capacity(self) -> int:
        """Return the number of workers."""
        return self._workers

    def submit(self, job: Job, settings: Settings) -> Future[Result]:
        """Hand a job to a worker that is free."""
        request = {"job": asdict(job), "settings": asdict(settings), "cores": self._cores}
        return self._pool.submit(self._run, json.dumps(request))

    def _run(self, request: str) -> Result:
        process = self._idle.get()
        try:
            if process is None:
                process = self._start()
            return process.ask(request)
        except WorkerLostError:
            if process is not None:
                self._all.discard(process)
            process = None
            raise
        finally:
            self._idle.put(process)

    def _start(self) -> _Process:
        with self._lock:
            if self._closed:
                raise WorkerLostError("the scan was stopped")
            process = _Process()
            self._all.add(process)
            return process

    def close(self) -> None:
        """Kill every worker; a job that runs is given up."""
        with self._lock:
            self._closed = True
            for process in tuple(self._all):
                process.kill()
        self._pool.shutdown(cancel_futures=True)


class _Process:
    """A worker process and its pipes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter, nothing of the user's in the command
            [sys.executable, "-P", "-c", _START, _ROOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # an interrupt from the terminal is the parent's to handle
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: str) -> Result:
        """Send a job and wait for its result."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        answer = ""
        with contextlib.suppress(OSError, ValueError):
            stdin.write(request + "\n")
            stdin.flush()
            answer = stdout.readline()
        if not answer.endswith("\n"):
            self.kill()
            raise WorkerLostError(f"its worker process ended {_how(self._process.wait())}")
        return dict(json.loads(answer))

    def kill(self) -> None:
        with contextlib.suppress(OSError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError, ValueError):
                    pipe.close()


def _how(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    return f"by {name}" + (": out of memory?" if name == "SIGKILL" and os.name == "posix" else "")
