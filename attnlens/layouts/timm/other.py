"""Family C2: a block that runs attention beside its MLP from one `in_proj` with rows ``[mlp | q | k | v]``."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.builders import blocks, columns, rows
from attnlens.layouts.registry import Slots, has, rule
from attnlens.layouts.spec import Slot


@rule("C2", "timm.models.vision_transformer.ParallelScalingBlock", leaves_out=("parallel_mlp",))
def parallel_block(module: Any) -> Slots:
    """Describe `in_proj` behind its MLP rows, and `attn_out_proj` or the first columns of a shared `out_proj`."""
    heads, width = int(module.num_heads), int(module.head_dim)
    q, k, v = blocks(module, "in_proj", heads, width, width, width, start=int(module.in_split[0]))
    o = "attn_out_proj" if has(module, "attn_out_proj") else "out_proj"
    return {"q": q, "k": k, "v": v, "o": columns(module, o, heads, width)}


@rule(
    "C9",
    "timm.models.efficientvit_msra.CascadedGroupAttention",
    leaves_out=("channel_slice", "cascaded", "conv_on_q", "act_before_proj"),
)
def cascaded(module: Any) -> Slots:
    """Describe one `qkvs` convolution per head with rows ``[q | k | v]``; W_Q reads ``embed_dim / H`` channels."""
    heads, width, value_width = int(module.num_heads), int(module.key_dim), int(module.val_dim)
    return {
        "q": rows(module, "qkvs.{head}", heads, width),
        "k": rows(module, "qkvs.{head}", heads, width, offset=width),
        "v": rows(module, "qkvs.{head}", heads, value_width, offset=2 * width),
        "o": columns(module, "proj.1", heads, value_width),
    }


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


@rule(
    "MHA",
    "torch.nn.modules.activation.MultiheadAttention",
    sdpa_scale=True,
    flags={"bias_k": "extra_key", "add_zero_attn": "extra_key"},
)
def multihead(module: Any) -> Slots:
    """Describe both forms: one packed weight, or `q_proj_weight` and its like where k or v has another width."""
    heads, width = int(module.num_heads), int(module.head_dim)
    packed = module.in_proj_weight is not None
    slots = {}
    for position, role in enumerate("qkv"):
        offset = position * heads * width
        slots[role] = Slot(
            tensor="in_proj_weight" if packed else f"{role}_proj_weight",
            heads=heads,
            width=width,
            head_stride=width,
            offset=offset if packed else 0,
            bias="in_proj_bias" if module.in_proj_bias is not None else None,
            bias_offset=offset,
        )
    return {**slots, "o": columns(module, "out_proj", heads, width)}
