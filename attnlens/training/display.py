"""The live table of a comparison on stderr, and plain lines where no person is watching."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from statistics import fmean
from typing import TYPE_CHECKING, Any

from attnlens.printable import printable
from attnlens.training.config import Config
from attnlens.training.trainer import Unit

if TYPE_CHECKING:
    from rich.console import RenderableType

_EVERY = 5.0
"""Seconds between two lines about the same."""
_RECENT = 20
"""Epochs the rate of items is averaged over."""


class Notes:
    """Lines on stderr about what comes before training: at once where something new begins, else every `_EVERY` s."""

    def __init__(self, *, shown: bool) -> None:
        self.shown, self._kind, self._last = shown, "", 0.0

    def __call__(self, text: str) -> None:
        """Say how far it got."""
        kind, now = re.sub(r"[\d,.]+", "", text), time.monotonic()
        if self.shown and (kind != self._kind or now - self._last >= _EVERY):
            self._kind, self._last = kind, now
            with suppress(OSError):  # a full stderr stops nothing
                sys.stderr.write(f"{printable(text)}\n")
                sys.stderr.flush()


class Display:
    """Arms, epoch, the metric so far, items/s and time left. `listen` is called by every worker."""

    def __init__(self, config: Config, total_runs: int, done: int, *, title: str) -> None:
        self.config, self.title = config, printable(title)
        self.total_items = total_runs * config.recipe.epochs * config.steps * config.recipe.batch_size
        self.items_left = self.total_items * (total_runs - done) / max(total_runs, 1)
        self.total = dict.fromkeys(config.arms, total_runs // len(config.arms))
        self.ended = dict.fromkeys(config.arms, 0)
        self.epoch: dict[tuple[str, int], int] = {}
        self.scores: dict[str, dict[int, float]] = {arm: {} for arm in config.arms}
        self.state = dict.fromkeys(config.arms, "")
        self.ticks = [(time.monotonic(), 0)]
        self._lock = threading.Lock()
        self._live: Any = None

    def already(self, arm: str, seed: int, score: float | None) -> None:
        """Count a run that had ended before."""
        self.ended[arm] += 1
        if score is not None:
            self.scores[arm][seed] = score

    def listen(self, unit: Unit, what: dict[str, Any]) -> None:
        """Take note of a unit's epoch or end."""
        if "measured" in what:  # what an epoch says holds the scores too
            return
        with self._lock:
            if "ended" in what:
                self._end(unit, what["records"])
            else:
                now = time.monotonic()
                self.ticks = [*self.ticks[-_RECENT:], (now, self.ticks[-1][1] + what["items"])]
                self.items_left -= what["items"]
                for run, score in zip(unit, what["scores"], strict=True):
                    self.epoch[run.arm, run.seed] = what["epoch"]
                    if score is not None:
                        self.scores[run.arm][run.seed] = score
            if self._live is not None:
                self._live.update(self.table())

    def _end(self, unit: Unit, records: Sequence[Sequence[dict[str, Any]]]) -> None:
        for run, lines in zip(unit, records, strict=True):
            self.ended[run.arm] += 1
            self.epoch.pop((run.arm, run.seed), None)
            if lines[-1]["status"] == "diverged":
                self.state[run.arm] = f"seed {run.seed} diverged"
                self.scores[run.arm].pop(run.seed, None)
                told = f"diverged in epoch {lines[-1]['epoch']}"
            else:
                metric = self.config.metric
                told = f"{metric.title.removeprefix('test ')} {metric.value(lines[-1][metric.field])}"
            if self._live is None:
                left = f", {_clock(self.time_left())} left" if self.time_left() else ""
                line = f"{self.title}: {run.name} {told} ({sum(self.ended.values())} of {sum(self.total.values())}"
                with suppress(OSError):  # a full stderr stops no training
                    sys.stderr.write(f"{line}, {self.rate():.0f} {self.config.items}/s{left})\n")

    def rate(self) -> float:
        """Return items trained a second, over all workers, lately."""
        (begin, first), (end, last) = self.ticks[0], self.ticks[-1]
        return (last - first) / (end - begin) if end > begin else 0.0

    def time_left(self) -> float | None:
        """Return seconds to go at that rate, None where it is not known."""
        rate = self.rate()
        return max(self.items_left, 0.0) / rate if rate else None

    def table(self) -> RenderableType:
        """Build the table as it stands."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        left, name = self.time_left(), self.config.metric.title.removeprefix("test ")
        table = Table(
            title=escape(self.title),
            caption=f"{self.rate():.0f} {self.config.items}/s, {_clock(left)} left; {name} is on the test "
            f"{self.config.items}, mean of the runs so far",
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for title in ("arm", "runs", "epoch", name, ""):
            told = title in ("arm", "")  # words go on below where a terminal is narrow; numbers stay whole
            table.add_column(title, justify="left" if told else "right", no_wrap=not told, overflow="fold")
        for arm in self.config.arms:
            now = sorted({epoch for (one, _), epoch in self.epoch.items() if one == arm})
            scores = self.scores[arm].values()
            table.add_row(
                arm,
                f"{self.ended[arm]}/{self.total[arm]}",
                f"{'-'.join(dict.fromkeys((str(now[0]), str(now[-1]))))}/{self.config.recipe.epochs}" if now else "",
                self.config.metric.value(fmean(scores)) if scores else "",
                self.state[arm],
            )
        return table

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keep the table on stderr while a person is watching."""
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console
        from rich.live import Live

        with Live(self.table(), console=Console(stderr=True), refresh_per_second=4) as self._live:
            yield
        self._live = None


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}" if minutes >= 60 else f"{minutes}:{second:02}"
