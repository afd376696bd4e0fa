"""ViT and its relatives without LayerScale: ViT, DeiT, ViT-MAE, ViT-MSN, I-JEPA."""

from attnlens.foreign.stack import Family, Stack

LAYER = "encoder.layer.{layer}."

FAMILY = Family(
    name="vit",
    model_types=("vit", "deit", "vit_mae", "vit_msn", "ijepa"),
    stacks=(
        Stack(
            path=LAYER + "attention",
            q=LAYER + "attention.attention.query.weight",
            k=LAYER + "attention.attention.key.weight",
            v=LAYER + "attention.attention.value.weight",
            o=LAYER + "attention.output.dense.weight",
            norm=LAYER + "layernorm_before.weight",
        ),
    ),
)
