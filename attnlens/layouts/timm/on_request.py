"""Family C5: channel attention. Rows as in family A, but scores stand between channels of a head, never between tokens.

With Q = X W_Q and K = X W_K the score matrix is Q^T K, ``[head_dim, head_dim]``: it sums over tokens, and W_Q W_K^T
never meets two of them. Read on request only.
"""

from __future__ import annotations

from typing import Any

from attnlens.layouts.builders import behind, by_head, columns, out_features, rows
from attnlens.layouts.registry import Slots, has, rule
from attnlens.layouts.timm.fused import fused_qkv


def _standard(module: Any) -> Slots:
    heads = int(module.groups if has(module, "groups") else module.num_heads)
    width = out_features(module, "qkv") // (3 * heads)
    return {**fused_qkv(module, heads, width), "o": columns(module, "proj", heads, width)}


@rule("C5", "timm.models.xcit.XCA", "timm.models.edgenext.CrossCovarianceAttn", kind="channel", leaves_out=("cosine",))
@rule("C5", "timm.models.davit.ChannelAttentionV2", kind="channel", leaves_out=("token_count_scale",))
def channel(module: Any) -> Slots:
    """Describe `qkv` with rows ``[q | k | v][head][unit]`` and `proj`."""
    return _standard(module)


@rule(
    "C5",
    "timm.models.davit.ChannelAttention",
    kind="channel",
    label="scores come from the blocks stored as k and v and weigh the one stored as q: read in that order",
)
def davit(module: Any) -> Slots:
    """Describe rows by what they do: scores are K^T V and weigh Q, so the stored blocks are ``[v | q | k]``."""
    slots = _standard(module)
    return {"q": slots["k"], "k": slots["v"], "v": slots["q"], "o": slots["o"]}


@rule(
    "C6",
    "timm.models.coat.FactorAttnConvRelPosEnc",
    kind="linear",
    leaves_out=("softmax_on_k",),
    flags={"crpe": "rel_pos_bias"},
)
def factorised(module: Any) -> Slots:
    """Describe `qkv` with rows ``[q | k | v][head][unit]``; k is normalised over tokens by a softmax of its own."""
    heads = int(module.num_heads)
    width = out_features(module, "qkv") // (3 * heads)
    return {**fused_qkv(module, heads, width), "o": columns(module, "proj", heads, width)}


@rule(
    "C6",
    "timm.models.efficientvit_mit.LiteMLA",
    kind="linear",
    leaves_out=("act_on_qk",),
    flags={"aggreg": "multi_scale"},
)
def multi_scale(module: Any) -> Slots:
    """Describe `qkv` with rows ``[head][q | k | v]``: the heads of the first scale, which come first in `proj`."""
    width = int(module.dim)
    heads = out_features(module, "qkv") // (3 * width)
    q, k, v = by_head(module, "qkv", heads, width, width, width)
    return {"q": q, "k": k, "v": v, "o": columns(module, "proj", heads, width)}


@rule(
    "C6",
    "timm.layers.lambda_layer.LambdaLayer",
    kind="linear",
    leaves_out=("softmax_on_k", "rel_pos_bias"),
    flags={"pool": "out_pool", "norm_q": None, "norm_v": None},
)
def lambda_layer(module: Any) -> Slots:
    """Describe rows ``[q heads | k | v]`` with one key and one value head, BatchNorm behind q and v; no W_O."""
    heads, width = int(module.num_heads), int(module.dim_qk)
    q = rows(module, "qkv", heads, width)
    k = rows(module, "qkv", 1, width, offset=heads * width)
    v = rows(module, "qkv", 1, int(module.dim_v), offset=(heads + 1) * width)
    return {"q": behind(q, module, "norm_q"), "k": k, "v": behind(v, module, "norm_v")}
