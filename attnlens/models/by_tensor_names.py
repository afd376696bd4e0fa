"""Layers told by tensor names and shapes alone: a state dict nobody named the architecture of, and a head count.

Names say what is q, k, v and output, shapes say how many key/value heads share a head's width, and which tensors are
depthwise filters. Attention read so carries the label ``layout guessed``: rotary positions and masks are not in a file,
and the order of packed rows is what `row_order` finds the weights to bear out.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from attnlens.checkpoints import Checkpoint
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.layouts.depthwise.by_shape import filters_by_shape
from attnlens.layouts.flags import ATTRIBUTE_FLAGS
from attnlens.layouts.spec import AttentionSpec, NormSpec, Refusal, Slot
from attnlens.models.architecture import Architecture
from attnlens.models.row_order import STANDARD, Packed, ReorderedRows, check, judge, standard_rows
from attnlens.words import counted

LABEL = "layout guessed from tensor names: rotary positions and masks are not known"

# Names below one attention module: q, k, v, then the output projections that may go with them.
_PACKED = (
    ("qkv.weight", ("proj.weight", "out_proj.weight")),
    ("in_proj_weight", ("out_proj.weight",)),
    ("to_qkv.weight", ("to_out.0.weight", "to_out.weight")),
    ("Wqkv.weight", ("out_proj.weight", "Wo.weight")),
    ("qkv_proj.weight", ("o_proj.weight", "out_proj.weight")),
    ("c_attn.weight", ("c_proj.weight",)),
    ("query_key_value.weight", ("dense.weight", "out_proj.weight", "proj.weight")),
)
_SEPARATE = (
    (("q_proj.weight", "k_proj.weight", "v_proj.weight"), ("o_proj.weight", "out_proj.weight", "proj.weight")),
    (("q_proj_weight", "k_proj_weight", "v_proj_weight"), ("out_proj.weight",)),
    (("attention.query.weight", "attention.key.weight", "attention.value.weight"), ("output.dense.weight",)),
    (("self.query.weight", "self.key.weight", "self.value.weight"), ("output.dense.weight",)),
    (("q_lin.weight", "k_lin.weight", "v_lin.weight"), ("out_lin.weight",)),
    (("q.weight", "k.weight", "v.weight"), ("o.weight", "proj.weight")),
    (("query.weight", "key.weight", "value.weight"), ("out.weight", "proj.weight", "out_proj.weight")),
    (("to_q.weight", "to_k.weight", "to_v.weight"), ("to_out.0.weight", "to_out.weight")),
    (("to_q.weight", "to_kv.weight", "to_kv.weight"), ("to_out.0.weight", "to_out.weight")),
    (("to_qk.weight", "to_qk.weight", "to_v.weight"), ("to_out.0.weight", "to_out.weight")),
    (("q.weight", "kv.weight", "kv.weight"), ("proj.weight",)),
    (("wq.weight", "wk.weight", "wv.weight"), ("wo.weight", "proj.weight")),
)
_PATTERNS = (*(((packed,) * 3, outputs) for packed, outputs in _PACKED), *_SEPARATE)

_LOOKS_LIKE = re.compile(
    r"^(?P<path>.*?)\.?(?P<leaf>(?:[qkv]|qkv|kv|qk|w[qkvo]|Wqkv|Wo|to_(?:q|k|v|qkv|kv|qk|out(?:\.0)?)|"
    r"(?:q|k|v|o|qkv|kv|out)_proj|query|key|value|query_key_value|[qkv]_lin|out_lin|c_attn)\.weight|in_proj_weight)$"
)
"""Names that projections of attention have, in whatever set."""
_SHARD = re.compile(r"-(\d{3,})-of-(\d{3,})\.[^/]*$")

# Names that only ever stood for a norm in front of attention, and for the LayerScale behind it.
_NORMS = ("norm1", "norm_1", "ln_1", "ln1", "layernorm_before", "layer_norm1", "input_layernorm", "attention_norm")
_SCALES = ("ls1.gamma", "ls_1.gamma", "gamma_1", "layer_scale1.lambda1", "lambda_1")
# What says, inside an attention module or beside it, that a norm of such a name may stand behind the layer.
_POST_NORM_SIGNS = ("logit_scale", "cpb_mlp", "meta_mlp")
_TORCH_LAYER = ("linear1.weight", "linear2.weight")
_EQUAL_HEADS = ("qkv.weight", "to_qkv.weight")
"""Packed projections of vision's names, where keys of their own width are commoner than heads that share keys."""
_DEEPEST = 64
"""Dots of a name that are looked at."""


@dataclass(frozen=True)
class Group:
    """The four tensors of one attention module."""

    path: str
    q: str
    k: str
    v: str
    o: str

    @property
    def head(self) -> str:
        """What stands in front of the names of the module's own tensors."""
        return f"{self.path}." if self.path else ""

    @property
    def parent(self) -> str:
        """Path of the block the module stands in."""
        return self.path.rpartition(".")[0]

    def beside(self, names: tuple[str, ...]) -> list[str]:
        """Return names of the same block in full."""
        return [f"{self.parent}.{name}" if self.parent else name for name in names]

    @property
    def is_packed(self) -> bool:
        """Whether q, k and v are one tensor."""
        return self.q == self.k == self.v


def find_groups(stored: Checkpoint) -> list[Group]:
    """Find every set of tensors named like one attention module's, in the natural order of their paths."""
    found: dict[str, Group] = {}
    for (q, k, v), outputs in _PATTERNS:
        for name in stored:
            if "{" in name or (name != q and not name.endswith(f".{q}")):  # a layout's sign for a head's number
                continue
            head = name.removesuffix(q)
            output = next((head + o for o in outputs if head + o in stored), None)
            if output and head + k in stored and head + v in stored:
                found.setdefault(head, Group(head.removesuffix("."), name, head + k, head + v, output))
    return sorted(found.values(), key=lambda group: _natural(group.path))


def _natural(path: str) -> list[tuple[int, str]]:
    """Order numbers in a path by value: by their length without leading zeros, then as text."""
    digits = [(part.lstrip("0"), part[:1] in "0123456789") for part in re.split(r"([0-9]+)", path) if part]
    return [(len(part), part) if number else (-1, part) for part, number in digits]


def describe_names(
    stored: Checkpoint, num_heads: int, where: str, order: str | None = None, said_by: str = "as asked"
) -> Architecture:
    """Describe a file by its tensors' names, every layer with ``num_heads`` heads, and its depthwise filters.

    The number of key/value heads follows from the shapes. ``order`` is that of the packed rows of ``stored`` before
    they were read as [role, head, dim], where it is known, and ``said_by`` tells from what; else the weights are asked,
    see `row_order`. Projections that belong to no layer that is read are listed as refused. Raises
    `UnsupportedAttentionError` when no names are known, `UsageError` when the layers differ in width, ``num_heads``
    does not divide it, or the weights contradict the order of rows.
    """
    groups = find_groups(stored)
    refused = _left_out(groups, stored)
    if not groups:
        first = ", ".join(sorted(stored)[:3])
        looks = f"; {refused[0].path} {refused[0].reason}" if refused else ""
        raise UnsupportedAttentionError(
            f"no tensors of {where} are named like q, k, v and an output projection (it holds {first}, ...{looks}): "
            "name the architecture as MODEL"
        )
    widths = {group.path: _shape(stored, group.o)[0 if _is_in_out(group, stored) else 1] for group in groups}
    if len(set(widths.values())) > 1:
        each = ", ".join(str(width) for width in sorted(set(widths.values())))
        stacks = ", ".join(dict.fromkeys(re.split(r"[0-9]", path)[0].rstrip(".") or path for path in widths))
        raise UsageError(
            f"the attention layers of {where} have widths {each}: one --num-heads cannot be true of all, "
            f"choose one of {stacks} with --weights, or name the architecture as MODEL"
        )
    crowd = Counter(group.parent for group in groups)
    inside = _below(groups, stored)
    found = tuple(
        _spec(group, stored, num_heads, alone=crowd[group.parent] == 1, inside=inside[group.head]) for group in groups
    )
    words = _words_of_order(groups, stored, num_heads, where, order and f"{order}, {said_by}")
    part = _words_of_part(groups, stored, where)
    specs = tuple(
        spec.replace(
            label="; ".join(
                [LABEL, *([words] if words and spec.q.tensor == spec.k.tensor == spec.v.tensor else []), *part]
            )
        )
        for spec in found
    )
    return _guessed(stored, specs, refused)


def packed_layers(stored: Checkpoint, groups: list[Group]) -> list[Packed]:
    """Return the layers whose q, k and v are one tensor of three equal parts, of which an order can be told."""
    found = []
    for group in groups:
        turned = _is_in_out(group, stored)
        if group.is_packed and _shape(stored, group.q)[turned] == 3 * _shape(stored, group.o)[not turned]:
            found.append(Packed(group.q, group.o, turned))
    return found


def in_order(stored: Checkpoint, num_heads: int, order: str) -> Checkpoint:
    """Return the checkpoint with packed rows of another order put into [role, head, dim]. Raises `UsageError`."""
    layers = packed_layers(stored, find_groups(stored))
    if not layers:
        raise UsageError(f"--row-order {order}: the file has no packed q, k and v of equal width")
    rows: dict[str, tuple[Any, int]] = {}
    for layer in layers:
        places = standard_rows(order, num_heads, _shape(stored, layer.qkv)[layer.transposed])
        bias = layer.qkv.removesuffix("weight") + "bias"
        rows |= {layer.qkv: (places, int(layer.transposed)), bias: (places, 0)}
    return ReorderedRows(stored, rows, order)


def _words_of_order(groups: list[Group], stored: Checkpoint, heads: int, where: str, order: str | None) -> str:
    """Say what the weights say of the order of packed rows. Raises `UsageError` where they contradict it."""
    layers = packed_layers(stored, groups)
    if not layers:
        return ""
    verdict = judge(stored, layers, heads, STANDARD)
    if order is None:
        check(verdict, _shape(stored, layers[0].o)[not layers[0].transposed], where)
        return verdict.words
    return f"rows ordered {order} (correlation {verdict.correlation:.2f} of row norms of V with those of O)"


def _words_of_part(groups: list[Group], stored: Checkpoint, where: str) -> list[str]:
    """Say that a file is one shard of several, or begins behind the first layer: what is read is no whole network."""
    shard = _SHARD.search(where)
    if shard and int(shard[2]) > 1:
        return [f"shard {int(shard[1])} of {int(shard[2])}: the layers of the others are missing, give the index"]
    numbers: dict[str, set[int]] = {}
    for name in stored:
        stack = re.match(r"((?:[^.0-9]+\.)*?)([0-9]{1,6})\.", name)
        if stack:
            numbers.setdefault(stack[1], set()).add(int(stack[2]))
    stacks = {stack[1] for group in groups if (stack := re.match(r"((?:[^.0-9]+\.)*?)[0-9]{1,6}(\.|$)", group.path))}
    gaps = [(stack, min(numbers.get(stack, {0}))) for stack in sorted(stacks)]
    return [f"{stack}0 to {stack}{first - 1} are not in this file" for stack, first in gaps if first]


def _left_out(groups: list[Group], stored: Checkpoint) -> tuple[Refusal, ...]:
    """List what is named like a projection of attention and belongs to no layer that is read."""
    used = {name for group in groups for name in (group.q, group.k, group.v, group.o)}
    found: dict[str, list[str]] = {}
    for name in stored:
        if name not in used and (looks := _LOOKS_LIKE.match(name)) and len(stored.shape(name)) >= 2:
            found.setdefault(looks["path"], []).append(looks["leaf"].removesuffix(".weight"))
    return tuple(
        Refusal(path, "tensor names", "unknown", f"holds {', '.join(leaves)}, of which no layout is known: left out")
        for path, leaves in sorted(found.items(), key=lambda item: _natural(item[0]))
    )


def describe_filters(stored: Checkpoint) -> Architecture | None:
    """Describe a file that holds depthwise filters and no attention that names tell of; None for any other."""
    if find_groups(stored):
        return None
    found = _guessed(stored, (), ())
    return found if found.filters else None


def _guessed(stored: Checkpoint, specs: tuple[AttentionSpec, ...], refused: tuple[Refusal, ...]) -> Architecture:
    filters = filters_by_shape(stored, sorted(stored, key=_natural))
    tensors = [name for layers in (specs, filters) for layer in layers for name in layer.tensors()]
    shapes = {name: list(stored.shape(name)) for name in tensors}
    paths = (*(spec.path for spec in specs), *(refusal.path for refusal in refused))
    return Architecture("guessed", specs, refused, paths, shapes, {}, filters)


def _shape(stored: Checkpoint, name: str) -> tuple[int, int]:
    """Return a weight's shape as a matrix: 1x1 kernels are dropped."""
    shape = stored.shape(name)
    if len(shape) < 2 or any(size != 1 for size in shape[2:]):
        raise UnsupportedAttentionError(f"{name} has shape {shape}; a matrix is needed: name the architecture as MODEL")
    return shape[0], shape[1]


def _is_in_out(group: Group, stored: Checkpoint) -> bool:
    """Whether a packed projection is stored ``[in, out]``, as GPT-2's: three times as wide as high."""
    rows, columns = _shape(stored, group.q)
    return group.is_packed and group.q.endswith("c_attn.weight") and columns == 3 * rows


def _below(groups: list[Group], stored: Checkpoint) -> dict[str, set[str]]:
    """Return the first parts of the names below each group's head; one pass over the names serves all groups."""
    found: dict[str, set[str]] = {group.head: set() for group in groups}
    for name in stored:
        parts = name.split(".", _DEEPEST)
        for end in range(min(len(parts), _DEEPEST)):
            head = ".".join([*parts[:end], ""])
            if head in found:
                found[head].add(parts[end])
    return found


def _spec(group: Group, stored: Checkpoint, heads: int, alone: bool, inside: set[str]) -> AttentionSpec:
    """Describe one group; a norm beside it is its own only where it stands ``alone`` in its block."""
    slots = _slots(group, stored, heads)
    norm = _norm(group, stored, inside) if alone else None
    flags = [flag for name, flag in {**ATTRIBUTE_FLAGS, "norm": "norm_before_proj"}.items() if flag and name in inside]
    if slots["q"].bias or slots["k"].bias:
        flags.append("qk_bias")
    if norm is None:
        flags.append("norm_unknown")
    if "cross" in group.path or "encoder_attn" in group.path:
        flags.append("cross")
    return AttentionSpec(
        path=group.path,
        module_class="tensor names",
        family="guessed",
        q=slots["q"],
        k=slots["k"],
        v=slots["v"],
        o=slots["o"],
        scale=slots["q"].width ** -0.5,
        norms=() if norm is None else (norm,),
        layer_scale=_only(group.beside(_SCALES), stored) if alone else None,
        leaves_out=tuple(dict.fromkeys(flags)),
        kind="channel" if _acts_on_channels(group, stored, heads) else "token",
    )


def _acts_on_channels(group: Group, stored: Checkpoint, heads: int) -> bool:
    """Whether a module has a temperature for each head, as XCiT and its kin, whose product acts on channels."""
    name = f"{group.head}temperature"
    return name in stored and stored.shape(name)[:1] == (heads,)


def _slots(group: Group, stored: Checkpoint, heads: int) -> dict[str, Slot]:
    """Describe the four roles; key/value heads are as many as rows of a head's width allow."""
    in_out = _is_in_out(group, stored)
    rows = [_shape(stored, name)[in_out] for name in (group.q, group.k, group.v)]
    inner = _shape(stored, group.o)[not in_out]
    if group.is_packed and rows[0] != 3 * inner and group.q.removeprefix(group.head) in _EQUAL_HEADS:
        raise UnsupportedAttentionError(
            f"{group.path or 'the attention'} has {rows[0]} packed rows and an output projection of {inner} columns: "
            "keys of another width than values, or heads that share keys, which names do not tell apart. Name the "
            "architecture as MODEL"
        )
    if group.is_packed:
        rest = rows[0] - inner
        rows = [inner, rest // 2, rest - rest // 2]
    elif group.k == group.v:
        rows = [rows[0], rows[1] // 2, rows[2] - rows[2] // 2]
    width, odd = divmod(rows[0], heads)
    kv_heads = rows[1] // width if width else 0
    value_width = rows[2] // kv_heads if kv_heads > 0 else 0
    if odd or value_width < 1 or kv_heads * width != rows[1] or heads % kv_heads or heads * value_width != inner:
        raise UsageError(
            f"{group.path or 'the attention'} cannot have {counted(heads, 'head')}: it has {rows[0]} rows for q, "
            f"{rows[1]} for k, {rows[2]} for v, and an output projection of {inner} columns"
        )
    found = {}
    sizes = zip("qkv", (heads, kv_heads, kv_heads), (width, width, value_width), strict=True)
    for position, (role, count, size) in enumerate(sizes):
        start = sum(rows[:position]) if group.is_packed else rows[1] if role == "v" and group.k == group.v else 0
        bias = _bias(group, role, stored)
        three = bias is not None and bias.endswith("in_proj_bias")
        shares_bias = bias is not None and (group.is_packed or group.k == group.v or three)
        found[role] = Slot(
            tensor=getattr(group, role),
            heads=count,
            width=size,
            head_stride=size,
            offset=start,
            axis=int(in_out),
            bias=bias,
            bias_offset=(sum(rows[:position]) if three else start)
            if shares_bias and bias != f"{group.head}{role}_bias"
            else 0,
        )
    bias = _only([group.o.removesuffix("weight") + "bias"], stored)
    found["o"] = Slot(
        tensor=group.o, heads=heads, width=value_width, head_stride=value_width, axis=int(not in_out), bias=bias
    )
    return found


def _bias(group: Group, role: str, stored: Checkpoint) -> str | None:
    """Name a role's bias: beside its weight, or a vector of its own in the module (``q_bias``)."""
    names = (
        getattr(group, role).removesuffix("weight") + "bias",
        f"{group.head}{role}_bias",
        f"{group.head}in_proj_bias",
    )
    return next((name for name in names if name in stored), None)


def _norm(group: Group, stored: Checkpoint, inside: set[str]) -> NormSpec | None:
    """Find the LayerNorm in front by its name; None where no name, more than one, or a post-norm layer is possible.

    A norm without a bias is not guessed: RMSNorms multiply by their weight or by 1 + weight, and names do not tell.
    """
    by_flag = all(
        name in stored for name in group.beside(_TORCH_LAYER)
    )  # torch's own layer: pre or post by an argument
    if by_flag or any(name.startswith(_POST_NORM_SIGNS) for name in inside):
        return None
    weight = _only([f"{name}.weight" for name in group.beside(_NORMS)], stored)
    if weight is None or weight.removesuffix("weight") + "bias" not in stored:
        return None
    return NormSpec(kind="layer", weight=weight)


def _only(names: list[str], stored: Checkpoint) -> str | None:
    """Return the one of ``names`` that is stored; None for none or several."""
    found = [name for name in names if name in stored]
    return found[0] if len(found) == 1 else None
