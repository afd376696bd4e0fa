"""What opening a model gives: an architecture with weights that fit it, and how weights on a hub are reached."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any

from attnlens.checkpoints import Checkpoint, SafetensorsFile
from attnlens.circuits import Fold
from attnlens.errors import UsageError
from attnlens.heads import Array, HeadWeights
from attnlens.layouts import AttentionSpec, Refusal, read_heads
from attnlens.layouts.depthwise.read_write import read_filters
from attnlens.models.architecture import Architecture
from attnlens.printable import printable, utf8_data, utf8_text
from attnlens.threads import beside
from attnlens.vocabulary import layer_index
from attnlens.words import counted

IndexedSpecs = tuple[tuple[int, AttentionSpec], ...]
StrPath = str | os.PathLike[str]
Weights = StrPath | Mapping[str, Any]
"""Where weights are: a file, or a state dict in memory."""


@dataclass(frozen=True)
class Access:
    """How weights are reached, and which of a file's are read.

    ``offline`` from the local cache alone, ``remote`` only the tensors needed. ``network`` names one of several
    networks in a file; ``row_order`` says how the rows of packed projections are ordered where only names are known.
    """

    offline: bool = False
    remote: bool = False
    network: str | None = None
    row_order: str | None = None


ONLINE = Access()
"""Whole files, from the local cache or the hub."""


@dataclass(frozen=True, repr=False)
class OpenedModel:
    """An architecture with weights that fit it."""

    name: str
    architecture: Architecture
    checkpoint: Checkpoint
    source: dict[str, str]
    timm_args: dict[str, Any] | None = field(default=None, kw_only=True)
    """Arguments timm builds the architecture with; None where it is not timm's, or timm need not be asked."""
    _reading: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)
    """A checkpoint serves one reader at a time."""

    def __repr__(self) -> str:
        """Say which architecture was opened under which name."""
        layers = counted(len(self.architecture.specs), "attention layer")
        return f"<OpenedModel {printable(self.name)}: {self.architecture.name}, {layers}>"

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", utf8_text(self.name))

    @property
    def untraced(self) -> str:
        """Why norms are not known, in brackets, where a live network's forward pass could not be followed."""
        reason = self.architecture.untraced
        return f" (no forward pass could be followed: {reason}; give input_size=)" if reason else ""

    def provenance(self) -> dict[str, Any]:
        """Return the architecture and where its weights are from: the name given and, for a file, size and hash."""
        found = {"architecture": self.architecture.name, **self.source, **self.checkpoint.provenance()}
        return {name: utf8_data(value) for name, value in found.items()}

    def provenance_beside(self) -> Callable[[], dict[str, Any]]:
        """Begin to hash a local file beside the reading of it; the function returned gives `provenance` at the end.

        It raises `CheckpointError` where the file is then no longer the one that was hashed.
        """
        if not isinstance(self.checkpoint, SafetensorsFile):  # what others say of themselves may depend on what is read
            return self.provenance
        begun = beside(self.provenance)

        def found() -> dict[str, Any]:
            result = begun()
            self.checkpoint.check()
            return result

        return found

    @property
    def inputs_first(self) -> bool | None:
        """Whether projections are stored ``[in, out]``, as a Conv1D's; None where layers differ, or there is none."""
        slots = (pair for spec in self.architecture.specs for pair in spec.slots().items())
        found = {(slot.axis == 1) != (role == "o") for role, slot in slots}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def _specs(self) -> dict[int, AttentionSpec]:
        return dict(self.architecture.indexed())

    def heads(self, layer: int) -> HeadWeights:
        """Read the weights of an attention layer, one thread at a time."""
        with self._reading:
            found = read_heads(self._specs[layer], self.checkpoint, layer)
            self.checkpoint.let_go()
            return found

    def filters(self, layer: int) -> Array:
        """Read a layer of depthwise filters ``[filter, height, width]``, one thread at a time."""
        with self._reading:
            return read_filters(self.architecture.filters[layer], self.checkpoint)

    def bytes_of(self, spec: AttentionSpec) -> int:
        """Return the bytes the tensors of an attention layer take in float64."""
        return 8 * sum(math.prod(self.architecture.shapes[name]) for name in spec.tensors())

    def not_asked_for(self, include: Sequence[str] = ()) -> dict[int, Refusal]:
        """Return the layers of a kind that is read on request only and is not in ``include``, each with why."""
        refusals = {
            layer: spec.opt_in_refusal() for layer, spec in self.architecture.indexed() if spec.kind not in include
        }
        return {layer: refusal for layer, refusal in refusals.items() if refusal is not None}

    def choose(
        self, layers: Sequence[int] | None, fold: Fold = "raw", include: Sequence[str] = (), *, or_filters: bool = False
    ) -> IndexedSpecs:
        """Return the attention layers, those of ``layers`` alone where given, that have products under ``fold``.

        ``include`` names kinds that are read on request only; ``or_filters``: ``layers`` may also name layers of
        depthwise filters. Raises `UsageError` for a layer that cannot be read, or where no norm in front is known.
        """
        unwanted = self.not_asked_for(include)
        specs = [pair for pair in self.architecture.indexed() if pair[0] not in unwanted]
        known = [pair for pair in specs if pair[1].has_fold(fold)]
        if specs and not known:
            raise UsageError(unknown_norms(self))
        readable = {layer for layer, _ in known} | set(range(len(self.architecture.filters)) if or_filters else ())
        for layer in layers or ():
            layer_index(layer, readable, f"of {self.name} cannot be read")
        chosen = None if layers is None else set(layers)
        return tuple(pair for pair in known if chosen is None or pair[0] in chosen)


def unknown_norms(opened: OpenedModel) -> str:
    """Say that a model has no product but the raw ones."""
    return f"the norms in front of the layers of {opened.name} are not known{opened.untraced}: use --fold raw"
