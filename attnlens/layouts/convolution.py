"""Family C3: one fused 1x1 convolution for q, k and v, with rows by role or by head."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.rules import Slots, rule
from attnlens.layouts.slots import blocks, by_head, columns, is_identity, out_features


@rule("C3", "timm.models.maxxvit.Attention2d")
@rule("C3", "timm.layers.attention2d.Attention2d", sdpa_scale=True)
def either_order(module: Any) -> Slots:
    """Describe rows ``[head][q | k | v]`` where ``head_first`` is set, ``[q | k | v][head]`` where not."""
    heads = int(module.num_heads)
    width = out_features(module, "qkv") // (3 * heads)
    q, k, v = (by_head if module.head_first else blocks)(module, "qkv", heads, width, width, width)
    return {"q": q, "k": k, "v": v, "o": columns(module, "proj", heads, width)}


@rule("C3", "timm.models.visformer.Attention")
def visformer(module: Any) -> Slots:
    """Describe rows ``[q | k | v][head][unit]``."""
    heads, width = int(module.num_heads), int(module.head_dim)
    q, k, v = blocks(module, "qkv", heads, width, width, width)
    return {"q": q, "k": k, "v": v, "o": columns(module, "proj", heads, width)}


@rule("C3", "timm.layers.bottleneck_attn.BottleneckAttn", leaves_out=("rel_pos_bias",), flags={"pool": "out_pool"})
def bottleneck(module: Any) -> Slots:
    """Describe rows ``[q | k | v][head][unit]`` of a layer that returns its heads' values side by side: no W_O."""
    heads, width = int(module.num_heads), int(module.dim_head_qk)
    q, k, v = blocks(module, "qkv", heads, width, width, int(module.dim_head_v))
    return {"q": q, "k": k, "v": v}


@rule(
    "C3",
    "timm.models.cpubone.ConvAttention",
    "timm.models.lowformer.ConvAttention",
    leaves_out=("conv_before_qkv",),
    flags={"upsampling": "out_upsampled"},
)
def strided(module: Any) -> Slots:
    """Describe `pwise` with rows ``[head][q | k | v]`` on a grid that a strided convolution made.

    The output projection is `o_proj`, or a 1x1 convolution in front of the upsampling. Where the transposed
    convolution that upsamples also projects, every output pixel has a matrix of its own and there is no W_O.
    """
    heads, width = int(module.num_heads), int(module.head_dim)
    q, k, v = by_head(module, "pwise", heads, width, width, width)
    slots = {"q": q, "k": k, "v": v}
    if not is_identity(module.o_proj):
        return {**slots, "o": columns(module, "o_proj", heads, width)}
    if not hasattr(module.upsampling, "weight"):
        return {**slots, "o": columns(module, "upsampling.0", heads, width)}
    return slots


@rule("C3", "timm.models.shvit.SHSA", leaves_out=("passthrough", "act_before_proj"))
def single_head(module: Any) -> Slots:
    """Describe one head on the first ``pdim`` channels; the others pass by and meet it in the output projection."""
    width, value_width = int(module.qk_dim), int(module.pdim)
    q, k, v = by_head(module, "qkv", 1, width, width, value_width)
    return {"q": q, "k": k, "v": v, "o": columns(module, "proj.1", 1, value_width)}
