"""Architectures whose arguments come out of a file, built in a process that may take only so much time and memory.

What a constructor does with its arguments is its own: some fill tables that grow with the fourth power of an image's
side. A process that has imported timm waits for requests and forks for each one, so that a request costs no import.
Where processes cannot fork, networks are built in this one, without these bounds.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Lock
from typing import IO, Any

from attnlens.errors import AttnlensError, CheckpointError, ModelNotFoundError, UnsupportedAttentionError
from attnlens.models.architecture import Architecture, build, on_meta

SECONDS = 5
"""Processor seconds that building and tracing may take; the dearest of eleven of timm's that were measured took 1.5."""
MEMORY = 192 << 20
"""Bytes they may take beside what the libraries take; the dearest of those eleven took 45 MiB."""
CHEAP_SECONDS, CHEAP_MEMORY = 3, 56 << 20
"""What building alone may take where it is to be done in this process, too."""
_GROWS, _A_SECOND = 8, 1 << 28
"""What a conversion may take more: bytes for each byte of the file, and how many of those for a second."""
_ORDINARY = "vit_tiny_patch16_224"
_PATIENCE = 120
"""Seconds by the clock after which the process is given up, as on a machine that is out of memory."""

# This very package is found first; behind that its folder goes last, as other packages in it may hide the library's.
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); import attnlens; sys.path.append(sys.path.pop(0)); "
    "from attnlens.models.bounded import serve; serve()"
)
_ROOT = str(Path(__file__).parents[2])
_ERRORS = {kind.__name__: kind for kind in (CheckpointError, ModelNotFoundError, UnsupportedAttentionError)}


def describe_bounded(name: str, model_args: dict[str, Any]) -> Architecture:
    """Build and describe a timm architecture within `SECONDS` and `MEMORY`.

    Raises `ModelNotFoundError` where it takes more, and what describing raises.
    """
    if not _bounds(name):
        return build(name, model_args)
    return Architecture.from_json(_ask({"do": "describe", "name": name, "model_args": model_args}))


def names_bounded(name: str, model_args: dict[str, Any]) -> set[str]:
    """Return the names of the tensors of a timm architecture, built as `describe_bounded` builds it."""
    if not _bounds(name):
        return set(on_meta(name, model_args).state_dict())
    return set(_ask({"do": "name", "name": name, "model_args": model_args})["names"])


def check_cheap(name: str, model_args: dict[str, Any]) -> None:
    """Raise `ModelNotFoundError` where an architecture is too costly to be built in this process."""
    if not model_args or not _bounds(name):
        return
    cost = _ask({"do": "build", "name": name, "model_args": model_args})
    if cost["seconds"] > CHEAP_SECONDS or cost["bytes"] > CHEAP_MEMORY:
        raise ModelNotFoundError(
            f"{name} with model_args {model_args} takes {cost['seconds']:.1f} seconds and {cost['bytes']} bytes to be "
            "built: weights of other names are not converted for it"
        )


def check_conversion(request: dict[str, Any]) -> None:
    """Raise `CheckpointError` where timm's conversion of a file, rehearsed, is too costly to be done in this process.

    ``request`` is what `attnlens.checkpoints.converted.rehearse` takes, and the ``bytes`` of the file.
    """
    if not _bounds(request["name"]):
        return
    cost = _ask({"do": "convert", **request})
    seconds, most = CHEAP_SECONDS + request["bytes"] / _A_SECOND, CHEAP_MEMORY + _GROWS * request["bytes"]
    if cost["seconds"] > seconds or cost["bytes"] > most:
        raise CheckpointError(
            f"timm's conversion for {request['name']} takes {cost['seconds']:.1f} seconds and {cost['bytes']} bytes "
            f"for a file of {request['bytes']}: it is not converted"
        )


def _bounds(name: str) -> bool:
    """Whether a network is built in another process: not one that only this process knows, registered by its user."""
    if not hasattr(os, "fork"):
        return False
    if "timm" not in sys.modules:
        return True
    import timm

    return not timm.is_model(name) or timm.model_entrypoint(name).__module__.startswith("timm.")


class _Builder:
    """The process that builds, and who may speak to it: one at a time, processes forked from this one included."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # this interpreter, nothing of a file's in the command
            [sys.executable, "-P", "-c", _START, _ROOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._lock: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # as long as this process
        self._owner, self._asked = os.getpid(), 0
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return its answer. Raises `OSError` where there is none."""
        import fcntl

        self._asked += 1
        mark = [os.getpid(), self._asked]
        fcntl.lockf(self._lock, fcntl.LOCK_EX)
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({**request, "mark": mark}).encode() + b"\n")
            self._process.stdin.flush()
            while True:
                with contextlib.suppress(ValueError):  # the rest of an answer to a process that was killed
                    answer = json.loads(self._line())
                    if isinstance(answer, dict) and answer.pop("mark", None) == mark:
                        return answer
        finally:
            fcntl.lockf(self._lock, fcntl.LOCK_UN)

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        descriptor, found, end = self._process.stdout.fileno(), b"", time.monotonic() + _PATIENCE
        while not found.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0, end - time.monotonic()))
            part = os.read(descriptor, 1 << 16) if ready else b""
            if not part:
                raise OSError("the process that builds networks gives no answer")
            found += part
        return found

    def close(self) -> None:
        """End the process, where this one has started it."""
        atexit.unregister(self.close)
        for pipe in (self._process.stdin, self._process.stdout, self._lock):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        if os.getpid() == self._owner:
            self._process.kill()
            self._process.wait()


_started: list[_Builder] = []
_one = Lock()


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    with _one:
        try:
            answer = _running().ask(request)
        except OSError:  # it was killed: once more, by another
            _started.pop().close()
            try:
                answer = _running().ask(request)
            except OSError as error:
                _started.pop().close()
                raise ModelNotFoundError(f"{request['name']} cannot be built ({error}): run again") from error
    if "error" in answer:
        raise _ERRORS.get(answer["kind"], ModelNotFoundError)(answer["error"])
    return dict(answer["found"])


def _running() -> _Builder:
    if not _started:
        _started.append(_Builder())
    return _started[0]


def serve() -> None:
    """Answer requests, a JSON line each, until there are no more: each is worked on by a forked process."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    import timm  # noqa: F401
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            _work(request, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            content = file.read()
        _, status = os.waitpid(child, 0)
        whole = os.waitstatus_to_exitcode(status) == 0 and content
        answer = json.loads(content) if whole else {"kind": "", "error": _too_much(request, status)}
        with os.fdopen(os.dup(answers), "wb") as out:
            out.write(json.dumps({**answer, "mark": request["mark"]}).encode() + b"\n")


def _work(request: dict[str, Any], writing: int) -> None:
    """Build under limits, in a process of its own that ends here."""
    import resource

    code = 1
    with contextlib.suppress(BaseException):
        measured = request["do"] in ("build", "convert")
        if measured:
            on_meta(_ORDINARY, {})  # maps the libraries' pages, which are no cost of what is asked for
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        stored = request.get("bytes", 0)
        _limit(SECONDS + stored // _A_SECOND, MEMORY + 2 * _GROWS * stored)
        try:
            found = _found(request)
            if measured:
                used = resource.getrusage(resource.RUSAGE_SELF)
                found = {"seconds": used.ru_utime + used.ru_stime, "bytes": 1024 * (used.ru_maxrss - before)}
            answer: dict[str, Any] = {"found": found}
        except AttnlensError as error:
            answer = {"kind": type(error).__name__, "error": str(error)}
        with os.fdopen(writing, "wb") as file:
            file.write(json.dumps(answer).encode())
        code = 0
    os._exit(code)


def _limit(seconds: int, memory: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    statm = Path("/proc/self/statm")
    if statm.exists():  # elsewhere memory has no limit that can be set
        most = int(statm.read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _found(request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "describe":
        return build(request["name"], request["model_args"]).to_json()
    if request["do"] == "convert":
        from attnlens.checkpoints.converted import rehearse

        rehearse(request)
        return {}
    model = on_meta(request["name"], request["model_args"])
    return {"names": list(model.state_dict())} if request["do"] == "name" else {}


def _too_much(request: dict[str, Any], status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    how = f"more than {SECONDS} processor seconds" if -code in (signal.SIGXCPU, signal.SIGKILL) else f"exit code {code}"
    if request["do"] == "convert":
        return f"timm's conversion of a file of {request['bytes']} bytes for {request['name']} takes too much ({how})"
    return (
        f"timm cannot build {request['name']} with model_args {request['model_args']} within {SECONDS} processor "
        f"seconds and {MEMORY >> 20} MiB ({how}): fix the config.json or metadata they come from"
    )
