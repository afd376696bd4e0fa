"""Tensors a file does not store but for what they are made of: a view of a checkpoint that computes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlens.checkpoints.base import Checkpoint, View
from attnlens.errors import CheckpointError

Values = NDArray[np.float64]


class _Sized(np.ndarray[Any, np.dtype[np.float64]]):
    """Values whose operations, entry by entry, give no more entries than the largest operand: `ValueError` if more.

    Shapes that differ may broadcast to a product of both. What is made of a file's tensors is no larger than they are.
    """

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        """Apply a ufunc as numpy does, where the result is no larger."""
        plain = [value.view(np.ndarray) if isinstance(value, _Sized) else value for value in inputs]
        if method == "__call__" and ufunc.signature is None:
            shapes = [np.shape(value) for value in plain]
            if math.prod(np.broadcast_shapes(*shapes)) > max(map(math.prod, shapes)):
                raise ValueError(f"{' and '.join(map(str, shapes))} broadcast to more than either")
        found = getattr(ufunc, method)(*plain, **options)
        return found.view(_Sized) if isinstance(found, np.ndarray) else found


@dataclass(frozen=True)
class Recipe:
    """A tensor made from stored ones: their names, its shape, the formula, whose operations may not spread them."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    formula: Callable[..., Values]


@dataclass
class Plan:
    """What a view changes: tensors that are made, refused with a reason, renamed, hidden."""

    stored: Checkpoint
    made: dict[str, Recipe] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)

    def make(self, name: str, parts: tuple[str, ...], shape: tuple[int, ...], formula: Callable[..., Values]) -> None:
        """Make a tensor from stored ones, which are hidden; one that is stored besides is refused."""
        self.made[name] = Recipe(parts, shape, formula)
        self.hidden |= {*parts} - {name}
        if name in self.stored and name not in parts:
            self.refused[name] = f"is stored beside {parts[0]}, and which of the two the network applies is not known"

    def view(self, how: str) -> Checkpoint:
        """Return the checkpoint as planned, or itself where nothing changes."""
        return AppliedWeights(self, how) if self.made or self.refused else self.stored


class AppliedWeights(View):
    """A checkpoint some of whose tensors are computed, in float64; its provenance says how."""

    def __init__(self, plan: Plan, how: str) -> None:
        self._stored, self._made, self._refused, self._how = plan.stored, plan.made, plan.refused, how
        self.behind = (plan.stored,)
        gone = plan.hidden
        self._names = dict.fromkeys([*(n for n in plan.stored if n not in gone), *plan.made, *plan.refused])
        self.metadata = plan.stored.metadata
        self.computed = (*plan.stored.computed, *([how] if plan.made else []))
        fronts = {name.rpartition(".")[0]: front for name, front in plan.stored.keys_in_front.items()}
        new = {name: fronts.get(name.rpartition(".")[0], "") for name in plan.refused}
        new |= {name: plan.stored.keys_in_front.get(made.parts[0], "") for name, made in plan.made.items()}
        self.keys_in_front = {**new, **plan.stored.keys_in_front} if fronts else {}

    def provenance(self) -> dict[str, Any]:
        """Return the origin's provenance, and how tensors were computed."""
        return {**self._stored.provenance(), **({"computed": list(self.computed)} if self.computed else {})}

    def expect(self, names: Iterable[str]) -> None:
        """Tell the origin which of its tensors will be asked for."""
        parts = [self._made[name].parts if name in self._made else (name,) for name in names]
        self._stored.expect([part for several in parts for part in several])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape. Raises `CheckpointError` for one that cannot be computed."""
        self._check(name)
        return self._made[name].shape if name in self._made else self._stored.shape(name)

    def _check(self, name: str) -> None:
        if name in self._refused:
            raise CheckpointError(f"{name} {self._refused[name]}")

    def __getitem__(self, name: str) -> Any:
        """Return a tensor, computed where it must be. Raises `CheckpointError` for one that cannot be computed."""
        self._check(name)
        if name not in self._made:
            return self._stored[name]
        recipe = self._made[name]
        try:
            with np.errstate(all="ignore"):  # what is not finite is told by the reader of heads, with the name
                values = recipe.formula(*(widened_codes(self._stored[part]).view(_Sized) for part in recipe.parts))
            return np.ascontiguousarray(np.broadcast_to(values, recipe.shape))
        except MemoryError as error:
            raise CheckpointError(
                f"{name} cannot be computed ({self._how}): it takes more memory than there is"
            ) from error
        except (ValueError, IndexError) as error:
            shapes = ", ".join(f"{part} {self._stored.shape(part)}" for part in recipe.parts)
            raise CheckpointError(f"{name} cannot be computed ({self._how}): the shapes of {shapes} differ") from error


def widened_codes(stored: Any) -> Values:
    """Widen to float64, integer codes too."""
    if not isinstance(stored, np.ndarray):
        stored = stored.detach().cpu().double().numpy()
    return np.asarray(stored, dtype=np.float64)
