"""What an initialiser is given and what it returns: one layer in, its new weights out.

Factors of an attention layer are in the coordinates of a fold; filters of a depthwise layer are as they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from attnlens.circuits import Fold, Kind
from attnlens.heads import Array, HeadWeights
from attnlens.inits.random import Streams
from attnlens.layouts import AttentionSpec
from attnlens.layouts.depthwise.spec import FilterSpec
from attnlens.layouts.read_write import Tensors
from attnlens.models.architecture import Architecture
from attnlens.statistics.table import ALL_HEADS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from attnlens.checkpoints import Checkpoint


class Request(NamedTuple):
    """What a product was drawn with, before any truncation: ``alpha * Z + beta * I``."""

    circuit: Kind
    head: int | str
    alpha: float
    beta: float


class PlannedGains(NamedTuple):
    """The gains a product was drawn with: where they stand, and the tails they give it."""

    circuit: Kind
    head: int | str
    by_channel: bool
    """Whether each channel's gain is settled; else only which gains there are."""
    kurtosis: float
    """Excess, of the product's off-diagonal entries before balancing; NaN where none is asked for."""


@dataclass(frozen=True)
class Network:
    """What an initialiser may look at before it starts: the architecture, its weights, and the seed's streams."""

    architecture: Architecture
    tensors: Checkpoint | Tensors
    streams: Streams
    build: Callable[[], nn.Module] | None = None
    """Returns the live network, or one like it; None where only weights are at hand."""


@dataclass(frozen=True)
class Layer:
    """One attention layer to initialise: its place, its layout, and its weights as they are now."""

    index: int
    spec: AttentionSpec
    weights: HeadWeights
    streams: Streams
    device: torch.device
    """Where the linear algebra runs; numbers are always drawn on the CPU."""
    batched: bool = False
    """Whether all heads go through the linear algebra at once (a GPU) or one by one (a CPU)."""

    @property
    def query_groups(self) -> int:
        """Number of query heads that share one key head."""
        return self.weights.num_heads // self.weights.num_kv_heads

    @property
    def value_groups(self) -> int:
        """Number of heads of W_O that share one value head."""
        return self.weights.num_value_heads // int(self.weights.W_V.shape[0])

    @property
    def values_width(self) -> int:
        """Width of all value heads side by side: the largest rank the layer's OV product can have."""
        return int(self.weights.W_V.shape[0]) * self.weights.value_dim


@dataclass(frozen=True)
class Plan:
    """A layer's new factors, in the coordinates of the rule's fold; None leaves a role as it is.

    Shapes as in `HeadWeights`. ``total`` is the requested ``[embed_dim, out_dim]`` product of the layer's OV, where
    the factors are to multiply to a matrix that is known whole.
    """

    W_Q: Array | None = None
    W_K: Array | None = None
    W_V: Array | None = None
    W_O: Array | None = None
    biases: Mapping[str, Array] = field(default_factory=dict)
    """New biases by role; a role whose weights are new and whose bias is not named here gets a bias of zero."""
    total: Array | None = None
    requests: tuple[Request, ...] = ()
    gains: tuple[PlannedGains, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    """(circuit, reason) for what was left as it is though it was requested."""
    notes: tuple[str, ...] = ()

    def weights(self) -> dict[str, Array]:
        """Return the new weights by role."""
        found = {"q": self.W_Q, "k": self.W_K, "v": self.W_V, "o": self.W_O}
        return {role: weight for role, weight in found.items() if weight is not None}


def without_silent(plan: Plan, silent: Collection[str]) -> Plan:
    """Leave out of a plan the circuits that a BatchNorm of gain zero silences, and say so."""
    circuits: tuple[tuple[Kind, str, str], ...] = (("qk", "q", "k"), ("ov", "v", "o"))
    for circuit, *roles in circuits:
        if plan.weights().keys() & set(roles) and set(silent) & set(roles):
            reason = "the BatchNorm behind a projection has entries of weight zero: set it before initialising"
            plan = replace(
                plan,
                **{f"W_{role.upper()}": None for role in roles},  # type: ignore[arg-type]
                total=plan.total if circuit == "qk" else None,
                requests=tuple(request for request in plan.requests if request.circuit != circuit),
                gains=tuple(each for each in plan.gains if each.circuit != circuit),
                skipped=(*plan.skipped, (circuit, reason)),
            )
    return plan


@dataclass(frozen=True)
class FilterLayer:
    """One layer of depthwise filters to initialise: its place, and its filters as they are now."""

    index: int
    spec: FilterSpec
    depth: float
    """Relative depth among the network's layers of filters: index / (number of them - 1)."""
    filters: Array
    """``[filter, height, width]``"""
    streams: Streams


@dataclass(frozen=True)
class FilterPlan:
    """A layer's new filters ``[filter, height, width]``; None leaves it as it is, and ``skipped`` says why.

    ``covariance`` is the one they were drawn with, ``[position, position]`` of any scale, where there is one. Biases
    become zero, unless ``bias`` says otherwise.
    """

    filters: Array | None = None
    covariance: Array | None = None
    bias: Array | None = None
    skipped: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rule:
    """An initialiser with its options resolved: what it will do to each layer of attention, of filters, or of both."""

    plan: Callable[[Layer], Plan] | None = None
    fold: Fold = "raw"
    """Coordinates of the plan: ``effective`` products have norm gain and LayerScale folded in. ``balanced``: these
    coordinates too, and it is the balanced products that have the requested parameters."""
    requests: Callable[[Layer], tuple[Request, ...]] | None = None
    """alpha and beta of every product, without drawing anything; None where there are no such numbers."""
    random: bool = True
    """Whether the seed matters."""
    replays: bool = True
    """Whether the same seed gives the same plan wherever the network's weights came from."""
    filters: Callable[[FilterLayer], FilterPlan] | None = None
    """What it will do to layers of depthwise filters; ``plan`` is for attention. One of the two is there."""


__all__ = [
    "ALL_HEADS",
    "FilterLayer",
    "FilterPlan",
    "Layer",
    "Network",
    "Plan",
    "PlannedGains",
    "Request",
    "Rule",
    "without_silent",
]
