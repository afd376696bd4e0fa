"""DINOv2, with and without registers: ViT with LayerScale."""

from attnlens.foreign.stack import Family, Stack

LAYER = "encoder.layer.{layer}."

FAMILY = Family(
    name="dinov2",
    model_types=("dinov2", "dinov2_with_registers"),
    stacks=(
        Stack(
            path=LAYER + "attention",
            q=LAYER + "attention.attention.query.weight",
            k=LAYER + "attention.attention.key.weight",
            v=LAYER + "attention.attention.value.weight",
            o=LAYER + "attention.output.dense.weight",
            norm=LAYER + "norm1.weight",
            layer_scale=LAYER + "layer_scale1.lambda1",
        ),
    ),
)
