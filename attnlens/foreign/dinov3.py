"""DINOv3's ViT: separate projections, rotary positions, LayerScale."""

from attnlens.foreign.stack import Family, Stack

LAYER = "layer.{layer}."

FAMILY = Family(
    name="dinov3",
    model_types=("dinov3_vit",),
    stacks=(
        Stack(
            path=LAYER + "attention",
            q=LAYER + "attention.q_proj.weight",
            k=LAYER + "attention.k_proj.weight",
            v=LAYER + "attention.v_proj.weight",
            o=LAYER + "attention.o_proj.weight",
            norm=LAYER + "norm1.weight",
            layer_scale=LAYER + "layer_scale1.lambda1",
            flags=("rope",),
        ),
    ),
)
