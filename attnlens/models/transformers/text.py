"""Text models of transformers: encoders in the manner of BERT, GPT-2, and decoders in the manner of Llama."""

from dataclasses import replace

from attnlens.errors import ModelNotFoundError
from attnlens.models.transformers.stack import Config, Family, Stack

# BERT-type encoders, whose norms stand behind the sum: BERT, RoBERTa, ELECTRA, DistilBERT, MPNet.
#
# Layer l reads x_l = g * n + b, the output of the norm that closes layer l - 1 (of the embeddings' norm for l = 0), so
# that norm's weight g is the gain folded into its projections: W_eff = diag(g) W. The layer adds its output to x_l
# itself and norms the sum, so no stream passes the layers by unnormed: flag ``post_norm``.
_BERT, _BERT_BEFORE = "encoder.layer.{layer}.", "encoder.layer.{before}."
_DISTILLED, _DISTILLED_BEFORE = "transformer.layer.{layer}.", "transformer.layer.{before}."
_EMBEDDING_NORM = "embeddings.LayerNorm.weight"

BERT = (
    Family(
        name="bert",
        model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra", "data2vec-text"),
        stacks=(
            Stack(
                path=_BERT + "attention",
                q=_BERT + "attention.self.query.weight",
                k=_BERT + "attention.self.key.weight",
                v=_BERT + "attention.self.value.weight",
                o=_BERT + "attention.output.dense.weight",
                norm=_BERT_BEFORE + "output.LayerNorm.weight",
                first_norm=_EMBEDDING_NORM,
                flags=("post_norm",),
                flags_set={"is_decoder": "causal"},
                flags_stored={_BERT + "attention.self.distance_embedding.weight": "rel_pos_bias"},
            ),
        ),
    ),
    Family(
        name="bert",
        model_types=("distilbert",),
        stacks=(
            Stack(
                path=_DISTILLED + "attention",
                q=_DISTILLED + "attention.q_lin.weight",
                k=_DISTILLED + "attention.k_lin.weight",
                v=_DISTILLED + "attention.v_lin.weight",
                o=_DISTILLED + "attention.out_lin.weight",
                norm=_DISTILLED_BEFORE + "output_layer_norm.weight",
                first_norm=_EMBEDDING_NORM,
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
                path=_BERT + "attention",
                q=_BERT + "attention.attn.q.weight",
                k=_BERT + "attention.attn.k.weight",
                v=_BERT + "attention.attn.v.weight",
                o=_BERT + "attention.attn.o.weight",
                norm=_BERT_BEFORE + "output.LayerNorm.weight",
                first_norm=_EMBEDDING_NORM,
                flags=("post_norm",),
                flags_stored={"encoder.relative_attention_bias.weight": "rel_pos_bias"},
            ),
        ),
    ),
)

# ModernBERT: norms in front; the first layer reads the norm of the embeddings as it is.
_MODERN = "layers.{layer}."

MODERNBERT = Family(
    name="modernbert",
    model_types=("modernbert",),
    stacks=(
        Stack(
            path=_MODERN + "attn",
            q=_MODERN + "attn.Wqkv.weight",
            k=_MODERN + "attn.Wqkv.weight",
            v=_MODERN + "attn.Wqkv.weight",
            o=_MODERN + "attn.Wo.weight",
            norm=_MODERN + "attn_norm.weight",
            first_norm="embeddings.norm.weight",
            flags=("rope",),
        ),
    ),
)

# GPT-2: packed q, k and v, every projection stored ``[in, out]``.
_GPT2 = "h.{layer}."


def _gpt2_scale(config: Config, layer: int, head_dim: int) -> float:
    """Return 1 / sqrt(head_dim), or 1, divided by layer + 1 where the configuration asks for it."""
    base = head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
    return float(base / (layer + 1) if config.get("scale_attn_by_inverse_layer_idx") else base)


GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    stacks=(
        Stack(
            path=_GPT2 + "attn",
            q=_GPT2 + "attn.c_attn.weight",
            k=_GPT2 + "attn.c_attn.weight",
            v=_GPT2 + "attn.c_attn.weight",
            o=_GPT2 + "attn.c_proj.weight",
            norm=_GPT2 + "ln_1.weight",
            stored_in_out=True,
            heads="n_head",
            depth="n_layer",
            width="n_embd",
            scale=_gpt2_scale,
            flags=("causal",),
        ),
    ),
)

# Decoders in the manner of Llama: RMSNorm in front, rotary positions, grouped heads, a causal mask.
#
# Qwen2 adds biases to q, k and v, Qwen3 and Gemma 3 norms behind q and k; Gemma multiplies by (1 + weight) in norms.
_LLAMA = "layers.{layer}."

_DECODER = Stack(
    path=_LLAMA + "self_attn",
    q=_LLAMA + "self_attn.q_proj.weight",
    k=_LLAMA + "self_attn.k_proj.weight",
    v=_LLAMA + "self_attn.v_proj.weight",
    o=_LLAMA + "self_attn.o_proj.weight",
    norm=_LLAMA + "input_layernorm.weight",
    norm_kind="rms",
    flags=("rope", "causal"),
    flags_stored={_LLAMA + "self_attn.q_norm.weight": "q_norm", _LLAMA + "self_attn.k_norm.weight": "k_norm"},
)
_GEMMA = replace(
    _DECODER,
    gain_offset=1.0,
    defaults={"head_dim": 256},
    flags=("rope",),
    flags_unset={"use_bidirectional_attention": "causal"},
)


def _gemma_scale(config: Config, _layer: int, _head_dim: int) -> float:
    """Return 1 / sqrt of the width the configuration names for it."""
    scalar = config.get("query_pre_attn_scalar", 256)
    if not isinstance(scalar, int | float) or not 0 < scalar < 1e9:
        raise ModelNotFoundError(f"query_pre_attn_scalar is {scalar!r} where a number above 0 is needed: fix the file")
    return float(scalar**-0.5)


LLAMA = (
    Family(
        name="llama",
        model_types=("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"),
        stacks=(_DECODER,),
    ),
    Family(name="starcoder2", model_types=("starcoder2",), stacks=(replace(_DECODER, norm_kind="layer"),)),
    Family(name="gemma", model_types=("gemma",), stacks=(_GEMMA,)),
    Family(
        name="gemma",
        model_types=("gemma2", "gemma3_text"),
        stacks=(
            replace(
                _GEMMA,
                scale=_gemma_scale,
                flags=("rope", "norm_after"),
                flags_set={"attn_logit_softcapping": "softcap"},
            ),
        ),
    ),
)

FAMILIES = (*BERT, MODERNBERT, GPT2, *LLAMA)
