"""Building blocks of layouts: slots of packed rows and of output columns, with the bias and BatchNorm beside them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attnlens.errors import UnsupportedAttentionError
from attnlens.layouts.spec import Slot


def rows(
    module: Any,
    name: str,
    heads: int,
    width: int,
    *,
    offset: int = 0,
    head_stride: int | None = None,
    own_bias: str | None = None,
) -> Slot:
    """Describe rows ``[head][unit]`` of the projection ``name``, from row ``offset`` on.

    ``name`` is a Linear, a 1x1 convolution, or a module that holds one with a BatchNorm behind it; with ``{head}`` in
    it each head has a projection of its own. ``own_bias`` names a bias kept apart from the projection, one per unit.
    """
    leaf, norm = _parts(module, name)
    bias, bias_offset = (own_bias, 0) if own_bias else (None, 0)
    if module.get_submodule(leaf.format(head=0)).bias is not None:
        bias, bias_offset = f"{leaf}.bias", offset
    stride = width if head_stride is None else head_stride
    return Slot(
        tensor=f"{leaf}.weight",
        heads=heads,
        width=width,
        head_stride=0 if "{head}" in name else stride,
        offset=offset,
        bias=bias,
        bias_offset=bias_offset,
        batch_norm=norm,
        batch_norm_offset=offset,
        batch_norm_eps=_eps(module, norm),
    )


def blocks(module: Any, name: str, heads: int, *widths: int, start: int = 0) -> list[Slot]:
    """Describe rows ``[role][head][unit]``: one block of all heads after another, the first at row ``start``."""
    slots = []
    for width in widths:
        slots.append(rows(module, name, heads, width, offset=start))
        start += heads * width
    return slots


def by_head(module: Any, name: str, heads: int, *widths: int) -> list[Slot]:
    """Describe rows ``[head][role][unit]``: the roles of one head side by side."""
    stride = sum(widths)
    starts = [sum(widths[:position]) for position in range(len(widths))]
    return [
        rows(module, name, heads, width, offset=start, head_stride=stride)
        for start, width in zip(starts, widths, strict=True)
    ]


def columns(module: Any, name: str, heads: int, width: int, *, interleaved: bool = False) -> Slot:
    """Describe an output projection: columns ``[head][unit]``, or ``[unit][head]`` where heads are interleaved."""
    leaf, norm = _parts(module, name)
    return Slot(
        tensor=f"{leaf}.weight",
        heads=heads,
        width=width,
        axis=1,
        head_stride=1 if interleaved else width,
        unit_stride=heads if interleaved else 1,
        bias=f"{leaf}.bias" if module.get_submodule(leaf).bias is not None else None,
        batch_norm=norm,
        batch_norm_eps=_eps(module, norm),
    )


def behind(slot: Slot, module: Any, norm: str) -> Slot:
    """Add to a slot the BatchNorm ``norm`` of its own rows, which stands apart from the projection."""
    return replace(slot, batch_norm=norm, batch_norm_offset=0, batch_norm_eps=_eps(module, norm))


def out_features(module: Any, name: str) -> int:
    """Return how many rows the projection ``name`` has."""
    leaf, _ = _parts(module, name)
    return int(module.get_submodule(leaf).weight.shape[0])


def is_identity(module: Any) -> bool:
    """Whether a submodule stands for nothing."""
    return type(module).__name__ == "Identity"


def _parts(module: Any, name: str) -> tuple[str, str | None]:
    """Name the projection at ``name`` and the BatchNorm behind it, looking inside a wrapper of the two."""
    wrapper = module.get_submodule(name.format(head=0))
    if getattr(wrapper, "weight", None) is not None:
        return name, None
    leaf, norm = None, None
    for child, part in wrapper.named_children():
        weight = getattr(part, "weight", None)
        if leaf is None:
            leaf = child if weight is not None and weight.ndim > 1 else None
        elif getattr(part, "running_var", None) is not None:
            norm = f"{name}.{child}"
        elif weight is not None:
            raise UnsupportedAttentionError(f"has a {type(part).__name__} behind {name}: only BatchNorm can be folded")
    if leaf is None:
        raise UnsupportedAttentionError(f"has no projection in {name}, a {type(wrapper).__name__}")
    return f"{name}.{leaf}", norm


def _eps(module: Any, norm: str | None) -> float:
    return 1e-5 if norm is None else float(module.get_submodule(norm.format(head=0)).eps)
