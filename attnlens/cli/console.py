"""Where words go: results to stdout, chatter and progress to stderr; what files call things goes out printable."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NoReturn

from attnlens.printable import printable


def note(message: str) -> None:
    """Write one line of chatter to stderr."""
    sys.stderr.write(f"{printable(message)}\n")


def end_interrupted() -> NoReturn:
    """End after Ctrl-C, in one line and with exit code 130; typer alone would end without a word."""
    note("attnlens: interrupted; nothing half-written is left")
    sys.exit(130)


def write_stdout(text: str) -> None:
    """Write a result to stdout, at once: a reader that has gone away (``| head``) is then met here, not at exit."""
    text = printable(text, keep="\n\t")
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


def tracked(what: str) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """Return a wrapper that shows a progress bar on stderr while a person is watching."""

    def wrap(items: Iterable[Any]) -> Iterator[Any]:
        if not sys.stderr.isatty():
            yield from items
            return
        from rich.console import Console
        from rich.progress import track

        total = len(items) if isinstance(items, Sized) else None
        yield from track(items, what, total=total, console=Console(stderr=True), transient=True)

    return wrap


def command_line() -> str:
    """Return the command as it was given, for provenance."""
    return shlex.join(["attnlens", *sys.argv[1:]])


def format_layers(layers: list[int]) -> str:
    """Write layer indices as ranges: ``0-3, 11``."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
