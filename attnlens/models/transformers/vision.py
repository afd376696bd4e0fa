"""Vision models of transformers: ViT and its relatives, DINOv2, DINOv3, BEiT, and the towers of CLIP and SigLIP."""

from dataclasses import replace

from attnlens.models.transformers.stack import Family, Stack

# ViT and its relatives without LayerScale: ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA.
_VIT = "encoder.layer.{layer}."

VIT = Family(
    name="vit",
    model_types=("vit", "deit", "vit_mae", "vit_msn", "ijepa", "audio-spectrogram-transformer"),
    stacks=(
        Stack(
            path=_VIT + "attention",
            q=_VIT + "attention.attention.query.weight",
            k=_VIT + "attention.attention.key.weight",
            v=_VIT + "attention.attention.value.weight",
            o=_VIT + "attention.output.dense.weight",
            norm=_VIT + "layernorm_before.weight",
        ),
    ),
)

# DINOv2, with and without registers: ViT with LayerScale.
DINOV2 = Family(
    name="dinov2",
    model_types=("dinov2", "dinov2_with_registers"),
    stacks=(
        Stack(
            path=_VIT + "attention",
            q=_VIT + "attention.attention.query.weight",
            k=_VIT + "attention.attention.key.weight",
            v=_VIT + "attention.attention.value.weight",
            o=_VIT + "attention.output.dense.weight",
            norm=_VIT + "norm1.weight",
            layer_scale=_VIT + "layer_scale1.lambda1",
        ),
    ),
)

# DINOv3's ViT: separate projections, rotary positions, LayerScale.
_DINOV3 = "layer.{layer}."

DINOV3 = Family(
    name="dinov3",
    model_types=("dinov3_vit",),
    stacks=(
        Stack(
            path=_DINOV3 + "attention",
            q=_DINOV3 + "attention.q_proj.weight",
            k=_DINOV3 + "attention.k_proj.weight",
            v=_DINOV3 + "attention.v_proj.weight",
            o=_DINOV3 + "attention.o_proj.weight",
            norm=_DINOV3 + "norm1.weight",
            layer_scale=_DINOV3 + "layer_scale1.lambda1",
            flags=("rope",),
        ),
    ),
)

# BEiT and data2vec-vision: no key bias, LayerScale, relative-position terms.
_TABLE = "relative_position_bias.relative_position_bias_table"

BEIT = Family(
    name="beit",
    model_types=("beit", "data2vec-vision"),
    stacks=(
        Stack(
            path=_VIT + "attention",
            q=_VIT + "attention.attention.query.weight",
            k=_VIT + "attention.attention.key.weight",
            v=_VIT + "attention.attention.value.weight",
            o=_VIT + "attention.output.dense.weight",
            norm=_VIT + "layernorm_before.weight",
            layer_scale=_VIT + "lambda_1",
            flags_stored={_VIT + "attention.attention." + _TABLE: "rel_pos_bias", "encoder." + _TABLE: "rel_pos_bias"},
        ),
    ),
)

# CLIP and SigLIP: a vision and a text tower, whole or apart; SigLIP's vision tower ends in attention pooling.
_CLIP = "encoder.layers.{layer}."
_POOL = "head.attention"

# Configurations on the hub leave out what equals the defaults of their class.
_BASE = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12}

TOWER = Stack(
    path=_CLIP + "self_attn",
    q=_CLIP + "self_attn.q_proj.weight",
    k=_CLIP + "self_attn.k_proj.weight",
    v=_CLIP + "self_attn.v_proj.weight",
    o=_CLIP + "self_attn.out_proj.weight",
    norm=_CLIP + "layer_norm1.weight",
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
    path=_POOL,
    q=_POOL + ".in_proj_weight",
    k=_POOL + ".in_proj_weight",
    v=_POOL + ".in_proj_weight",
    o=_POOL + ".out_proj.weight",
    norm="post_layernorm.weight",
    norm_roles="kv",
    depth=None,
    flags=("latent_query",),
)


def _alone(stack: Stack) -> Stack:
    """Describe a tower whose own configuration is the whole configuration."""
    return replace(stack, section=None)


CLIP = (
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

# V-JEPA 2: an encoder and the predictor trained beside it, with rotary positions in three axes.
_VJEPA_SIZES = ("pred_num_attention_heads", "pred_num_hidden_layers", "pred_hidden_size")


def _vjepa(layer: str) -> Stack:
    return Stack(
        path=layer + "attention",
        q=layer + "attention.query.weight",
        k=layer + "attention.key.weight",
        v=layer + "attention.value.weight",
        o=layer + "attention.proj.weight",
        norm=layer + "norm1.weight",
        flags=("rope",),
    )


_PREDICTOR = replace(
    _vjepa("predictor.layer.{layer}."),
    **dict(zip(("heads", "depth", "width"), _VJEPA_SIZES, strict=True)),  # type: ignore[arg-type]
)
VJEPA2 = Family(name="vjepa2", model_types=("vjepa2",), stacks=(_vjepa("encoder.layer.{layer}."), _PREDICTOR))

FAMILIES = (VIT, DINOV2, DINOV3, BEIT, *CLIP, VJEPA2)
