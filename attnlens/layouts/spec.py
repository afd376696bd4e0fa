"""What a layout is: plain data that says where each head's q, k, v and output weights lie. JSON in, JSON out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one role (q, k, v or o) lies in a stored tensor.

    Entry ``unit`` of head ``head`` is index ``offset + head * head_stride + unit * unit_stride`` along ``axis`` of
    the tensor, flattened to two dimensions (a 1x1 convolution's trailing axes are dropped). The other axis is the
    side of the network: input for q, k, v, output for o. Where ``{head}`` stands in ``tensor``, each head has a
    tensor of its own and ``head_stride`` is 0. Where rows of other roles stand between ``group`` heads and the next
    ``group``, ``group_stride`` leads from one group to the next and ``head_stride`` from head to head inside it.

    ``bias`` names the bias vector, indexed as the weight with ``bias_offset`` for ``offset``; for o it is the whole
    vector. ``batch_norm`` names a BatchNorm behind the projection that is folded into weight and bias on reading
    and taken out again on writing; its channels are indexed with ``batch_norm_offset``, for o they are the outputs.
    ``{head}`` may stand in both names.
    """

    tensor: str
    heads: int
    width: int
    head_stride: int
    offset: int = 0
    unit_stride: int = 1
    group: int | None = None
    group_stride: int = 0
    axis: int = 0
    bias: str | None = None
    bias_offset: int = 0
    batch_norm: str | None = None
    batch_norm_offset: int = 0
    batch_norm_eps: float = 1e-5

    @property
    def per_head(self) -> bool:
        """Whether each head has a tensor of its own."""
        return "{head}" in self.tensor

    def named(self, name: str) -> tuple[str, ...]:
        """Return ``name`` once, or once per head with ``{head}`` filled in where each head has its own tensor."""
        return tuple(name.replace("{head}", str(head)) for head in range(self.heads)) if self.per_head else (name,)

    def tensors(self) -> tuple[str, ...]:
        """Name every tensor this slot reads: weights, then biases, then BatchNorm leaves."""
        names = list(self.named(self.tensor))
        if self.bias:
            names += self.named(self.bias)
        for norm in self.named(self.batch_norm) if self.batch_norm else ():
            names += [f"{norm}.{leaf}" for leaf in BATCH_NORM_LEAVES]
        return tuple(names)


@dataclass(frozen=True, kw_only=True)
class NormSpec:
    """A norm before an attention layer: ``kind`` is layer, rms, batch or group, ``weight`` None without a gain.

    ``roles`` are the projections (of q, k, v) whose input comes out of this norm. A learned query, or keys and values
    of a reduced grid, read another norm than the rest of the layer, or none.
    """

    kind: str
    roles: str = "qkv"
    weight: str | None = None
    gain_offset: float = 0.0
    """Added to the stored weight: 1 where the network multiplies by (1 + weight)."""
    variance: str | None = None
    """Running variance of a BatchNorm: gain = weight / sqrt(variance + eps)."""
    eps: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One attention module: its layout, the norms and LayerScale around it, and what its product leaves out.

    ``o`` is None where no matrix of the module maps a head's value to the output: there is then no OV circuit.
    ``kind`` says what the product q k^T acts on: ``token`` (a score between tokens), ``channel`` or ``linear``; the
    last two are read only on request (`opt_in_refusal`). ``label`` says in words what else a reader must know.
    """

    path: str
    module_class: str
    family: str
    q: Slot
    k: Slot
    v: Slot
    o: Slot | None
    scale: float
    norms: tuple[NormSpec, ...] = ()
    layer_scale: str | None = None
    leaves_out: tuple[str, ...] = ()
    kind: str = "token"
    label: str = ""

    def slots(self) -> dict[str, Slot]:
        """Return the slots by role, without o where there is none."""
        slots = {"q": self.q, "k": self.k, "v": self.v}
        return slots if self.o is None else {**slots, "o": self.o}

    def norm_of(self, role: str) -> NormSpec | None:
        """Return the norm whose output the projection of ``role`` (q, k or v) reads."""
        return next((norm for norm in self.norms if role in norm.roles), None)

    def has_fold(self, fold: str) -> bool:
        """Whether the layer's products are known under a fold: all but ``raw`` need the preceding norm."""
        return fold == "raw" or "norm_unknown" not in self.leaves_out

    def opt_in_refusal(self) -> Refusal | None:
        """Return why a channel or linear layer is not read unless requested, with the option; None for token layers."""
        if self.kind not in OPT_IN:
            return None
        title, reason = OPT_IN[self.kind]
        name = self.module_class.rpartition(".")[2]
        text = f"is {name} ({title}): {reason}. Pass --include-{self.kind} to see it anyway."
        return Refusal(self.path, self.module_class, self.family, text)

    def tensors(self) -> tuple[str, ...]:
        """Name every tensor that reading this layer needs, each once."""
        names: dict[str, None] = {}
        for slot in self.slots().values():
            names.update(dict.fromkeys(slot.tensors()))
        for norm in self.norms:
            names.update(dict.fromkeys(name for name in (norm.weight, norm.variance) if name))
        if self.layer_scale:
            names[self.layer_scale] = None
        return tuple(names)

    def replace(self, **changes: Any) -> AttentionSpec:
        """Return a copy with some fields exchanged."""
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> AttentionSpec:
        """Rebuild a spec from `to_json`."""
        data = dict(data)
        for role in "qkvo":
            data[role] = Slot(**data[role]) if data[role] else None
        data["norms"] = tuple(NormSpec(**norm) for norm in data["norms"])
        data["leaves_out"] = tuple(data["leaves_out"])
        return cls(**data)


@dataclass(frozen=True)
class Refusal:
    """An attention module that is not read, and why: ``path`` then ``reason`` make a sentence."""

    path: str
    module_class: str
    family: str
    reason: str


BATCH_NORM_LEAVES = ("weight", "bias", "running_mean", "running_var")

OPT_IN = {
    "channel": ("channel attention", "its product never acts between tokens"),
    "linear": ("linear attention", "there is no softmax over its product"),
}
"""Kinds that are read on request only: what the family is called and why its product is not a score."""
