"""The output folder: configuration, finished runs, checkpoints, each file written whole or not at all."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.atomic import FileSet, Write, claimed, name_folder, sweep, write_atomic, write_text_atomic
from attnlens.checkpoints.pickles import load_pickle
from attnlens.checkpoints.written import write_safetensors
from attnlens.errors import CheckpointError, OutputError, UsageError
from attnlens.printable import utf8_data
from attnlens.state import SEALED_FROM, is_sealed_archive, read_state, sealed, sealed_archive
from attnlens.strict_json import parse_json, there
from attnlens.training.config import OPTIONS, Config, Run
from attnlens.training.record_schema import (
    PARTS,
    ResumeError,
    check_links,
    check_records,
    check_state,
    parse_results,
    parse_runs,
)

if TYPE_CHECKING:
    from torch import Tensor

Record = dict[str, Any]
STACK_LIMIT = "stack_limit"
"""What ``config.json`` says beside the configuration once memory ran out: stacks are no larger than this."""


class Store:
    """Files of one comparison below ``folder``."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.stack_limit: int | None = None
        """Most models of a stack, where one of the configured size was too large for the device's memory."""

    @classmethod
    @contextmanager
    def claim(
        cls, folder: Path, config: Config, *, resume: bool, told: Mapping[str, Any] | None = None
    ) -> Iterator[Store]:
        """`open` a folder and keep every other process from it, until the context or this process ends.

        What processes that were killed left half-written is removed. Raises `UsageError`, and `OutputError` where
        another comparison is at work in the folder.
        """
        _check(folder, config, stored_config(folder), resume=resume)  # before anything is written
        taken = f"another train-compare is at work in {folder}: wait for it, or choose another --output"
        with claimed(folder / ".lock", taken):
            for part in (".", *PARTS):
                sweep(folder / part)
            store = cls.open(folder, config, resume=resume, told=told)
            store.restore_runs()
            store.load_runs()  # what cannot be gone on with is met before anything else is written
            yield store

    @classmethod
    def open(cls, folder: Path, config: Config, *, resume: bool, told: Mapping[str, Any] | None = None) -> Store:
        """Start a folder, or go on in one that holds the same configuration. Raises `UsageError`.

        ``told`` are the options that lead to the configuration; they stand beside it under `OPTIONS`.
        """
        stored = stored_config(folder)
        limit = None if stored is None else stored.get(STACK_LIMIT)
        _check(folder, config, stored, resume=resume)
        store = cls(folder, config)
        if stored is None:
            store._write_config(told)
        else:
            store.stack_limit = limit
        return store

    def _write_config(self, told: Mapping[str, Any] | None = None) -> None:
        limit = {} if self.stack_limit is None else {STACK_LIMIT: self.stack_limit}
        text = {"sha256": self.config.sha256(), **limit, **json.loads(self.config.model_dump_json())}
        if told is None:  # written again: what stands there stays
            told = (stored_config(self.folder) or {}).get(OPTIONS)
        text |= {} if told is None else {OPTIONS: dict(told)}
        write_text_atomic(self.folder / "config.json", json.dumps(utf8_data(text), indent=1) + "\n")

    def limit_stack(self, models: int) -> None:
        """Note that no stack of more models is trained from now on, nor when the comparison is resumed."""
        self._check_there()
        self.stack_limit = models
        self._write_config()

    def save_run(self, run: Run, records: Sequence[Record]) -> None:
        """Keep the records of a run that has ended."""
        self.save_records(run.name, records)

    def save_records(self, name: str, records: Sequence[Record]) -> None:
        """Keep the records of a run by name."""
        self._write(self.folder / "runs" / f"{name}.json", self._records(records))

    def _records(self, records: Sequence[Record]) -> Write:
        text = json.dumps(sealed({"config": self.config.sha256(), "records": list(records)})) + "\n"
        return methodcaller("write", text.encode())

    def load_runs(self) -> dict[str, list[Record]]:
        """Return the records of every run that has ended, by name. Raises `ResumeError` for those of another config."""
        self._check_there()
        runs = {}
        for path in sorted((self.folder / "runs").glob("*.json")):
            data = parse_runs(path, self.folder)
            if data.get("config") != self.config.sha256():
                raise ResumeError(f"{path} belongs to another configuration: move it away, or choose another --output")
            records = check_records(data["records"], self.config, str(path), path.stem)
            if records[-1]["status"] == "running":
                raise ResumeError(f"{path} holds a run that has not ended: delete it to train that run again")
            runs[path.stem] = records
        return runs

    def restore_runs(self) -> None:
        """Keep the runs that ``results.jsonl`` holds where ``runs/`` is missing: a folder kept without what is large.

        Runs that had not ended are in neither, and begin anew. The folder gets its name once all are in it: a run that
        is not in ``runs/`` is one to be trained again. Raises `ResumeError`.
        """
        path, place = self.folder / "results.jsonl", self.folder / ".runs"
        if there((self.folder / "runs").exists) or not there(path.exists):
            return
        runs = parse_results(path, self.folder, self.config)
        shutil.rmtree(place, ignore_errors=True)  # of a process that was killed here
        with FileSet() as files:
            for name, records in runs.items():
                files.write(place / f"{name}.json", self._records(records))
        if runs:
            name_folder(place, self.folder / "runs")

    def save_checkpoint(self, unit: str, state: Mapping[str, Any]) -> None:
        """Keep where a unit of work has got to, in an archive with its digest."""
        import torch

        buffer = io.BytesIO()
        torch.save({"config": self.config.sha256(), "schema_version": SEALED_FROM, **state}, buffer)
        self._write(self._checkpoint(unit), lambda file: file.writelines(sealed_archive(buffer.getbuffer())))

    def load_checkpoint(self, unit: str) -> dict[str, Any] | None:
        """Return where a unit of work had got to, on the CPU; None where it had not begun."""
        path = self._checkpoint(unit)
        if not there(path.is_file):
            return None
        try:
            whole = is_sealed_archive(path)
            state = check_state(load_pickle(path, CheckpointError), path)
        except (CheckpointError, OSError, ValueError) as error:
            raise ResumeError(f"{path} cannot be read ({error}): delete it to train that run again") from error
        if not whole and state.get("schema_version", 1) not in range(SEALED_FROM):
            raise ResumeError(
                f"{path} was changed after it was written, its sha256 is missing: delete it to train that run again"
            )
        if state.get("config") != self.config.sha256():
            raise ResumeError(f"{path} belongs to another configuration: move it away, or choose another --output")
        return state

    def drop_checkpoint(self, unit: str) -> None:
        """Remove the checkpoint of a unit that has ended."""
        self._checkpoint(unit).unlink(missing_ok=True)

    def save_weights(self, run: Run, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Keep a run's final weights in a file `attnlens inspect` reads."""
        self._check_there()
        write_safetensors(self.folder / "weights" / f"{run.name}.safetensors", state, metadata)

    def _write(self, path: Path, write: Write) -> None:
        self._check_there()
        write_atomic(path, write)

    def _check_there(self) -> None:
        """Refuse a folder that was removed meanwhile: writing on would make one that holds only the later runs."""
        if not there((self.folder / "config.json").is_file):
            raise OutputError(f"{self.folder} was removed while the comparison ran: start it again from its first run")

    def _checkpoint(self, unit: str) -> Path:
        return self.folder / "checkpoints" / f"{unit}.pt"


def stored_config(folder: Path) -> dict[str, Any] | None:
    """Return the configuration a folder holds, None where it holds none. Raises `ResumeError`."""
    check_links(folder)
    path = folder / "config.json"
    if not there(path.exists):
        return None
    try:
        data = parse_json(read_state(path))
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path} cannot be read ({error}): choose another --output") from error
    if not isinstance(data, dict) or "dataset" not in data:
        raise ResumeError(f"{path} is no configuration of a comparison: choose another --output")
    return data


def _check(folder: Path, config: Config, stored: dict[str, Any] | None, *, resume: bool) -> None:
    """Raise `UsageError` where a comparison cannot be started, or not gone on with, in a folder."""
    if stored is None:
        if resume:
            raise UsageError(f"--resume: {folder} holds no comparison. Leave --resume out to start one")
        return
    if not resume:
        raise UsageError(f"{folder} holds a comparison already: add --resume to go on, or choose another --output")
    stored.pop(OPTIONS, None)
    sha256, limit = stored.pop("sha256", None), stored.pop(STACK_LIMIT, None)
    if not (limit is None or (type(limit) is int and limit >= 1)):
        raise UsageError(f"{folder / 'config.json'}: {STACK_LIMIT} is {limit!r}, no number of models: remove it")
    changed = config.differences(stored)
    if changed or sha256 != config.sha256():
        changed = changed or ["the file was edited"]
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(
            f"{folder} holds another comparison: {'; '.join(changed[:3])}{more}. Repeat the first command with "
            "--resume, or choose another --output"
        )
