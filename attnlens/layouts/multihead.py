"""torch.nn.MultiheadAttention: `in_proj_weight` with rows ``[q | k | v][head][unit]``, or three weights; `out_proj`."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.rules import Slots, rule
from attnlens.layouts.slots import columns
from attnlens.layouts.spec import Slot


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
