"""Family C3: one fused 1x1 convolution for q, k and v, with rows by role or by head."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.builders import blocks, by_head, columns, is_identity, out_features, rows
from attnlens.layouts.registry import Slots, rule


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

    The output projection is `o_proj`, or a 1x1 convolution before the upsampling. Where the transposed
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


@rule(
    "C4",
    "timm.layers.attention2d.MultiQueryAttention2d",
    flags={"has_query_strides": "q_pool", "kv_stride": "spatial_reduction"},
)
def multi_query(module: Any) -> Slots:
    """Describe `query`, `key`, `value`, `output`: every query head shares one key and one value head."""
    heads, width, value_width = int(module.num_heads), int(module.key_dim), int(module.value_dim)
    return {
        "q": rows(module, "query.proj", heads, width),
        "k": rows(module, "key.proj", 1, width),
        "v": rows(module, "value.proj", 1, value_width),
        "o": columns(module, "output.proj", heads, value_width),
    }


@rule(
    "C4",
    "timm.layers.halo_attn.HaloAttn",
    leaves_out=("rel_pos_bias",),
    flags={"block_stride": "q_pool", "pool": "out_pool"},
)
def halo(module: Any) -> Slots:
    """Describe `q` and `kv` with rows ``[head][k | v]`` of a layer that returns its heads' values: no W_O."""
    heads, width = int(module.num_heads), int(module.dim_head_qk)
    k, v = by_head(module, "kv", heads, width, int(module.dim_head_v))
    return {"q": rows(module, "q", heads, width), "k": k, "v": v}


def _with_local_values(module: Any, q: str) -> Slots:
    heads, width, value_width = int(module.num_heads), int(module.key_dim), int(module.d)
    return {
        "q": rows(module, q, heads, width),
        "k": rows(module, "k", heads, width),
        "v": rows(module, "v", heads, value_width),
        "o": columns(module, "proj", heads, value_width),
    }


@rule(
    "C4",
    "timm.models.efficientformer_v2.Attention2d",
    leaves_out=("local_values", "act_before_proj"),
    flags={"talking_head1": "talking_heads", "stride_conv": "conv_before_qkv", "upsample": "out_upsampled"},
)
def efficientformer(module: Any) -> Slots:
    """Describe `q`, `k`, `v`, `proj`, a BatchNorm behind each."""
    return _with_local_values(module, "q")


@rule(
    "C4",
    "timm.models.efficientformer_v2.Attention2dDownsample",
    leaves_out=("local_values", "act_before_proj", "q_pool"),
)
def efficientformer_downsample(module: Any) -> Slots:
    """Describe the same with queries on a halved grid."""
    return _with_local_values(module, "q.proj")


@rule("C4", "timm.models.iformer.SHMA", leaves_out=("gate", "act_on_v"))
def gated(module: Any) -> Slots:
    """Describe one head with `v_gate` rows ``[v | gate]``; a sigmoid stands on both before they are used."""
    width, value_width = out_features(module, "q"), out_features(module, "v_gate") // 2
    return {
        "q": rows(module, "q", 1, width),
        "k": rows(module, "k", 1, width),
        "v": rows(module, "v_gate", 1, value_width),
        "o": columns(module, "proj", 1, value_width),
    }
