"""CLIP and SigLIP: a vision and a text tower, whole or apart; SigLIP's vision tower ends in attention pooling."""

from dataclasses import replace

from attnlens.foreign.stack import Family, Stack

LAYER = "encoder.layers.{layer}."
HEAD = "head.attention"

# Configurations on the hub leave out what equals the defaults of their class.
_BASE = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}

TOWER = Stack(
    path=LAYER + "self_attn",
    q=LAYER + "self_attn.q_proj.weight",
    k=LAYER + "self_attn.k_proj.weight",
    v=LAYER + "self_attn.v_proj.weight",
    o=LAYER + "self_attn.out_proj.weight",
    norm=LAYER + "layer_norm1.weight",
    defaults=_BASE,
)
VISION = replace(TOWER, section="vision_config", within="vision_model.")
CLIP_TEXT = replace(
    TOWER,
    section="text_config",
    within="text_model.",
    defaults={"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 12},
    flags=("causal",),
)
SIGLIP_TEXT = replace(TOWER, section="text_config", within="text_model.")
# One layer: a learned probe asks (no norm in front of q), the normed patches answer.
SIGLIP_POOL = replace(
    VISION,
    path=HEAD,
    q=HEAD + ".in_proj_weight",
    k=HEAD + ".in_proj_weight",
    v=HEAD + ".in_proj_weight",
    o=HEAD + ".out_proj.weight",
    norm="post_layernorm.weight",
    norm_roles="kv",
    depth=None,
    flags=("latent_query",),
)


def _alone(stack: Stack) -> Stack:
    """Describe a tower whose own configuration is the whole configuration."""
    return replace(stack, section=None)


FAMILIES = (
    Family(name="clip", model_types=("clip",), stacks=(VISION, CLIP_TEXT)),
    Family(name="clip", model_types=("clip_vision_model",), stacks=(_alone(VISION),)),
    Family(name="clip", model_types=("clip_text_model",), stacks=(_alone(CLIP_TEXT),)),
    Family(name="siglip", model_types=("siglip", "siglip2"), stacks=(VISION, SIGLIP_POOL, SIGLIP_TEXT)),
    Family(
        name="siglip",
        model_types=("siglip_vision_model", "siglip2_vision_model"),
        stacks=(_alone(VISION), _alone(SIGLIP_POOL)),
    ),
    Family(name="siglip", model_types=("siglip_text_model", "siglip2_text_model"), stacks=(_alone(SIGLIP_TEXT),)),
)
