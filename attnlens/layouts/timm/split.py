"""Family B: q, k and v in projections of their own (B1, B2), or in pairs `q` + `kv` (B3) and `qk` + `v` (B4)."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.builders import blocks, columns, out_features, rows
from attnlens.layouts.registry import Slots, has, rule


def separate(module: Any, q: str, k: str, v: str, o: str) -> Slots:
    """Describe four projections given by name; ``num_kv_heads`` says where keys and values have fewer heads."""
    heads = int(module.num_heads)
    kv_heads = int(getattr(module, "num_kv_heads", None) or heads)
    key_width = out_features(module, k) // kv_heads
    value_width = out_features(module, v) // kv_heads
    biases = {role: f"{role}_bias" if has(module, f"{role}_bias") else None for role in "qv"}
    return {
        "q": rows(module, q, heads, key_width, own_bias=biases["q"]),
        "k": rows(module, k, kv_heads, key_width),
        "v": rows(module, v, kv_heads, value_width, own_bias=biases["v"]),
        "o": columns(module, o, heads, value_width),
    }


@rule("B1", "timm.layers.attention.AttentionRope", "timm.models.eva.EvaAttention", flags={"norm": "norm_before_proj"})
def projections(module: Any) -> Slots | None:
    """Describe `q_proj`, `k_proj`, `v_proj`, `proj`."""
    return separate(module, "q_proj", "k_proj", "v_proj", "proj") if has(module, "q_proj") else None


@rule(
    "B1",
    "timm.models.gemma4_vit.Gemma4Attention",
    leaves_out=("rope",),
    flags={"v_norm": "v_norm", "q_proj.use_clipped": "clamped"},
)
def gemma(module: Any) -> Slots:
    """Describe projections wrapped in a module with a `.linear` inside."""
    return separate(module, "q_proj.linear", "k_proj.linear", "v_proj.linear", "o_proj.linear")


@rule("B2", "timm.models.cait.ClassAttn", leaves_out=("class_query",))
@rule("B2", "timm.models.nextvit.EfficientAttention")
def short_names(module: Any) -> Slots:
    """Describe `q`, `k`, `v`, `proj`."""
    return separate(module, "q", "k", "v", "proj")


@rule("B2", "timm.models.crossvit.CrossAttention", leaves_out=("class_query",))
def crossvit(module: Any) -> Slots:
    """Describe `wq`, `wk`, `wv`, `proj`."""
    return separate(module, "wq", "wk", "wv", "proj")


@rule("B3", "timm.models.pvt_v2.Attention", "timm.models.twins.GlobalSubSampleAttn")
@rule("B3", "timm.models.volo.ClassAttention", leaves_out=("class_query",))
def query_and_pair(module: Any) -> Slots:
    """Describe `q` and `kv` with rows ``[k | v][head][unit]``."""
    heads = int(module.num_heads)
    width = out_features(module, "q") // heads
    k, v = blocks(module, "kv", heads, width, width)
    return {"q": rows(module, "q", heads, width), "k": k, "v": v, "o": columns(module, "proj", heads, width)}


@rule("B4", "timm.models.convit.GPSA", "timm.models.tnt.Attention")
def pair_and_value(module: Any) -> Slots:
    """Describe `qk` with rows ``[q | k][head][unit]`` and `v`, whose width may differ."""
    heads = int(module.num_heads)
    width = out_features(module, "qk") // (2 * heads)
    value_width = out_features(module, "v") // heads
    q, k = blocks(module, "qk", heads, width, width)
    v = rows(module, "v", heads, value_width)
    return {"q": q, "k": k, "v": v, "o": columns(module, "proj", heads, value_width)}
