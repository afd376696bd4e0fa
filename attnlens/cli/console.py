"""Where words go: results to stdout, chatter and progress to stderr; what files call things goes out printable."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

from attnlens.printable import printable

_QUIET = ContextVar("quiet", default=False)


class Interrupted(Exception):  # noqa: N818  # Ctrl-C is no error
    """Ctrl-C inside a command."""


@contextmanager
def quietly(quiet: bool) -> Iterator[None]:
    """Say nothing on stderr but errors, inside the context, where ``quiet`` is true."""
    token = _QUIET.set(quiet)
    try:
        yield
    finally:
        _QUIET.reset(token)


def is_quiet() -> bool:
    """Whether results and errors alone are wanted."""
    return _QUIET.get()


def note(message: str) -> None:
    """Write one line of chatter to stderr, whatever is named in it, if anybody wants it and stderr takes it."""
    if not is_quiet():
        with suppress(OSError):
            sys.stderr.write(f"{printable(message)}\n")
            sys.stderr.flush()


def write_stdout(text: str) -> None:
    """Write a result to stdout, at once: a reader that has gone away (``| head``) is then met here, not at exit.

    Of a text of our own, JSON or a report, lines stay lines; what names of files are in goes through `write_lines`.
    """
    text = printable(text, keep="\n\t")
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


def write_lines(lines: Iterable[str]) -> None:
    """Write each of these to stdout as one line, whatever is named in it."""
    write_stdout("\n".join(map(printable, lines)))


def tracked(what: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Return a wrapper that shows a progress bar on stderr while a person is watching."""

    def wrap(items: Iterable[Any]) -> Iterator[Any]:
        if is_quiet() or not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        total = len(items) if isinstance(items, Sized) else None
        yield from track(items, what, total=total, console=Console(stderr=True), transient=True)

    return wrap


def command_line() -> str:
    """Return the command as it was given, for provenance."""
    return printable(shlex.join(["attnlens", *sys.argv[1:]]))
