"""Family P: attention pooling. The query is a learned latent, or the mean of the tokens, and one token comes out."""

from __future__ import annotations

from typing import Any

from attnlens.errors import UnsupportedAttentionError
from attnlens.layouts.builders import blocks, columns, is_identity, rows
from attnlens.layouts.registry import Slots, has, rule
from attnlens.layouts.timm.fused import fused_qkv


@rule(
    "P",
    "timm.layers.attention_pool.AttentionPoolLatent",
    leaves_out=("latent_query",),
    flags={"pos_embed": "pos_embed"},
)
def latent(module: Any) -> Slots:
    """Describe `q`, which reads learned latents and not tokens, and `kv` with rows ``[k | v][head][unit]``."""
    if is_identity(module.q):
        raise UnsupportedAttentionError(
            "pools with a latent that is the query itself (family P): there is no W_Q, so no QK circuit"
        )
    heads, width = int(module.num_heads), int(module.head_dim)
    k, v = blocks(module, "kv", heads, width, width)
    return _with_output(module, {"q": rows(module, "q", heads, width), "k": k, "v": v})


@rule(
    "P",
    "timm.layers.attention_pool2d.AttentionPool2d",
    leaves_out=("pooled_query",),
    flags={"pos_embed": "pos_embed"},
)
@rule("P", "timm.layers.attention_pool2d.RotAttentionPool2d", leaves_out=("pooled_query", "rope"))
def pool_2d(module: Any) -> Slots:
    """Describe `qkv` with rows ``[q | k | v][head][unit]``, or `q`, `k`, `v` apart."""
    heads, width = int(module.num_heads), int(module.head_dim)
    if has(module, "qkv"):
        return _with_output(module, fused_qkv(module, heads, width))
    return _with_output(module, {role: rows(module, role, heads, width) for role in "qkv"})


def _with_output(module: Any, slots: Slots) -> Slots:
    """Add `proj`, which a model without a pooled output width leaves out."""
    if is_identity(module.proj):
        return slots
    return {**slots, "o": columns(module, "proj", slots["v"].heads, slots["v"].width)}
