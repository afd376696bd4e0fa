"""Training the runs of a comparison: units of work, workers, checkpoints, divergence, memory."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from attnlens.errors import AttnlensError
from attnlens.training.arms import Source, initial_state
from attnlens.training.augment import augmented, draw_epoch, fill_value
from attnlens.training.config import TUNING_SEEDS, Config, Run
from attnlens.training.control import Control
from attnlens.training.engine import Resident, Stack
from attnlens.training.network import ARCHITECTURE, build_network, model_args
from attnlens.training.records import check_gathered, restorable
from attnlens.training.store import Record, Store
from attnlens.training.streams import digest, epoch_order
from attnlens.training.structure import measure_structure

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnlens.layouts import AttentionSpec

Unit = tuple[Run, ...]
Listener = Callable[[Unit, dict[str, Any]], None]


class OutOfMemoryError(AttnlensError):
    """The device's memory does not hold a stack and its batch."""


def units_of(runs: Sequence[Run], stack: int) -> list[Unit]:
    """Cut runs, seed by seed, into units of ``stack`` runs: a fixed cut, whatever was done and wherever."""
    ordered = sorted(runs, key=lambda run: run.seed)  # stable: arms keep their order within a seed
    return [tuple(ordered[start : start + stack]) for start in range(0, len(ordered), stack)]


def unit_name(unit: Unit) -> str:
    """Return a file name."""
    return unit[0].name if len(unit) == 1 else f"{unit[0].name}+{len(unit) - 1}"


@dataclass
class Session:
    """What every unit of one phase shares."""

    config: Config
    source: Source
    data: Resident
    images: int
    device: torch.device
    store: Store
    control: Control
    provenance: dict[str, Any]
    listen: Listener = lambda _unit, _what: None
    checkpoint_seconds: float = 60.0
    save_weights: bool = False
    specs: Sequence[tuple[int, AttentionSpec]] = ()
    _stacks: dict[tuple[int, int], Stack] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        from attnlens.architecture import describe_module

        self.specs = describe_module(build_network(self.config.shape, 0)).indexed()

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self.images // self.config.recipe.batch_size

    def seeds(self, run: Run) -> tuple[int, int]:
        """Return a run's data and init seed."""
        offset = run.seed + TUNING_SEEDS * run.tuning
        return self.config.data_seed + offset, self.config.init_seed + offset

    def stack(self, models: int) -> Stack:
        """Return this thread's stack of a size, built and compiled once."""
        key = (threading.get_ident(), models)
        if key not in self._stacks:
            with self._lock:
                self._stacks[key] = Stack(self.config, models, self.device)
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
    """Train a unit to its end, or to a checkpoint where `Control` says stop; return whether it ended."""
    try:
        return _Training(session, unit).run()
    except (MemoryError, RuntimeError) as error:
        if not _is_memory(error):
            raise
        batch, models = session.config.recipe.batch_size, len(unit)
        less = f"--stack {max(1, models // 2)} (same conditions) or " if models > 1 else ""
        raise OutOfMemoryError(
            f"{session.device} ran out of memory with {models} model{'s' * (models > 1)} of batch {batch}: try {less}"
            f"--batch-size {max(1, batch // 2)}, for every arm, with another --output"
        ) from error


def _is_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)  # the CPU allocator raises a plain RuntimeError


class _Training:
    """One unit on its way: the stack, where it stands, and the records of its runs."""

    def __init__(self, session: Session, unit: Unit) -> None:
        self.session, self.unit, self.name = session, unit, unit_name(unit)
        config = session.config
        self.stack = session.stack(len(unit))
        seeds = [session.seeds(run) for run in unit]
        self.data_seeds = sorted({data for data, _ in seeds})
        import torch

        self.where = torch.tensor([self.data_seeds.index(data) for data, _ in seeds], device=session.device)
        self.fill = torch.from_numpy(fill_value(config.mean)).to(session.device)
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.records: list[list[Record]] = [[] for _ in unit]
        self.streams: dict[int, list[str]] = {seed: [] for seed in self.data_seeds}
        states = [
            initial_state(run.arm, init, config.shape, session.source)
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
        images, labels = self._epoch_data()
        batch, control = self.session.config.recipe.batch_size, self.session.control
        whole = True
        for step in range(self.step, self.session.steps):
            if control.stopping():
                whole = False
                break
            part = slice(step * batch, (step + 1) * batch)
            self.stack.step(images[:, part], labels[:, part], self.where)
            self.step = step + 1
        if self.session.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.session.device)
        self.seconds += time.monotonic() - began
        return whole

    def _epoch_data(self) -> tuple[Tensor, Tensor]:
        """Return every data seed's epoch in order, augmented: ``[seed, image, channel, y, x]``, ``[seed, image]``."""
        import torch

        config, data = self.session.config, self.session.data
        batch, size = config.recipe.batch_size, config.shape.image_size
        images, labels = [], []
        for seed in self.data_seeds:
            order = epoch_order(seed, self.epoch, self.session.images, batch)
            draws = draw_epoch(config.recipe.augment, seed, self.epoch, len(order), size)
            if len(self.streams[seed]) == self.epoch:
                self.streams[seed].append(digest(order, draws))
            index = torch.from_numpy(order).to(self.session.device)
            images.append(augmented(data.train[index], draws, self.fill))
            labels.append(data.train_labels[index])
        return torch.stack(images), torch.stack(labels)

    def _record(self, epoch: int, losses: Sequence[float]) -> None:
        """Measure every model that has not diverged, and note it."""
        session, config = self.session, self.session.config
        accuracies, test_losses = self.stack.evaluate(session.data.test, session.data.test_labels)
        for number, run in enumerate(self.unit):
            if self._diverged(self.records[number]):
                continue
            tensors = {name: value.numpy() for name, value in self.stack.state(number).items()}
            images = epoch * session.steps * config.recipe.batch_size
            self.records[number].append(
                self._line(run, number, epoch)
                | {
                    "status": "finished" if epoch == config.recipe.epochs else "running",
                    "accuracy": accuracies[number],
                    "test_loss": _finite(test_losses[number]),
                    "train_loss": _finite(losses[number]),
                    "images_seen": images,
                    "effective_epochs": images / session.images,
                    "structure": measure_structure(session.specs, tensors),
                }
            )

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
        images = len(self.unit) * self.session.steps * self.session.config.recipe.batch_size
        latest = [records[-1].get("accuracy") for records in self.records]
        self.session.listen(
            self.unit, {"epoch": self.epoch, "images": images, "losses": list(losses), "accuracies": latest}
        )

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
        names, arms = [run.name for run in self.unit], self.session.config.arms
        like = self.stack.snapshot()
        self.records = restorable(state, unit=names, seeds=self.data_seeds, arms=arms, like=like)
        check_gathered(state["stack"], self.stack.optimizer, f"the checkpoint of {self.name}")
        self.streams = state["streams"]
        self.stack.restore(state["stack"])

    def _finish(self) -> None:
        session = self.session
        if session.save_weights:
            metadata = {"architecture": ARCHITECTURE, "model_args": json.dumps(model_args(session.config.shape))}
            for number, run in enumerate(self.unit):
                if not self._diverged(self.records[number]):
                    session.store.save_weights(run, self.stack.state(number), metadata)
        for run, records in zip(self.unit, self.records, strict=True):
            session.store.save_run(run, records)
        session.store.drop_checkpoint(self.name)
        session.listen(self.unit, {"ended": True, "records": self.records})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
