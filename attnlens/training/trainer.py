"""Training the runs of a comparison: units of work, workers, checkpoints, divergence, memory."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

from attnlens.training.arms import FROM_WEIGHTS, initial_state, start_of
from attnlens.training.config import TUNING_SEEDS, Config, Run
from attnlens.training.data.on_device import Dataset, Resident, SideBySide, side_by_side
from attnlens.training.engine import Stack
from attnlens.training.hardware import OutOfMemoryError, free_again, room_for
from attnlens.training.networks.base import Wiring
from attnlens.training.record_schema import check_gathered, restorable
from attnlens.training.seen import METADATA_KEY, Seen, written
from attnlens.training.source import Source
from attnlens.training.stop import Control
from attnlens.training.store import Record, Store
from attnlens.training.structure import structure_of
from attnlens.words import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnlens.layouts import AttentionSpec

Unit = tuple[Run, ...]
Listener = Callable[[Unit, dict[str, Any]], None]


def units_of(runs: Sequence[Run], stack: int, kind: Callable[[Run], Hashable] = lambda _run: None) -> list[Unit]:
    """Cut runs, seed by seed, into units of up to ``stack`` runs: a fixed cut, whatever was done and wherever.

    Runs of one unit are of one ``kind``, as a stack holds one architecture; units go by their first run.
    """
    ordered = sorted(runs, key=lambda run: run.seed)  # stable: arms keep their order within a seed
    kinds: dict[Hashable, list[Run]] = {}
    for run in ordered:
        kinds.setdefault(kind(run), []).append(run)
    units = [tuple(alike[start : start + stack]) for alike in kinds.values() for start in range(0, len(alike), stack)]
    position = {run: index for index, run in enumerate(ordered)}
    return sorted(units, key=lambda unit: position[unit[0]])


def unit_name(unit: Unit) -> str:
    """Return a file name."""
    return unit[0].name if len(unit) == 1 else f"{unit[0].name}+{len(unit) - 1}"


@dataclass
class Session:
    """What every unit of one phase shares."""

    config: Config
    source: Source
    data: Resident
    device: torch.device
    store: Store
    control: Control
    provenance: dict[str, Any]
    listen: Listener = lambda _unit, _what: None
    checkpoint_seconds: float = 60.0
    save_weights: bool = False
    automatic: bool = False
    """Whether nobody asked for this stack size: one that a device's memory does not hold is then halved."""
    here: Seen | None = None
    """What is trained on here."""
    specs: dict[Wiring, Sequence[tuple[int, AttentionSpec]]] = field(default_factory=dict)
    """The readable attention layers of every architecture."""
    _stacks: dict[tuple[int, int, Wiring], Stack] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        from attnlens.models.architecture import describe_module

        wirings = dict.fromkeys(self.wiring(arm) for arm in self.config.arms)
        self.specs = {one: describe_module(self.config.network.build(0, one)).indexed() for one in wirings}

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.data.count // self.config.recipe.batch_size

    def wiring(self, arm: str) -> Wiring:
        """Return how an arm's network is wired."""
        return start_of(arm, self.source).wiring

    @property
    def stack_limit(self) -> int:
        """Most models of a stack: as configured, or what is left of it after halving."""
        return self.store.stack_limit or self.config.stack

    def halve(self, models: int) -> None:
        """Train no stack of so many models any more. It is written to the folder before anything smaller is trained."""
        with self._lock:
            self.store.limit_stack(max(1, models // 2))
            self._stacks = {key: stack for key, stack in self._stacks.items() if key[1] <= self.stack_limit}
        free_again(self.device)

    def units(self, runs: Sequence[Run]) -> list[Unit]:
        """Cut runs into units of one architecture each."""
        return units_of(runs, self.config.stack, lambda run: self.wiring(run.arm))

    def trained_on(self, run: Run) -> dict[str, str]:
        """Return what a run's weights have been trained on, as their metadata say it; nothing where it is not known."""
        before = self.source.seen if run.arm in FROM_WEIGHTS else ()
        if self.here is None or before is None:
            return {}
        return {METADATA_KEY: written((*before, self.here))}

    def seeds(self, run: Run) -> tuple[int, int]:
        """Return a run's data and init seed."""
        offset = run.seed + TUNING_SEEDS * run.tuning
        return self.config.data_seed + offset, self.config.init_seed + offset

    def stack(self, models: int, wiring: Wiring) -> Stack:
        """Return this thread's stack of a size and architecture, built and compiled once."""
        key = (threading.get_ident(), models, wiring)
        if key not in self._stacks:
            with self._lock:
                self._stacks[key] = Stack(self.config, models, self.device, wiring=wiring)
        return self._stacks[key]


def run_units(session: Session, units: Sequence[Unit], workers: int) -> None:
    """Train units, ``workers`` at a time, until all have ended or `Control` says stop.

    The first failure stops the others, each with a checkpoint, and is raised once they have. On a CPU a unit runs on
    one thread, so its numbers do not depend on how many there are.
    """
    import torch

    waiting = list(reversed(units))
    lock = threading.Lock()
    failures: list[BaseException] = []

    def work() -> None:
        if session.device.type == "cpu":
            torch.set_num_threads(1)
        else:
            torch.cuda.set_device(session.device)
        while not session.control.stopping():
            with lock:
                if not waiting:
                    return
                unit = waiting.pop()
            try:
                train_unit(session, unit)
            except BaseException as error:  # noqa: BLE001  # raised again below, after the others have stopped
                failures.append(error)
                session.control.stop("failure")

    threads = torch.get_num_threads()
    with ThreadPoolExecutor(max(1, min(workers, len(units)))) as pool, session.control.signals():
        futures = [pool.submit(work) for _ in range(max(1, min(workers, len(units))))]
        for future in futures:
            while not future.done():
                time.sleep(0.02)  # signals reach the main thread here
    torch.set_num_threads(threads)
    if failures:
        raise failures[0]


def train_unit(session: Session, unit: Unit) -> bool:
    """Train a unit to its end, or to a checkpoint where `Control` says stop; return whether it ended.

    A stack that nobody asked for and that memory does not hold is trained in halves.
    """
    limit = session.stack_limit
    if len(unit) > limit:
        ended = session.store.load_runs()
        parts = [unit[start : start + limit] for start in range(0, len(unit), limit)]
        return all(train_unit(session, part) for part in parts if not all(run.name in ended for run in part))
    models, batch = len(unit), session.config.recipe.batch_size
    fewer = f"--stack {max(1, models // 2)} (same conditions) or " if models > 1 else ""
    advice = f"try {fewer}--batch-size {max(1, batch // 2)}, for every arm, with another --output"
    size = f"with {counted(models, 'model')} of batch {batch}"
    try:
        with room_for(size, advice, session.device):
            return _Training(session, unit).run()
    except OutOfMemoryError:
        if not session.automatic or models == 1:
            raise
    session.store.drop_checkpoint(unit_name(unit))
    session.halve(models)
    sys.stderr.write(
        f"note: {session.device} ran out of memory {size}: going on with stacks of {session.stack_limit}\n"
    )
    return train_unit(session, unit)


def resident_on(data: Dataset, config: Config, device: torch.device) -> Resident:
    """Put a data set on a device. Raises `OutOfMemoryError`."""
    advice = "train on fewer with --train-images, on smaller ones with --image-size, or free memory on it"
    with room_for(f"with the data of {data.name}", advice, device):
        return data.resident(config, device)


class Epochs(NamedTuple):
    """An epoch of several data seeds: inputs and targets ``[seed, item, ...]`` in their order of use, and hashes."""

    inputs: Tensor | SideBySide
    targets: Tensor
    streams: list[str]


def epochs_of(data: Resident, seeds: Sequence[int], epoch: int) -> Epochs:
    """Return an epoch of every data seed."""
    import torch

    drawn = [data.epoch(seed, epoch) for seed in seeds]
    inputs = side_by_side([one.inputs for one in drawn])
    return Epochs(inputs, torch.stack([one.targets for one in drawn]), [one.stream for one in drawn])


class _Training:
    """One unit on its way: the stack, where it stands, and the records of its runs."""

    def __init__(self, session: Session, unit: Unit) -> None:
        self.session, self.unit, self.name = session, unit, unit_name(unit)
        config = session.config
        self.wiring = session.wiring(unit[0].arm)
        self.stack = session.stack(len(unit), self.wiring)
        seeds = [session.seeds(run) for run in unit]
        self.data_seeds = sorted({data for data, _ in seeds})
        import torch

        self.where = torch.tensor([self.data_seeds.index(data) for data, _ in seeds], device=session.device)
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.records: list[list[Record]] = [[] for _ in unit]
        self.streams: dict[int, list[str]] = {seed: [] for seed in self.data_seeds}
        states = [
            initial_state(run.arm, init, config.network, session.source)
            for run, (_, init) in zip(unit, seeds, strict=True)
        ]
        self.stack.load(states, [run.lr for run in unit], config.recipe.epochs * session.steps)
        self._restore()

    def run(self) -> bool:
        """Train to the last epoch; return False where it had to stop before."""
        config, control, saved = self.session.config, self.session.control, time.monotonic()
        if not any(self.records):
            self._record(0, [math.nan] * len(self.unit))
        while self.epoch < config.recipe.epochs and not all(map(self._diverged, self.records)):
            if not self._train_epoch():
                self._save()
                return False
            losses = self.stack.take_losses(self.session.steps)
            self.epoch, self.step = self.epoch + 1, 0
            self._note_divergence(losses)
            if config.evaluated(self.epoch):
                self._record(self.epoch, losses)
            self._tell(losses)
            ended = self.epoch == config.recipe.epochs
            if not ended and time.monotonic() - saved >= self.session.checkpoint_seconds:
                self._save()
                saved = time.monotonic()
            if not ended and control.stopping():
                self._save()
                return False
        self._finish()
        return True

    def _train_epoch(self) -> bool:
        """Train the steps of an epoch that are left; return False where `Control` said stop."""
        began = time.monotonic()
        inputs, targets, streams = epochs_of(self.session.data, self.data_seeds, self.epoch)
        for seed, stream in zip(self.data_seeds, streams, strict=True):
            if len(self.streams[seed]) == self.epoch:
                self.streams[seed].append(stream)
        batch, control = self.session.config.recipe.batch_size, self.session.control
        whole = True
        for step in range(self.step, self.session.steps):
            if control.stopping():
                whole = False
                break
            part = slice(step * batch, (step + 1) * batch)
            self.stack.step(inputs[:, part], targets[:, part], self.where)
            self.step = step + 1
        if self.session.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.session.device)
        self.seconds += time.monotonic() - began
        return whole

    def _record(self, epoch: int, losses: Sequence[float]) -> None:
        """Measure every model that has not diverged, and note it."""
        session, config = self.session, self.session.config
        scores = self.stack.evaluate(session.data.test_inputs, session.data.test_targets)
        for number, run in enumerate(self.unit):
            if self._diverged(self.records[number]):
                continue
            tensors = {name: value.numpy() for name, value in self.stack.state(number).items()}
            items = epoch * session.steps * config.recipe.batch_size
            record: Record = {
                "status": "finished" if epoch == config.recipe.epochs else "running",
                "accuracy": scores.accuracy[number],
                "test_loss": _finite(scores.loss[number]),
                "train_loss": _finite(losses[number]),
                f"{config.items}_seen": items,
                "effective_epochs": items / session.data.whole,
                "structure": structure_of(session.specs[self.wiring], tensors),
            }
            if config.network.metric.share:
                record["balanced_accuracy"] = scores.balanced[number]
            if config.metric.nats is not None:
                record[config.metric.field] = _finite(scores.loss[number] / config.metric.nats)
            if None in (config.metric.of(record), record["structure"]):
                record = {"status": "diverged"}
            self.records[number].append(self._line(run, number, epoch) | record)
        session.listen(self.unit, {"measured": [list(records) for records in self.records]})

    def _note_divergence(self, losses: Sequence[float]) -> None:
        for number, run in enumerate(self.unit):
            if not math.isfinite(losses[number]) and not self._diverged(self.records[number]):
                self.records[number].append(self._line(run, number, self.epoch) | {"status": "diverged"})

    def _line(self, run: Run, number: int, epoch: int) -> Record:
        """Return what every record says: which run, where, under which streams, and where it was made."""
        session, (data, init) = self.session, self.session.seeds(run)
        known = sum(len(record["streams"]) for record in self.records[number])
        return {
            "arm": run.arm,
            "seed": run.seed,
            "data_seed": data,
            "init_seed": init,
            "lr": run.lr,
            "tuning": run.tuning,
            "epoch": epoch,
            "train_seconds": round(self.seconds, 3),
            "models_in_stack": len(self.unit),
            "streams": self.streams[data][known:epoch],
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "provenance": session.provenance,
        }

    @staticmethod
    def _diverged(records: Sequence[Record]) -> bool:
        return bool(records) and records[-1]["status"] == "diverged"

    def _tell(self, losses: Sequence[float]) -> None:
        items = len(self.unit) * self.session.steps * self.session.config.recipe.batch_size
        latest = [self.session.config.metric.of(records[-1]) for records in self.records]
        self.session.listen(self.unit, {"epoch": self.epoch, "items": items, "losses": list(losses), "scores": latest})

    def _save(self) -> None:
        self.session.store.save_checkpoint(
            self.name,
            {
                "unit": [run.name for run in self.unit],
                "epoch": self.epoch,
                "step": self.step,
                "seconds": self.seconds,
                "streams": self.streams,
                "records": json.dumps(self.records),
                "stack": self.stack.snapshot(),
            },
        )

    def _restore(self) -> None:
        state = self.session.store.load_checkpoint(self.name)
        if state is None:
            return
        self.epoch, self.step, self.seconds = state["epoch"], state["step"], state["seconds"]
        config, steps = self.session.config, self.session.steps
        names, like = [run.name for run in self.unit], self.stack.snapshot()
        self.records = restorable(state, unit=names, seeds=self.data_seeds, config=config, steps=steps, like=like)
        check_gathered(state["stack"], self.stack.optimizer, f"the checkpoint of {self.name}")
        self.streams = state["streams"]
        self.stack.restore(state["stack"])

    def _finish(self) -> None:
        session = self.session
        if session.save_weights:
            network = session.config.network
            metadata = network.exported()
            if wired := self.wiring.describe():
                metadata = {"network": f"{network.module}, {wired}"}
            metadata = {**metadata, "config_sha256": session.config.sha256()}
            for number, run in enumerate(self.unit):
                if not self._diverged(self.records[number]):
                    session.store.save_weights(run, self.stack.state(number), metadata | session.trained_on(run))
        for run, records in zip(self.unit, self.records, strict=True):
            session.store.save_run(run, records)
        session.store.drop_checkpoint(self.name)
        session.listen(self.unit, {"ended": True, "records": self.records})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
