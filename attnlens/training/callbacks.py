"""Callbacks of other people's trainers that call a `StructureTracker` once an epoch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from attnlens.errors import UsageError

Update = Callable[[float], object]


def lightning_callback(update: Update) -> Any:
    """Return a callback of Lightning, of the package that is in use: ``lightning`` or ``pytorch_lightning``."""
    names = ("lightning.pytorch", "pytorch_lightning")
    used = next((name for name in names if name in sys.modules), None)
    base = _imported(names if used is None else (used,), "Lightning", "pip install lightning").Callback

    class StructureCallback(base):  # type: ignore[misc, valid-type]  # either package may be missing
        """Measure before the first epoch and after each."""

        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002  # Lightning's signature
            if not trainer.current_epoch:
                update(0)

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:  # noqa: ARG002  # Lightning's signature
            update(trainer.current_epoch + 1)

    return StructureCallback()


def trainer_callback(update: Update) -> Any:
    """Return a callback of transformers' Trainer."""
    base = _imported(("transformers",), "transformers", "pip install transformers accelerate").TrainerCallback

    class StructureCallback(base):  # type: ignore[misc, valid-type]  # the package may be missing
        """Measure before the first epoch and after each."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  # theirs
            if not state.global_step:
                update(0)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002  # theirs
            epoch = round(state.epoch, 4)  # a share of an epoch where steps were counted and not epochs
            update(int(epoch) if epoch == int(epoch) else epoch)

    return StructureCallback()


def _imported(names: tuple[str, ...], what: str, how: str) -> Any:
    for name in names:
        try:
            return import_module(name)
        except ImportError:
            continue
    raise UsageError(f"{what} is not installed: {how}")
