"""Family C9: cascaded groups. Head h projects channel slice h of the input plus the output of head h - 1."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.rules import Slots, rule
from attnlens.layouts.slots import columns, rows


@rule(
    "C9",
    "timm.models.efficientvit_msra.CascadedGroupAttention",
    leaves_out=("channel_slice", "cascaded", "conv_on_q", "act_before_proj"),
)
def cascaded(module: Any) -> Slots:
    """Describe one `qkvs` convolution per head with rows ``[q | k | v]``; W_Q reads ``embed_dim / H`` channels."""
    heads, width, value_width = int(module.num_heads), int(module.key_dim), int(module.val_dim)
    return {
        "q": rows(module, "qkvs.{head}", heads, width),
        "k": rows(module, "qkvs.{head}", heads, width, offset=width),
        "v": rows(module, "qkvs.{head}", heads, value_width, offset=2 * width),
        "o": columns(module, "proj.1", heads, value_width),
    }
