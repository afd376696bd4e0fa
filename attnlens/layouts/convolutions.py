"""Family C4: 1x1 convolutions of their own for q, k and v, multi-query ones among them."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.rules import Slots, rule
from attnlens.layouts.slots import by_head, columns, out_features, rows


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
