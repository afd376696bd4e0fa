"""What a results folder holds, checked before it is believed: records of runs, and where a run had got to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from attnlens.errors import AttnlensError
from attnlens.state import check_folder, check_listed, read_state, unsealed
from attnlens.strict_json import parse_json, within
from attnlens.training.config import Run
from attnlens.training.optimizers import Several

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from attnlens.training.config import Config

PARTS = ("runs", "checkpoints", "weights", "tensorboard", "wandb")
"""Folders below a results folder."""
MANIFEST = "summary.json"
"""The file that names the others of its set with their hashes."""
RESULTS_KEYS = ("config_sha256", "dataset", "data_sha256", "run", "recipe")
"""What every line of ``results.jsonl`` says beside its record."""
LARGEST = 1e100
"""No number of a record is larger: a mean of squares of larger ones is none."""


def _bounded(value: float) -> float:
    if abs(value) > LARGEST:
        raise ValueError(f"{value:g} is no number that is measured")
    return value


Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Share = Annotated[float, Field(ge=0, le=1)]
Number = Annotated[float, AfterValidator(_bounded)]
Fit = Annotated[float, Field(allow_inf_nan=True), AfterValidator(_bounded)]
"""alpha or beta of a layer; NaN where it is not defined"""


class ResumeError(AttnlensError):
    """A checkpoint or record cannot be gone on from."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)


class _Provenance(_Part):
    device: str
    command: str
    versions: dict[str, str]


class _Fits(_Part):
    """A number a layer, of one fold."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    qk_alpha: list[Fit]
    qk_beta: list[Fit]
    ov_alpha: list[Fit]
    ov_beta: list[Fit]

    @model_validator(mode="after")
    def _of_the_same_layers(self) -> _Fits:
        if len({len(self.qk_alpha), len(self.qk_beta), len(self.ov_alpha), len(self.ov_beta)}) > 1:
            raise ValueError("it has not as many numbers of one kind as of another")
        return self


class _Structure(_Part):
    """`attnlens.training.structure.Structure`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    raw: _Fits
    effective: _Fits

    @model_validator(mode="after")
    def _of_the_same_layers(self) -> _Structure:
        if len(self.raw.qk_alpha) != len(self.effective.qk_alpha):
            raise ValueError("it has not as many layers in one fold as in the other")
        return self


class _Line(_Part):
    """One evaluation of a run, or its divergence."""

    arm: str
    seed: Count
    lr: Annotated[float, Field(gt=0)]
    tuning: bool
    epoch: Count
    status: Literal["running", "finished", "diverged"]
    accuracy: Share | None = None
    balanced_accuracy: Share | None = None
    bits_per_byte: Annotated[Number, Field(ge=0)] | None = None
    test_loss: Number | None = None
    train_loss: Number | None = None
    train_seconds: Annotated[Number, Field(ge=0)]
    models_in_stack: Annotated[Count, Field(ge=1)]
    streams: list[str]
    provenance: _Provenance
    structure: _Structure | None = None


class _State(_Part):
    """Where a unit of work had got to."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True, arbitrary_types_allowed=True)

    unit: list[str]
    epoch: Count
    step: Count
    seconds: float
    streams: dict[int, list[str]]
    records: str
    stack: dict[str, Any]


_Lines = TypeAdapter(list[_Line])


def check_records(records: Any, config: Config, where: str, name: str | None = None) -> list[dict[str, Any]]:
    """Return the records of one run as they are, having checked what a summary reads in them.

    They must be of a run of this comparison, of the run ``name`` where one is given.
    """
    again = "delete it to train that run again"
    try:
        lines = _Lines.validate_python(records)
    except ValidationError as error:
        raise ResumeError(f"{where}: {_first(error)}: {again}") from error
    if not lines:
        raise ResumeError(f"{where} holds no record: {again}")
    for line, record in zip(lines, records, strict=True):
        run = Run(line.arm, line.seed, line.lr, line.tuning)
        if line.arm not in config.arms or run != Run(lines[0].arm, lines[0].seed, lines[0].lr, lines[0].tuning):
            raise ResumeError(f"{where} holds records of {line.arm!r}, which is another run: delete it")
        if name not in (None, run.name):
            raise ResumeError(f"{where} holds the records of {run.name}, which is another run: delete it")
        if line.lr not in (config.recipe.lr, *config.lr_grid):
            raise ResumeError(f"{where} holds a learning rate of {line.lr:g}, which is not of this comparison: {again}")
        if line.status != "diverged" and None in (config.metric.of(record), line.structure):
            raise ResumeError(f"{where} holds an epoch without its {config.metric.title}: {again}")
    if any(line.epoch >= later.epoch or line.status != "running" for line, later in pairwise(lines)):
        raise ResumeError(f"{where}: its epochs do not follow each other: {again}")
    return list(records)


def parse_runs(path: Path, folder: Path) -> dict[str, Any]:
    """Parse a file of records below a results folder."""
    try:
        data = unsealed(parse_json(read_state(within(folder, path, ResumeError)), constant=float))
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} cannot be read ({error}): delete it to train that run again") from error
    if "records" not in data:
        raise ResumeError(f"{path} holds no records: delete it to train that run again")
    return data


def parse_results(path: Path, folder: Path, config: Config) -> dict[str, list[dict[str, Any]]]:
    """Return the records of every run in ``results.jsonl`` that has ended, by name. Raises `ResumeError`."""
    advice = "put the file back as it was, or choose another --output"
    runs: dict[str, list[dict[str, Any]]] = {}
    try:
        content = read_state(within(folder, path, ResumeError))
        manifest = folder / MANIFEST
        if manifest.exists():  # one that was kept without it says of nothing what it was
            check_listed(manifest, read_state(manifest), path.name, content)
        for text in content.splitlines():
            line = parse_json(text, constant=float)
            if line["config_sha256"] != config.sha256():
                raise ResumeError(f"{path} belongs to another configuration: {advice}")
            record = {name: value for name, value in line.items() if name not in RESULTS_KEYS}
            runs.setdefault(_file_name(line["run"]), []).append(record)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(f"{path} cannot be read ({error}): {advice}") from error
    for name, records in runs.items():
        check_records(records, config, f"{path}, run {name},", name)
    return {name: records for name, records in runs.items() if records[-1]["status"] != "running"}


def _file_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name):
        raise ValueError(f"{name!r} is no name of a run")
    return name


def check_state(state: Any, where: Path) -> dict[str, Any]:
    """Return the state of a unit of work as it is, having checked its fields."""
    try:
        _State.model_validate(state)
    except ValidationError as error:
        raise ResumeError(f"{where}: {_first(error)}: delete it to train that run again") from error
    assert isinstance(state, dict)
    return state


def restorable(
    state: Mapping[str, Any],
    *,
    unit: Sequence[str],
    seeds: Sequence[int],
    config: Config,
    steps: int,
    like: Mapping[str, Any],
) -> list[list[dict[str, Any]]]:
    """Return the records in a state, having checked that it is of this unit and of the same form as ``like``.

    It must be on its way: before the last of the configuration's epochs, each of so many ``steps``. ``like`` is the
    snapshot of a stack that has not begun. Raises `ResumeError`.
    """
    where = f"the checkpoint of {unit[0]}"
    epoch, step, epochs = state["epoch"], state["step"], config.recipe.epochs
    try:
        records = parse_json(state["records"], constant=float)
    except ValueError as error:
        raise ResumeError(f"{where} holds broken records ({error}): delete it to train that run again") from error
    same = list(state["unit"]) == list(unit) and set(state["streams"]) == set(seeds)
    if not same or not isinstance(records, list) or len(records) != len(unit):
        raise ResumeError(f"{where} is of another unit of work: delete it to train that run again")
    if not _same_form(state["stack"], like):
        raise ResumeError(f"{where} holds weights of another form: delete it to train that run again")
    checked = [check_records(lines, config, where) for lines in records]
    told = {epoch, epoch + 1}  # data of the epoch that is under way may have been drawn
    if not (
        epoch < epochs
        and step < steps
        and all(lines[-1]["epoch"] <= epoch and lines[-1]["status"] != "finished" for lines in checked)
        and all(len(streams) in told for streams in state["streams"].values())
    ):
        raise ResumeError(
            f"{where} stands at epoch {epoch} of {epochs} and step {step} of {steps}, which is not what its records "
            "say: delete it to train that run again"
        )
    return checked


def _same_form(stored: Any, like: Any) -> bool:
    """Whether two snapshots have the same names, lengths, types and shapes; what the optimizer has gathered is free."""
    import torch

    if isinstance(like, torch.Tensor):
        return isinstance(stored, torch.Tensor) and (stored.shape, stored.dtype) == (like.shape, like.dtype)
    if isinstance(like, dict):
        if not isinstance(stored, dict) or set(stored) != set(like):
            return False
        return all(name == "state" or _same_form(stored[name], value) for name, value in like.items())
    if isinstance(like, list | tuple):
        fits = isinstance(stored, list | tuple) and len(stored) == len(like)
        return fits and all(_same_form(one, other) for one, other in zip(stored, like, strict=True))
    numbers = isinstance(like, int | float) and isinstance(stored, int | float) and not isinstance(like, bool)
    return numbers or type(stored) is type(like)


def _whole(part: Any) -> bool:
    """Whether this is what an optimizer of torch can load."""
    names = {"state": dict, "param_groups": list}
    return isinstance(part, dict) and all(isinstance(part.get(name), kind) for name, kind in names.items())


def check_gathered(state: Mapping[str, Any], optimizer: Optimizer | Several, where: str) -> None:
    """Check that what a stored optimizer has gathered belongs to the parameters this one has."""
    import torch

    gathered = state["optimizer"]["state"]
    if isinstance(optimizer, Several):  # what each of timm's optimizers gathers is its own affair
        parts = gathered if isinstance(gathered, list) else []
        if len(parts) != len(optimizer.members) or not all(_whole(part) for part in parts):
            raise ResumeError(f"{where} holds an optimizer of another form: delete it to train that run again")
        return
    shapes = [value.shape for group in optimizer.param_groups for value in group["params"]]
    plain = isinstance(gathered, dict) and all(isinstance(values, dict) for values in gathered.values())
    if not plain or any(
        not (isinstance(index, int) and 0 <= index < len(shapes))
        or set(values) != {"step", "exp_avg", "exp_avg_sq"}
        or not all(isinstance(value, torch.Tensor) for value in values.values())
        or values["step"].numel() != 1
        or {values["exp_avg"].shape, values["exp_avg_sq"].shape} != {shapes[index]}
        for index, values in gathered.items()
    ):
        raise ResumeError(f"{where} holds an optimizer of another form: delete it to train that run again")


def check_links(folder: Path) -> None:
    """Refuse a results folder with a link that leaves it, or a pipe: its files are read and written."""
    check_folder(folder, ResumeError, PARTS)


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
