"""Run the command line from its arguments to its exit code, and tell every failure in one line."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from pathlib import Path

from attnlens.cli.console import Interrupted
from attnlens.errors import AttnlensError, OutputError, UsageError
from attnlens.printable import one_line, spell_out

_UNWRITTEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
"""What writing to a stream fails with: no room, no device, no stream."""


_TORCH_SAYS = ("can't allocate memory", "not enough memory", "out of memory")
_OF_MEMORY = "memory has ended: ask for fewer layers or smaller sizes, close other programs, or use a larger machine"


def run() -> None:
    """Run the command line: exit code 0, 1 for a failure told in one line, 2 for wrong usage."""
    from attnlens.arguments import as_options

    with as_options():
        _run()


def _run() -> None:
    debug = "--debug" in sys.argv  # every command lists it
    try:
        from attnlens.threads import guard_threads

        guard_threads()  # before anything imports numpy or torch
        _open_streams()
        from attnlens.cli.app import app

        app()
    except AttnlensError as error:
        if debug:
            raise
        wrong = isinstance(error, UsageError)
        if not wrong or os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of torchrun were told the same
            _complain(str(error))
        sys.exit(2 if wrong else 1)
    except (KeyboardInterrupt, Interrupted):
        from attnlens.atomic import what_was_written

        _complain(f"interrupted: {what_was_written()}")
        sys.exit(130)
    except OSError as error:
        if debug:
            raise
        if error.filename is None and error.errno in _UNWRITTEN:
            _complain(f"cannot write to stdout: {error.strerror}")
            _drop(sys.stdout)
        else:
            _complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        sys.exit(1)
    except Exception as error:  # the last line of defence: a traceback is for --debug
        if debug:
            raise
        _complain(_OF_MEMORY if _is_of_memory(error) else _internal(error))
        sys.exit(1)


def _is_of_memory(error: Exception) -> bool:
    """Whether an allocator found no room: Python's, numpy's or torch's, whose errors have no class of their own."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _TORCH_SAYS)
    )


def _internal(error: Exception) -> str:
    return f"internal error, {type(error).__name__}: {error} (run again with --debug and report the traceback)"


def _complain(message: str) -> None:
    with suppress(OSError, ValueError):  # nobody is told where stderr takes nothing
        sys.stderr.write(f"attnlens: {one_line(' '.join(message.split()))}\n")
        sys.stderr.flush()


def _open_streams() -> None:
    """Let closed streams lead nowhere, so that no file gets their numbers, and let every one write what it can."""
    with suppress(OSError):
        while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
            continue
        os.close(number)
    codecs.register_error("attnlens.spelled", spell_out)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # for the life of the process
    if sys.stdout is None:
        raise OutputError("stdout is closed: let it lead somewhere, to /dev/null if nobody reads it")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="attnlens.spelled")
    unbuffered = sys.stdout is sys.__stdout__ and isinstance(getattr(sys.stdout, "buffer", None), io.RawIOBase)
    if unbuffered:  # Python's -u: what there is no room for is dropped, and nothing said
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(io.FileIO(sys.stdout.fileno(), "w", closefd=False)),
            encoding=sys.stdout.encoding,
            errors=sys.stdout.errors,
            line_buffering=True,
        )


def _drop(stream: object) -> None:
    """Let what a full stream still holds go nowhere: Python tries to write it once more when it ends."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]
