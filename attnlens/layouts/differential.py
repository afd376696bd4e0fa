"""Family C8: differential attention. Score maps of query heads 2i and 2i + 1 are subtracted to weigh value head i."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.rules import Slots, rule
from attnlens.layouts.slots import blocks, columns, rows
from attnlens.layouts.spec import Slot


def _pairs(module: Any, name: str, start: int = 0) -> dict[str, Slot]:
    """Describe rows ``[q | k | v]`` of ``name``: 2 H heads of q and k, H heads of v twice as wide."""
    heads, width = int(module.num_heads), int(module.head_dim)
    q, k = blocks(module, name, 2 * heads, width, width, start=start)
    return {"q": q, "k": k, "v": rows(module, name, heads, 2 * width, offset=start + 4 * heads * width)}


@rule(
    "C8",
    "timm.layers.diff_attention.DiffAttention",
    leaves_out=("differential", "norm_before_proj"),
)
def differential(module: Any) -> Slots:
    """Describe `qkv` + `proj`."""
    return {**_pairs(module, "qkv"), "o": columns(module, "proj", int(module.num_heads), 2 * int(module.head_dim))}


@rule(
    "C8",
    "timm.models.vision_transformer.DiffParallelScalingBlock",
    leaves_out=("differential", "norm_before_proj", "parallel_mlp"),
)
def differential_parallel(module: Any) -> Slots:
    """Describe `in_proj` with rows ``[mlp | q | k | v]`` and the first columns of `out_proj`."""
    slots = _pairs(module, "in_proj", start=int(module.in_split[0]))
    return {**slots, "o": columns(module, "out_proj", int(module.num_heads), 2 * int(module.head_dim))}
