"""When to stop: a time budget, Ctrl-C or SIGTERM, noticed between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

Reason = Literal["", "time budget", "interrupt", "terminate", "failure"]


class Control:
    """Shared by everything that trains: `stopping` is checked between steps, from any thread."""

    def __init__(self, time_budget: float | None = None) -> None:
        self.deadline = None if time_budget is None else time.monotonic() + time_budget
        self.reason: Reason = ""
        self._event = threading.Event()
        self._interrupted = False

    def stop(self, reason: Reason) -> None:
        """Ask everything to stop; the first reason stays."""
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def stopping(self) -> bool:
        """Whether to stop now."""
        if self.deadline is not None and time.monotonic() >= self.deadline:
            self.stop("time budget")
        return self._event.is_set()

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """Let Ctrl-C raise `KeyboardInterrupt`, and `check` raise it again where an import swallowed it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def handle(number: int, frame: Any) -> None:
            self._interrupted = True
            signal.default_int_handler(number, frame)

        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:  # not ignored, nor somebody else's
            signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def check(self) -> None:
        """Raise `KeyboardInterrupt` where Ctrl-C was pressed in `setting_up`."""
        if self._interrupted:
            raise KeyboardInterrupt

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Turn the first Ctrl-C or SIGTERM into a clean stop; a second one acts as it always did."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}

        def handle(number: int, _frame: Any) -> None:
            signal.signal(number, before[number])
            self.stop("interrupt" if number == signal.SIGINT else "terminate")

        for caught in (signal.SIGINT, signal.SIGTERM):
            before[caught] = signal.signal(caught, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
