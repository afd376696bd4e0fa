"""BEiT and data2vec-vision: no key bias, LayerScale, relative-position terms."""

from attnlens.foreign.stack import Family, Stack

LAYER = "encoder.layer.{layer}."
TABLE = "relative_position_bias.relative_position_bias_table"

FAMILY = Family(
    name="beit",
    model_types=("beit", "data2vec-vision"),
    stacks=(
        Stack(
            path=LAYER + "attention",
            q=LAYER + "attention.attention.query.weight",
            k=LAYER + "attention.attention.key.weight",
            v=LAYER + "attention.attention.value.weight",
            o=LAYER + "attention.output.dense.weight",
            norm=LAYER + "layernorm_before.weight",
            layer_scale=LAYER + "lambda_1",
            flags_stored={LAYER + "attention.attention." + TABLE: "rel_pos_bias", "encoder." + TABLE: "rel_pos_bias"},
        ),
    ),
)
