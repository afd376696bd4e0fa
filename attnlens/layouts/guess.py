"""The structural fallback for classes nobody described: family A by its shapes, under a visible label, or a refusal."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.registry import Slots
from attnlens.layouts.timm.fused import standard

LABEL = "layout guessed"

_NAMES_OF_QKV = (
    ("qkv",),
    ("to_qkv",),
    ("Wqkv",),
    ("in_proj_weight",),
    ("q", "k", "v"),
    ("q_proj", "k_proj", "v_proj"),
    ("wq", "wk", "wv"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
)


def looks_like_attention(module: Any) -> bool:
    """Whether a module holds projections under the names that attention modules give to q, k and v."""
    return any(all(_is_projection(module, name) for name in names) for names in _NAMES_OF_QKV)


def guess(module: Any) -> Slots | None:
    """Read a module as family A where its shapes allow nothing else of that form; None where they contradict it.

    It needs Linears `qkv` ``[3 * num_heads * head_dim, in]`` and `proj` ``[out, num_heads * head_dim]``, an integer
    ``num_heads``, and no attribute that speaks of other rows or other heads. Rows ``[head][q | k | v]`` have the same
    shapes: the label says that they were not ruled out.
    """
    from torch import nn

    heads = getattr(module, "num_heads", None)
    linears: list[Any] = [getattr(module, name, None) for name in ("qkv", "proj")]
    if not isinstance(heads, int) or heads < 1 or not all(isinstance(linear, nn.Linear) for linear in linears):
        return None
    total, rest = divmod(linears[0].out_features, 3)
    claims = {
        "head_dim": total // heads,
        "key_dim": total // heads,
        "val_dim": total // heads,
        "num_kv_heads": heads,
        "head_first": False,
    }
    contradicted = any(getattr(module, name, None) not in (None, value) for name, value in claims.items())
    if rest or total % heads or linears[1].in_features != total or contradicted:
        return None
    return standard(module)


def _is_projection(module: Any, name: str) -> bool:
    value = getattr(module, name, None)
    weight = getattr(value, "weight", value)
    return getattr(weight, "ndim", 0) > 1
