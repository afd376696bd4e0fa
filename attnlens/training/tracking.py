"""Alpha and beta of a network in somebody's own training loop, measured and written as `train_compare` does."""

from __future__ import annotations

import os
from contextlib import suppress
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.atomic import FileSet
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.state import read_state
from attnlens.statistics.table import StatsTable
from attnlens.strict_json import parse_json
from attnlens.training.record_schema import ResumeError
from attnlens.training.structure import FOLDS, Structure, measure_structure, structure_line
from attnlens.words import counted

if TYPE_CHECKING:
    from torch import nn

    from attnlens.models.opened import OpenedModel

Line = dict[str, Any]


class StructureTracker:
    """Measure alpha and beta of every attention layer of ``model`` once an epoch, in any training loop.

    Of each layer M ~ alpha Z + beta I is fitted (`attnlens.inspect` has the equations): ``qk_alpha`` and ``qk_beta``
    are means over the heads of W_Q W_K^T, ``ov_alpha`` and ``ov_beta`` are of the sum over heads of W_V W_O, each for
    raw and for effective products. Layers whose norms are not known are left out.

        tracker = attnlens.StructureTracker(model, "structure")
        tracker.update()                      # epoch 0: as it starts
        for epoch in range(epochs):
            train(model)
            tracker.update()                  # 1, 2, ...

    Every `update` writes ``structure.jsonl`` (a line an epoch: ``run``, ``epoch``, ``structure``, as train-compare
    writes them) and ``structure.png`` to ``folder``, each whole. `lightning` and `transformers` return callbacks that
    call it. The model may be wrapped (DDP, torch.compile, PEFT, a LightningModule); of several processes the first one
    alone writes. Nothing of the model changes, and no random number is drawn.

    ``run`` names the run in file and figure. With ``resume`` a file that is there is gone on with, and epochs that are
    measured again replace their lines; without, it is refused.

    Raises what `attnlens.inspect` raises for a live model; `UsageError` for a folder that holds another run;
    `OutputError` where it cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str | os.PathLike[str] = "structure",
        *,
        run: str = "training",
        resume: bool = False,
        figure: bool = True,
    ) -> None:
        from torch import nn

        if not isinstance(model, nn.Module):
            raise UsageError(f"a {type(model).__name__} is no network in training: give the torch.nn.Module itself")
        self._opened = _opened(model)
        self.folder, self.run, self._figure = Path(folder), run, figure
        self.lines: list[Line] = _stored(self.folder / "structure.jsonl") if _leads() else []
        if self.lines and not resume:
            raise UsageError(
                f"{self.folder}/structure.jsonl holds a run already: pass resume=True to go on, or another folder"
            )

    def __repr__(self) -> str:
        """Say what is tracked, how far, and where."""
        return f"<StructureTracker of {self._opened.name}: {counted(len(self.lines), 'epoch')} in {self.folder}>"

    @property
    def model(self) -> str:
        """Name of the network."""
        return self._opened.name

    def update(self, epoch: float | None = None) -> Structure:
        """Measure the model as it is, write both files, and return what was measured: by fold, a value a layer.

        ``epoch`` is 0 before training; None is one more than at the call before. Lines of that epoch and later ones
        are replaced.
        """
        if epoch is None:
            epoch = self.lines[-1]["epoch"] + 1 if self.lines else 0
        structure = self._measured()
        if _leads():
            kept = [line for line in self.lines if line["epoch"] < epoch]
            self.lines = [*kept, {"run": self.run, "epoch": epoch, "structure": structure}]
            self._write()
        return structure

    def __call__(self, epoch: float | None = None) -> Structure:
        """Do what `update` does."""
        return self.update(epoch)

    def table(self) -> StatsTable:
        """Return a row an epoch, fold and layer: run, epoch, fold, layer, qk_alpha, qk_beta, ov_alpha, ov_beta."""
        names = list(self._measured()[FOLDS[0]])
        rows = [
            (line["run"], line["epoch"], fold, layer, *values)
            for line in self.lines
            for fold, fits in line["structure"].items()
            for layer, values in enumerate(zip(*(fits[name] for name in names), strict=True))
        ]
        return StatsTable(tuple(rows), ("run", "epoch", "fold", "layer", *names))

    def lightning(self) -> Any:
        """Return a Lightning callback: epoch 0 when fitting begins, then after every training epoch.

        Raises `UsageError` where Lightning is not installed.
        """
        from attnlens.training.callbacks import lightning_callback

        return lightning_callback(self)

    def transformers(self) -> Any:
        """Return a callback for the Trainer of transformers: epoch 0 when training begins, then after every epoch.

        Raises `UsageError` where transformers is not installed.
        """
        from attnlens.training.callbacks import trainer_callback

        return trainer_callback(self)

    def _measured(self) -> Structure:
        return _measured(self._opened)

    def _write(self) -> None:
        from attnlens.figures import save_figures
        from attnlens.training.figures import structure_figure

        lines = [structure_line(line["run"], line["epoch"], line["structure"]) for line in self.lines]
        drawn = {}
        if self._figure:
            points = [(float(line["epoch"]), line["structure"]) for line in self.lines]
            last = max(1.0, points[-1][0])
            title = f"{self._opened.name}: structure through training"
            told = f"{counted(int(points[-1][0]), 'epoch')}."
            drawn["structure"] = structure_figure(title, told, {self.run: [points]}, last)
        with FileSet() as files:
            save_figures(drawn, self.folder, into=files.write)
            files.write(self.folder / "structure.jsonl", methodcaller("write", "".join(lines).encode()))


def _measured(opened: OpenedModel) -> Structure:
    return measure_structure(opened.architecture.indexed(), opened.checkpoint)


def _opened(model: nn.Module) -> OpenedModel:
    """Open a live network, or the only part of it that has a forward pass of its own.

    Norms are told by a forward pass, and what trainers are given (a LightningModule) often has none.
    """
    from attnlens.models.open import open_model

    opened = open_model(model, None)
    if any(_measured(opened)["raw"].values()):
        return opened
    inside = []
    for child in model.children():
        with suppress(UnsupportedAttentionError):
            inside.append(_opened(child))
    if len(inside) != 1:
        raise UnsupportedAttentionError(
            f"no layer of {opened.name} has norms and an output that are known{opened.untraced}: give the network "
            "itself, not what holds it"
        )
    return inside[0]


def _stored(path: Path) -> list[Line]:
    """Read the lines of a file that is there. Raises `ResumeError` for what is no such file."""
    if not path.is_file():
        return []
    try:
        lines = [parse_json(line, constant=float) for line in read_state(path).splitlines()]
        assert all({"run", "epoch", "structure"} <= line.keys() for line in lines)
        assert all(isinstance(line["epoch"], int | float) for line in lines)
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise ResumeError(f"{path} cannot be read ({error}): move it away, or name another folder") from error
    return lines


def _leads() -> bool:
    """Whether this process is the only one, or the first of several."""
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
