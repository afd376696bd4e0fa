"""Family C2: a block that runs attention beside its MLP from one `in_proj` with rows ``[mlp | q | k | v]``."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.rules import Slots, has, rule
from attnlens.layouts.slots import blocks, columns


@rule("C2", "timm.models.vision_transformer.ParallelScalingBlock", leaves_out=("parallel_mlp",))
def parallel_block(module: Any) -> Slots:
    """Describe `in_proj` behind its MLP rows, and `attn_out_proj` or the first columns of a shared `out_proj`."""
    heads, width = int(module.num_heads), int(module.head_dim)
    q, k, v = blocks(module, "in_proj", heads, width, width, width, start=int(module.in_split[0]))
    o = "attn_out_proj" if has(module, "attn_out_proj") else "out_proj"
    return {"q": q, "k": k, "v": v, "o": columns(module, o, heads, width)}
