"""Decoders in the manner of Llama: RMSNorm in front, rotary positions, grouped heads, a causal mask.

Qwen2 adds biases to q, k and v, Qwen3 and Gemma 3 norms behind q and k; Gemma multiplies by (1 + weight) in its norms.
"""

from dataclasses import replace

from attnlens.errors import ModelNotFoundError
from attnlens.foreign.stack import Config, Family, Stack

LAYER = "layers.{layer}."

DECODER = Stack(
    path=LAYER + "self_attn",
    q=LAYER + "self_attn.q_proj.weight",
    k=LAYER + "self_attn.k_proj.weight",
    v=LAYER + "self_attn.v_proj.weight",
    o=LAYER + "self_attn.o_proj.weight",
    norm=LAYER + "input_layernorm.weight",
    norm_kind="rms",
    flags=("rope", "causal"),
    flags_stored={LAYER + "self_attn.q_norm.weight": "q_norm", LAYER + "self_attn.k_norm.weight": "k_norm"},
)
GEMMA = replace(
    DECODER,
    gain_offset=1.0,
    defaults={"head_dim": 256},
    flags=("rope",),
    flags_unset={"use_bidirectional_attention": "causal"},
)


def gemma_scale(config: Config, _layer: int, _head_dim: int) -> float:
    """Return 1 / sqrt of the width the configuration names for it."""
    scalar = config.get("query_pre_attn_scalar", 256)
    if not isinstance(scalar, int | float) or not 0 < scalar < 1e9:
        raise ModelNotFoundError(f"query_pre_attn_scalar is {scalar!r} where a number above 0 is needed: fix the file")
    return float(scalar**-0.5)


FAMILIES = (
    Family(
        name="llama",
        model_types=("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"),
        stacks=(DECODER,),
    ),
    Family(name="gemma", model_types=("gemma",), stacks=(GEMMA,)),
    Family(
        name="gemma",
        model_types=("gemma2", "gemma3_text"),
        stacks=(
            replace(
                GEMMA,
                scale=gemma_scale,
                flags=("rope", "norm_after"),
                flags_set={"attn_logit_softcapping": "softcap"},
            ),
        ),
    ),
)
