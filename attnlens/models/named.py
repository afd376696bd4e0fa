"""Networks that their tensors' names tell beyond doubt: nanoGPT, lucidrains' vit-pytorch, TransformerLens.

Their code says what a file does not: the order of packed rows, which norm stands in front, what the mask is. The head
count is asked for, except of TransformerLens, which stores a matrix for each head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from attnlens.checkpoints import Checkpoint
from attnlens.errors import UsageError
from attnlens.layouts.spec import AttentionSpec, NormSpec, Slot
from attnlens.models.architecture import Architecture
from attnlens.models.transformers.describe import Placed, Sizes, find_prefix
from attnlens.models.transformers.stack import Family, Stack
from attnlens.words import counted

_GPT = "h.{layer}."
_NANOGPT = Stack(
    path=_GPT + "attn",
    q=_GPT + "attn.c_attn.weight",
    k=_GPT + "attn.c_attn.weight",
    v=_GPT + "attn.c_attn.weight",
    o=_GPT + "attn.c_proj.weight",
    norm=_GPT + "ln_1.weight",
    flags=("causal",),
)


def _lucidrains(module: str, out: str) -> Stack:
    path = "layers.{layer}.0" + module
    packed = f"{path}.to_qkv.weight"
    return Stack(path=path, q=packed, k=packed, v=packed, o=f"{path}.{out}.weight", norm="layers.{layer}.0.norm.weight")


FAMILIES = (
    Family(name="nanogpt", model_types=(), stacks=(_NANOGPT,)),
    Family(
        name="vit-pytorch",
        model_types=(),
        stacks=tuple(_lucidrains(module, out) for module in ("", ".fn") for out in ("to_out.0", "to_out")),
    ),
)


def describe_named(stored: Checkpoint, num_heads: int) -> Architecture | None:
    """Describe a file of a network whose names say which code runs it; None for any other.

    Raises `UsageError` where ``num_heads`` does not divide its width.
    """
    for family in FAMILIES:
        for stack in family.stacks:
            prefix = find_prefix(stack, stored)
            if prefix is not None and _is_of(stack, prefix, stored):
                return _described(family, stack, prefix, stored, num_heads)
    return None


def _is_of(stack: Stack, prefix: str, stored: Checkpoint) -> bool:
    """Whether the first layer is whole and its packed projection is stored ``[out, in]``, three times as high as o."""
    names = [prefix + name.format(layer=0) for name in (stack.q, stack.o, stack.norm)]
    if not all(name in stored for name in names):
        return False
    packed, out, norm = (stored.shape(name) for name in names)
    return len(packed) == len(out) == 2 and norm == packed[1:] and packed[0] == 3 * out[1] and out[0] == packed[1]


def _described(family: Family, stack: Stack, prefix: str, stored: Checkpoint, num_heads: int) -> Architecture:
    rows, width = stored.shape(prefix + stack.q.format(layer=0))
    depth = 0
    while prefix + stack.q.format(layer=depth) in stored:
        depth += 1
    if num_heads < 1 or rows // 3 % num_heads:
        raise UsageError(
            f"the {family.name} layers cannot have {counted(num_heads, 'head')}: q, k and v are {rows // 3} wide each"
        )
    sizes = Sizes({}, depth, width, num_heads, num_heads, rows // 3 // num_heads, 0)
    placed = Placed(stack, prefix, sizes, stored)
    specs = tuple(placed.spec(layer, family.name, family.name) for layer in range(depth))
    shapes: dict[str, list[int]] = {}
    for layer in range(depth):
        shapes |= placed.shapes(layer)
    return Architecture(family.name, specs, (), tuple(spec.path for spec in specs), shapes, {})


_LENS = re.compile(r"(.*?)blocks\.(\d+)\.attn\.W_Q$")
LENS_LABEL = "TransformerLens: the scale of scores, rotary positions and masks are not in a file"


def lens_layers(stored: Checkpoint) -> list[str]:
    """Return the paths of TransformerLens' attention layers, in order: those with ``W_Q`` ``[head, in, unit]``."""
    found = {int(m[2]): name.removesuffix(".W_Q") for name in stored if (m := _LENS.match(name))}
    return [found[layer] for layer in sorted(found) if len(stored.shape(f"{found[layer]}.W_Q")) == 3]


def describe_lens(stored: Checkpoint, paths: Iterable[str]) -> Architecture:
    """Describe TransformerLens' layers; heads are named ``W_Q[0]``, ``W_Q[1]``, ... as `heads_of` splits them."""
    specs = tuple(_lens_spec(path, stored) for path in paths)
    shapes = {name: list(_lens_shape(name, stored)) for spec in specs for name in spec.tensors()}
    return Architecture("TransformerLens", specs, (), tuple(spec.path for spec in specs), shapes, {})


def _lens_spec(path: str, stored: Checkpoint) -> AttentionSpec:
    names = {role: f"{path}.W_{role.upper()}" for role in "qkvo"}
    for role in "kv":
        if names[role] not in stored:  # grouped heads: one matrix for several query heads
            names[role] = f"{path}._W_{role.upper()}"
    slots = {role: _lens_slot(role, name, stored) for role, name in names.items()}
    block = path.removesuffix(".attn")
    gain = f"{block}.ln1.w"
    kind = "layer" if f"{block}.ln1.b" in stored else "rms"
    biased = any(slots[role].bias for role in "qk")
    return AttentionSpec(
        path=path,
        module_class="TransformerLens",
        family="TransformerLens",
        q=slots["q"],
        k=slots["k"],
        v=slots["v"],
        o=slots["o"],
        scale=slots["q"].width ** -0.5,
        norms=(NormSpec(kind=kind, weight=gain),) if gain in stored else (),
        leaves_out=("qk_bias",) if biased else (),
        label=LENS_LABEL,
    )


def _lens_slot(role: str, name: str, stored: Checkpoint) -> Slot:
    heads, rows, columns = stored.shape(name)
    bias = name.replace("W_", "b_")
    return Slot(
        tensor=f"{name}[{{head}}]",
        heads=heads,
        width=rows if role == "o" else columns,
        head_stride=0,
        axis=int(role != "o"),
        bias=None if bias not in stored else bias if role == "o" else f"{bias}[{{head}}]",
    )


def _lens_shape(name: str, stored: Checkpoint) -> tuple[int, ...]:
    whole, _, head = name.partition("[")
    return stored.shape(whole)[1:] if head else stored.shape(whole)


class HeadsOf(Checkpoint):
    """A checkpoint whose tensors can be asked for by head too: ``name[3]`` is ``name`` at index 3 of its first axis."""

    def __init__(self, origin: Checkpoint) -> None:
        self._origin, self.behind = origin, (origin,)
        self.metadata = origin.metadata

    def provenance(self) -> dict[str, Any]:
        """Return the origin's provenance."""
        return self._origin.provenance()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor or of one head's part of it."""
        return _lens_shape(name, self._origin)

    def expect(self, names: Iterable[str]) -> None:
        """Tell the origin which of its tensors will be asked for."""
        self._origin.expect({name.partition("[")[0] for name in names})

    def __getitem__(self, name: str) -> Any:
        """Return a tensor or one head's part of it."""
        whole, _, head = name.partition("[")
        stored = self._origin[whole]
        return stored[int(head.rstrip("]"))] if head else stored

    def __contains__(self, name: object) -> bool:
        """Whether the tensor is there; nothing is read."""
        return isinstance(name, str) and name.partition("[")[0] in self._origin

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of whole tensors."""
        return iter(self._origin)

    def __len__(self) -> int:
        """Return the number of whole tensors."""
        return len(self._origin)
