"""The results folder of `attnlens train-compare`, read for the page: curves of every run, and what the summary says."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from attnlens.errors import AttnlensError
from attnlens.state import check_folder, check_listed, read_state
from attnlens.strict_json import parse_json, there

T = TypeVar("T", bound=BaseModel)
Share = Annotated[float, Field(ge=0, le=1)]
_TRIES, _WAIT = 3, 0.1
"""How often the files of a set are read until they are of one set, and the seconds between: it is being replaced."""


class ResultsError(AttnlensError):
    """A results folder cannot be read."""


class _Part(BaseModel):
    """What the page needs of a record; whatever else stands there is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Point(_Part):
    """One evaluation of one run."""

    arm: str
    seed: int
    epoch: float
    accuracy: Share | None = None
    test_loss: float | None = None
    tuning: bool = False


class Mean(_Part):
    """A mean with its interval."""

    mean: float | None
    low: float | None
    high: float | None
    n: int


class ShareMean(Mean):
    """A mean of shares with its interval, which may reach beyond them."""

    mean: Share | None


class Arm(_Part):
    """What the summary says of an arm, by the metric its comparison has."""

    accuracy: ShareMean | None = None
    balanced_accuracy: ShareMean | None = None
    bits_per_byte: Mean | None = None
    lr: float | None = None

    @model_validator(mode="after")
    def _is_measured(self) -> Arm:
        if self._metric is None:
            raise ValueError("neither accuracy nor bits_per_byte is given")
        return self

    @property
    def _metric(self) -> Mean | None:
        return self.accuracy or self.balanced_accuracy or self.bits_per_byte

    @property
    def value(self) -> Mean:
        """The metric's mean."""
        assert self._metric is not None
        return self._metric


class Contrast(_Part):
    """Arm minus other arm."""

    arm: str
    other: str
    difference: Mean
    t_holm: float | None = None
    sign_flip_p: float | None = None


class Summary(_Part):
    """``summary.json``."""

    complete: bool
    screening: bool
    metric: str = "accuracy"
    arms: dict[str, Arm]
    contrasts: list[Contrast]
    devices: list[str] = []
    versions: dict[str, str] = {}
    commands: list[str] = []


class Training(_Part):
    """A comparison: a point an evaluation, and the summary where there is one."""

    folder: str
    points: list[Point]
    summary: Summary | None

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in the order of the summary, or of their first evaluation."""
        names = list(self.summary.arms) if self.summary else []
        return list(dict.fromkeys([*names, *(point.arm for point in self.points)]))


def training_files(folder: str | os.PathLike[str] | None) -> list[Path]:
    """Return the files of a results folder that `read_training` reads."""
    return [] if folder is None else [Path(folder, name) for name in ("results.jsonl", "summary.json")]


def read_training(folder: Path) -> Training:
    """Read ``results.jsonl`` and, where it is there, ``summary.json``; runs that chose a learning rate are left out.

    Raises `ResultsError` that names the file, and the line or field, that is wrong: a link that leaves the folder,
    evaluations that are not those of the summary.
    """
    check_folder(folder, ResultsError)
    path, summary = training_files(folder)
    content, told, wrong = _read_set(path, summary)
    points = []
    for number, line in enumerate(_text(path, content).split("\n"), 1):
        if line.strip():
            points.append(_validated(Point, line, f"line {number} of {path}"))
    kept = [point for point in points if not point.tuning]
    if not kept:
        raise ResultsError(f"{path} holds no evaluation: give --train the output folder of attnlens train-compare")
    found = None if told is None else _validated(Summary, _text(summary, told), str(summary))
    if wrong is not None:
        again = "run `attnlens train-compare --resume`, which writes both again"
        raise ResultsError(f"{path} cannot be believed beside {summary} ({wrong}): {again}") from wrong
    return Training(folder=folder.name, points=kept, summary=found)


def _read_set(results: Path, summary: Path) -> tuple[bytes, bytes | None, ValueError | None]:
    """Return what results and summary hold, each read once, and what is wrong where they are of two sets.

    They are read again where a comparison at work replaces them meanwhile, until they stay as they are.
    """
    before: tuple[bytes, bytes | None] | None = None
    wrong: ValueError | None = None
    for _ in range(_TRIES):
        content, told = _read(results), _read(summary) if there(summary.exists) else None
        if told is None:
            return content, told, None
        if (content, told) == before:
            break
        try:
            check_listed(summary, told, results.name, content)
        except ValueError as error:
            before, wrong = (content, told), error
            time.sleep(_WAIT)
        else:
            return content, told, None
    return content, told, wrong


def _read(path: Path) -> bytes:
    try:
        return read_state(path)
    except FileNotFoundError as error:
        raise ResultsError(
            f"{path} does not exist: give --train the output folder of attnlens train-compare"
        ) from error
    except (OSError, ValueError) as error:
        raise ResultsError(f"cannot read {path}: {error}") from error


def _text(path: Path, content: bytes) -> str:
    try:
        return content.decode()
    except ValueError as error:
        raise ResultsError(f"cannot read {path}: {error}") from error


def _validated(kind: type[T], text: str, where: str) -> T:
    try:
        data: Any = parse_json(text, constant=lambda _: None)
        return kind.model_validate(data)
    except ValueError as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ResultsError(f"{where}: {field or 'content'}: {first['msg']}") from error
        raise ResultsError(f"{where} is no JSON: {error}") from error
