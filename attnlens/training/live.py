"""Result files kept up to date while runs are under way, by a thread of its own."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from attnlens.training.stop import Control
from attnlens.training.store import Record
from attnlens.training.trainer import Unit

SHARE = 20
"""Writing takes at most one second in so many."""
_FIGURES = 1.0
"""Seconds figures are taken to need before they were drawn once."""

Write = Callable[[Mapping[str, Sequence[Record]], bool], object]
"""Writes the records of runs by name, and draws figures where the second argument says so."""


class Journal:
    """A context that calls ``write`` after every evaluation, with the records of all runs so far.

    Writing waits until it takes no more than a `SHARE`-th of the time, and figures until they do. A failure stops the
    training and is raised at the end of the context.
    """

    def __init__(self, write: Write, records: Mapping[str, Sequence[Record]], control: Control) -> None:
        self.write, self.control = write, control
        self.records = {name: list(lines) for name, lines in records.items()}
        self._changed = threading.Condition()
        self._dirty = self._closed = False
        self._failure: Exception | None = None
        inherited = contextvars.copy_context()  # the style of figures
        self._thread = threading.Thread(target=inherited.run, args=(self._work,), name="journal", daemon=True)

    def listen(self, unit: Unit, what: Mapping[str, Any]) -> None:
        """Take note of a unit's evaluation or end."""
        lines = what.get("records", what.get("measured"))
        if lines is None:
            return
        with self._changed:
            for run, mine in zip(unit, lines, strict=True):
                self.records[run.name] = list(mine)
            self._dirty = True
            self._changed.notify()

    def _work(self) -> None:
        drawn, drawing, cost = time.monotonic(), _FIGURES, 0.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closed)
                if self._closed:  # what is written next is the whole
                    return
                records, self._dirty = dict(self.records), False
            began = time.monotonic()
            figures = began - drawn >= SHARE * drawing
            try:
                self.write(records, figures)
            except Exception as error:  # noqa: BLE001  # raised again at the end of the context
                self._failure = error
                self.control.stop("failure")
                return
            took = time.monotonic() - began
            if figures:
                drawn, drawing = time.monotonic(), took
            else:
                cost = took
            with self._changed:
                self._changed.wait_for(lambda: self._closed, timeout=SHARE * cost)

    def __enter__(self) -> Journal:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        if self._failure is not None and kind is None:
            raise self._failure
