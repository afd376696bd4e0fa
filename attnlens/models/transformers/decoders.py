"""Decoders not in the manner of Llama: GPT-NeoX, GPT-J, GPT-Neo, CodeGen, GPTBigCode, Phi, BLOOM, Falcon and OPT."""

from dataclasses import replace

from attnlens.models.transformers.stack import Config, Family, Stack, inverse_root, unscaled

_PLAIN, _H, _OPT = "layers.{layer}.", "h.{layer}.", "decoder.layers.{layer}."
_GPT_SIZES = {"heads": "n_head", "depth": "n_layer", "width": "n_embd"}

# A bias-free packed projection would do; NeoX's and BLOOM's rows stand head by head.
_NEOX = Stack(
    path=_PLAIN + "attention",
    q=_PLAIN + "attention.query_key_value.weight",
    k=_PLAIN + "attention.query_key_value.weight",
    v=_PLAIN + "attention.query_key_value.weight",
    o=_PLAIN + "attention.dense.weight",
    norm=_PLAIN + "input_layernorm.weight",
    head_first=True,
    defaults={"use_parallel_residual": True},
    flags=("rope", "causal"),
    flags_set={"use_parallel_residual": "parallel_mlp"},
)
_BLOOM = Stack(
    path=_H + "self_attention",
    q=_H + "self_attention.query_key_value.weight",
    k=_H + "self_attention.query_key_value.weight",
    v=_H + "self_attention.query_key_value.weight",
    o=_H + "self_attention.dense.weight",
    norm=_H + "input_layernorm.weight",
    head_first=True,
    heads="n_head",
    depth=("n_layer", "num_hidden_layers"),
    flags=("causal", "rel_pos_bias"),
)
# Falcon: one key head behind all queries (7B), key heads each behind its own queries (40B), or a key head each (1B).
_FALCON_DEFAULTS = {"multi_query": True, "parallel_attn": True, "one_key_head": 1, "new_decoder_architecture": False}
_FALCON_SHARED = replace(
    _BLOOM,
    heads="num_attention_heads",
    depth="num_hidden_layers",
    kv_heads="one_key_head",
    head_first=False,
    defaults=_FALCON_DEFAULTS,
    only_if={"multi_query": True, "new_decoder_architecture": False},
    flags=("causal",),
    flags_set={"alibi": "rel_pos_bias", "parallel_attn": "parallel_mlp"},
    flags_unset={"alibi": "rope"},
)
_FALCON_EACH = replace(
    _FALCON_SHARED,
    kv_heads="num_attention_heads",
    head_first=True,
    only_if={"multi_query": False, "new_decoder_architecture": False},
)
_FALCON_GROUPED = replace(
    _FALCON_SHARED,
    norm=_H + "ln_attn.weight",
    kv_heads="num_kv_heads",
    head_first=True,
    defaults={**_FALCON_DEFAULTS, "num_ln_in_parallel_attn": 2},
    only_if={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
)
_FALCON_ONE_NORM = replace(
    _FALCON_GROUPED,
    norm=_H + "input_layernorm.weight",
    only_if={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
)
_GPTJ = Stack(
    path=_H + "attn",
    q=_H + "attn.q_proj.weight",
    k=_H + "attn.k_proj.weight",
    v=_H + "attn.v_proj.weight",
    o=_H + "attn.out_proj.weight",
    norm=_H + "ln_1.weight",
    **_GPT_SIZES,  # type: ignore[arg-type]
    flags=("rope", "causal", "parallel_mlp"),
)
# CodeGen: as GPT-J, packed in the four parts it was trained in, each with values in front of keys.
_CODEGEN = replace(
    _GPTJ,
    q=_H + "attn.qkv_proj.weight",
    k=_H + "attn.qkv_proj.weight",
    v=_H + "attn.qkv_proj.weight",
    roles="qvk",
    parts=4,
)


def _bigcode_scale(config: Config, layer: int, head_dim: int) -> float:
    return inverse_root(config, layer, head_dim) if config.get("scale_attn_weights", True) else 1.0


# GPTBigCode: one key head for all queries behind these, or, where each has its own, rows head by head.
_BIGCODE_SHARED = Stack(
    path=_H + "attn",
    q=_H + "attn.c_attn.weight",
    k=_H + "attn.c_attn.weight",
    v=_H + "attn.c_attn.weight",
    o=_H + "attn.c_proj.weight",
    norm=_H + "ln_1.weight",
    **_GPT_SIZES,  # type: ignore[arg-type]
    kv_heads="kv_heads",
    defaults={"multi_query": True, "kv_heads": 1},
    only_if={"multi_query": True},
    scale=_bigcode_scale,
    flags=("causal",),
)
_BIGCODE = replace(_BIGCODE_SHARED, head_first=True, defaults={"multi_query": True}, only_if={"multi_query": False})
# GPT-Neo does not scale its scores.
_GPT_NEO = Stack(
    path=_H + "attn.attention",
    q=_H + "attn.attention.q_proj.weight",
    k=_H + "attn.attention.k_proj.weight",
    v=_H + "attn.attention.v_proj.weight",
    o=_H + "attn.attention.out_proj.weight",
    norm=_H + "ln_1.weight",
    heads="num_heads",
    depth="num_layers",
    scale=unscaled,
    flags=("causal",),
)
_PHI = Stack(
    path=_PLAIN + "self_attn",
    q=_PLAIN + "self_attn.q_proj.weight",
    k=_PLAIN + "self_attn.k_proj.weight",
    v=_PLAIN + "self_attn.v_proj.weight",
    o=_PLAIN + "self_attn.dense.weight",
    norm=_PLAIN + "input_layernorm.weight",
    flags=("rope", "causal", "parallel_mlp"),
    flags_stored={_PLAIN + "self_attn.q_layernorm.weight": "q_norm", _PLAIN + "self_attn.k_layernorm.weight": "k_norm"},
)
_PHI3 = Stack(
    path=_PLAIN + "self_attn",
    q=_PLAIN + "self_attn.qkv_proj.weight",
    k=_PLAIN + "self_attn.qkv_proj.weight",
    v=_PLAIN + "self_attn.qkv_proj.weight",
    o=_PLAIN + "self_attn.o_proj.weight",
    norm=_PLAIN + "input_layernorm.weight",
    norm_kind="rms",
    flags=("rope", "causal"),
)
_OPT_PRE = Stack(
    path=_OPT + "self_attn",
    q=_OPT + "self_attn.q_proj.weight",
    k=_OPT + "self_attn.k_proj.weight",
    v=_OPT + "self_attn.v_proj.weight",
    o=_OPT + "self_attn.out_proj.weight",
    norm=_OPT + "self_attn_layer_norm.weight",
    defaults={"do_layer_norm_before": True},
    only_if={"do_layer_norm_before": True},
    flags=("causal",),
)
# OPT-350m alone: norms behind the sums, nothing in front of the first layer.
_OPT_POST = replace(
    _OPT_PRE,
    norm="decoder.layers.{before}.final_layer_norm.weight",
    first_norm="",
    only_if={"do_layer_norm_before": False},
    flags=("causal", "post_norm"),
)

FAMILIES = (
    Family(name="gpt_neox", model_types=("gpt_neox",), stacks=(_NEOX,)),
    Family(name="gptj", model_types=("gptj",), stacks=(_GPTJ,)),
    Family(name="codegen", model_types=("codegen",), stacks=(_CODEGEN,)),
    Family(name="gpt_bigcode", model_types=("gpt_bigcode",), stacks=(_BIGCODE_SHARED, _BIGCODE)),
    Family(name="gpt_neo", model_types=("gpt_neo",), stacks=(_GPT_NEO,)),
    Family(name="phi", model_types=("phi",), stacks=(_PHI,)),
    Family(name="phi", model_types=("phi3",), stacks=(_PHI3,)),
    Family(name="bloom", model_types=("bloom",), stacks=(_BLOOM,)),
    Family(
        name="falcon",
        model_types=("falcon",),
        stacks=(_FALCON_SHARED, _FALCON_EACH, _FALCON_GROUPED, _FALCON_ONE_NORM),
    ),
    Family(name="opt", model_types=("opt",), stacks=(_OPT_PRE, _OPT_POST)),
)
