"""Family C5: channel attention. Rows as in family A, but scores stand between channels of a head, never between tokens.

With Q = X W_Q and K = X W_K the score matrix is Q^T K, ``[head_dim, head_dim]``: it sums over tokens, and W_Q W_K^T
never meets two of them. Read on request only.
"""

from __future__ import annotations

from typing import Any

from attnlens.layouts.fused import fused_qkv
from attnlens.layouts.rules import Slots, has, rule
from attnlens.layouts.slots import columns, out_features


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
