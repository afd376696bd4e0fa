"""BERT-type encoders, whose norms stand behind the sum: BERT, RoBERTa, ELECTRA, DistilBERT, MPNet.

Layer l reads x_l = g * n + b, the output of the norm that closes layer l - 1 (of the embeddings' norm for l = 0), so
that norm's weight g is the gain folded into its projections: W_eff = diag(g) W. The layer adds its output to x_l
itself and norms the sum, so no stream passes the layers by unnormed: flag ``post_norm``.
"""

from attnlens.foreign.stack import Family, Stack

LAYER, BEFORE = "encoder.layer.{layer}.", "encoder.layer.{before}."
DISTILLED, DISTILLED_BEFORE = "transformer.layer.{layer}.", "transformer.layer.{before}."
EMBEDDING_NORM = "embeddings.LayerNorm.weight"

FAMILIES = (
    Family(
        name="bert",
        model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text"),
        stacks=(
            Stack(
                path=LAYER + "attention",
                q=LAYER + "attention.self.query.weight",
                k=LAYER + "attention.self.key.weight",
                v=LAYER + "attention.self.value.weight",
                o=LAYER + "attention.output.dense.weight",
                norm=BEFORE + "output.LayerNorm.weight",
                first_norm=EMBEDDING_NORM,
                flags=("post_norm",),
                flags_set={"is_decoder": "causal"},
                flags_stored={LAYER + "attention.self.distance_embedding.weight": "rel_pos_bias"},
            ),
        ),
    ),
    Family(
        name="bert",
        model_types=("distilbert",),
        stacks=(
            Stack(
                path=DISTILLED + "attention",
                q=DISTILLED + "attention.q_lin.weight",
                k=DISTILLED + "attention.k_lin.weight",
                v=DISTILLED + "attention.v_lin.weight",
                o=DISTILLED + "attention.out_lin.weight",
                norm=DISTILLED_BEFORE + "output_layer_norm.weight",
                first_norm=EMBEDDING_NORM,
                heads="n_heads",
                depth="n_layers",
                width="dim",
                flags=("post_norm",),
            ),
        ),
    ),
    Family(
        name="bert",
        model_types=("mpnet",),
        stacks=(
            Stack(
                path=LAYER + "attention",
                q=LAYER + "attention.attn.q.weight",
                k=LAYER + "attention.attn.k.weight",
                v=LAYER + "attention.attn.v.weight",
                o=LAYER + "attention.attn.o.weight",
                norm=BEFORE + "output.LayerNorm.weight",
                first_norm=EMBEDDING_NORM,
                flags=("post_norm",),
                flags_stored={"encoder.relative_attention_bias.weight": "rel_pos_bias"},
            ),
        ),
    ),
)
