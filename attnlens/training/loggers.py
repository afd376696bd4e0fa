"""``--log``: the numbers of every epoch to a CSV file, to TensorBoard or to Weights & Biases, while runs train."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from attnlens.atomic import explained, write_text_atomic
from attnlens.csv_text import csv_rows, csv_text
from attnlens.errors import UsageError
from attnlens.state import read_state
from attnlens.training.config import Config
from attnlens.training.record_schema import ResumeError
from attnlens.training.trainer import Unit

Values = dict[str, float]
FOLD = "effective"
"""Whose structure is logged; ``structure.jsonl`` has both folds, layer by layer."""


class Logger(Protocol):
    """One place numbers go to."""

    def write(self, run: str, epoch: int, values: Values) -> None:
        """Note the numbers of a run after an epoch."""
        ...

    def close(self) -> None:
        """Flush everything."""
        ...


LOG_FILE = "log.csv"
_ROW = re.compile(r"\w[\w.+-]*,[0-9]{1,9}(,(-?[0-9]{1,20}(\.[0-9]{1,20})?(e[+-]?[0-9]{1,3})?|-?inf|nan)?)+\Z")
"""A run, an epoch, and numbers, each of which may be missing"""


class CsvLogger:
    """``log.csv``: a row an epoch of a run; what was not measured is empty. Rows that are there are not repeated.

    Rows are appended to a file that this process made, which holds the rows that were there: what else had the name
    (another link to the same file) stays as it was. A row that a kill cut off is left out.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.columns = ("run", "epoch", "train_loss", "test_loss", config.metric.field, *_structure_names())
        self.path = folder / LOG_FILE
        kept = _rows(self.path, self.columns)
        self.seen = {(run, int(epoch)) for run, epoch, *_ in kept}
        numbers = [[run, epoch, *(float(cell) if cell else None for cell in row)] for run, epoch, *row in kept]
        write_text_atomic(self.path, csv_text(self.columns, numbers))
        with explained(self.path):
            self.file = self.path.open("a", encoding="utf-8", newline="")

    def write(self, run: str, epoch: int, values: Values) -> None:
        """See `Logger`."""
        if (run, epoch) not in self.seen:
            self.seen.add((run, epoch))
            with explained(self.path):
                self.file.write(csv_rows([[run, epoch, *(values.get(name) for name in self.columns[2:])]]))
                self.file.flush()

    def close(self) -> None:
        """See `Logger`."""
        with explained(self.path):
            self.file.close()


def _rows(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """Return the rows of a log, checked. Raises `ResumeError` for a file that is no log of these columns."""
    try:
        text = read_state(path).decode()
        head, *rows = [row for row in csv.reader(text[: text.rfind("\n") + 1].splitlines()) if row] or [list(columns)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error) as error:
        raise ResumeError(f"{path} cannot be gone on with ({error}): move it away") from error
    if head != list(columns) or not all(len(row) == len(head) and _ROW.match(",".join(row)) for row in rows):
        raise ResumeError(f"{path} has other columns, or rows that no log has: move it away")
    return rows


class TensorBoardLogger:
    """Event files below ``tensorboard/``, a folder a run; a resumed run's later events are taken back first."""

    def __init__(self, folder: Path, config: Config) -> None:  # noqa: ARG002  # as of every logger
        from torch.utils.tensorboard import SummaryWriter

        self.folder, self._writer = folder / "tensorboard", SummaryWriter
        self.writers: dict[str, Any] = {}

    def write(self, run: str, epoch: int, values: Values) -> None:
        """See `Logger`."""
        with explained(self.folder / run):
            if run not in self.writers:
                self.writers[run] = self._writer(str(self.folder / run), purge_step=epoch)
            for name, value in values.items():
                self.writers[run].add_scalar(name, value, epoch)
            self.writers[run].flush()

    def close(self) -> None:
        """See `Logger`."""
        for run, writer in self.writers.items():
            with explained(self.folder / run):
                writer.close()


class WandbLogger:
    """A run of Weights & Biases for each run, in one group; where and whether online is wandb's own affair."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        self.wandb, self.folder = wandb, folder
        self.settings = json.loads(config.model_dump_json())
        self.sha256 = config.sha256()
        self.runs: dict[str, Any] = {}

    def write(self, run: str, epoch: int, values: Values) -> None:
        """See `Logger`."""
        if run not in self.runs:
            self.runs[run] = self.wandb.init(
                project="attnlens",
                group=self.folder.resolve().name,
                name=run,
                id=hashlib.sha256(f"{self.sha256} {run}".encode()).hexdigest()[:16],
                dir=str(self.folder),
                config={**self.settings, "run": run},
                resume="allow",
                reinit="create_new",
                settings=self.wandb.Settings(silent=True),
            )
        self.runs[run].log(values, step=epoch)

    def close(self) -> None:
        """See `Logger`."""
        for run in self.runs.values():
            run.finish()


LOGGERS: dict[str, tuple[Callable[[Path, Config], Logger], str]] = {
    "csv": (CsvLogger, "csv"),
    "tensorboard": (TensorBoardLogger, "tensorboard"),
    "wandb": (WandbLogger, "wandb"),
}
"""By name: what logs, and the package it needs, which an extra of the same name installs."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse names that are no loggers, and those whose package is not installed. Raises `UsageError`."""
    from importlib.util import find_spec

    for name in names:
        if name not in LOGGERS:
            raise UsageError(f"--log {name} is not known: choose {', '.join(LOGGERS)}, several separated by commas")
        package = LOGGERS[name][1]
        if find_spec(package) is None:
            raise UsageError(
                f"--log {name} needs the package {package}: pip install 'attnlens[{name}]', or choose --log csv"
            )


@contextmanager
def logging_to(names: Sequence[str], folder: Path, config: Config) -> Iterator[Callable[[Unit, dict[str, Any]], None]]:
    """Return a listener for the trainer's messages that passes every run's numbers on, until the context's end."""
    with ExitStack() as opened:
        loggers = []
        for name in dict.fromkeys(names):
            logger = LOGGERS[name][0](folder, config)
            opened.callback(logger.close)
            loggers.append(logger)
        pending: dict[str, Values] = {}
        lock = threading.Lock()

        def write(run: str, epoch: int, values: Values) -> None:
            for logger in loggers:
                logger.write(run, epoch, values)

        def listen(unit: Unit, what: dict[str, Any]) -> None:
            with lock:
                if "measured" in what:
                    for run, lines in zip(unit, what["measured"], strict=True):
                        if lines and lines[-1]["epoch"] == 0:  # no epoch ends before training
                            write(run.name, 0, measured(lines[-1], config))
                        elif lines:
                            pending[run.name] = measured(lines[-1], config)
                elif "epoch" in what:
                    for run, loss in zip(unit, what["losses"], strict=True):
                        write(run.name, what["epoch"], {"train_loss": loss, **pending.pop(run.name, {})})

        yield listen


def measured(record: Mapping[str, Any], config: Config) -> Values:
    """Return the numbers of an evaluation: loss, metric, and alpha and beta as means over layers."""
    names = ("test_loss", config.metric.field)
    values = {name: record[name] for name in names if record.get(name) is not None}
    fits = (record.get("structure") or {}).get(FOLD, {})
    return values | {name: fmean(fits[name]) for name in _structure_names() if fits.get(name)}


def _structure_names() -> tuple[str, ...]:
    return ("qk_alpha", "qk_beta", "ov_alpha", "ov_beta")
