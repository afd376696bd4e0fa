"""Encoder-decoders, whose cross attention asks with the decoder's stream and reads the encoder's; speech encoders.

The norm that a layer's queries read stands in the decoder, that of its keys and values is the last of the encoder.
"""

from dataclasses import replace
from typing import Any

from attnlens.models.transformers.stack import Family, Stack, unscaled

# T5: RMSNorms in front, no biases, scores without a scale, one table of relative positions for each side.
_T5_ENCODER, _T5_DECODER = "encoder.block.{layer}.layer.0.", "decoder.block.{layer}.layer."
_T5_SIZES: dict[str, Any] = {
    "heads": "num_heads",
    "width": "d_model",
    "head_dim": "d_kv",
    "norm_kind": "rms",
    "scale": unscaled,
}


def _t5(layer: str, module: str, **about: Any) -> Stack:
    names: dict[str, Any] = {role: f"{layer}{module}.{role}.weight" for role in "qkvo"}
    return Stack(path=layer + module, norm=layer + "layer_norm.weight", **names, **_T5_SIZES, **about)


_T5 = (
    _t5(_T5_ENCODER, "SelfAttention", depth="num_layers", flags=("rel_pos_bias",)),
    _t5(
        _T5_DECODER + "0.",
        "SelfAttention",
        depth=("num_decoder_layers", "num_layers"),
        flags=("causal", "rel_pos_bias"),
    ),
    _t5(
        _T5_DECODER + "1.",
        "EncDecAttention",
        depth=("num_decoder_layers", "num_layers"),
        kv_norm="encoder.final_layer_norm.weight",
        flags=("cross",),
    ),
)

# BART and its kin: the same names with norms behind (BART, Marian) or in front (mBART, Pegasus, M2M-100, Whisper).
_ENCODER, _DECODER, _BEFORE = "encoder.layers.{layer}.", "decoder.layers.{layer}.", "decoder.layers.{before}."


def _bart(layer: str, module: str, norm: str, side: str, **about: Any) -> Stack:
    names: dict[str, Any] = {role: f"{layer}{module}.{role}_proj.weight" for role in "qkv"}
    return Stack(
        path=layer + module,
        o=f"{layer}{module}.out_proj.weight",
        norm=norm,
        heads=f"{side}_attention_heads",
        depth=f"{side}_layers",
        width="d_model",
        **names,
        **about,
    )


_PRE = (
    _bart(_ENCODER, "self_attn", _ENCODER + "self_attn_layer_norm.weight", "encoder"),
    _bart(_DECODER, "self_attn", _DECODER + "self_attn_layer_norm.weight", "decoder", flags=("causal",)),
    _bart(
        _DECODER,
        "encoder_attn",
        _DECODER + "encoder_attn_layer_norm.weight",
        "decoder",
        kv_norm="encoder.layer_norm.weight",
        flags=("cross",),
    ),
)


def _post(first: tuple[str, str]) -> tuple[Stack, ...]:
    """Describe the sides with norms behind their sums; ``first`` are those in front of the first layers."""
    encoder = _bart(
        _ENCODER,
        "self_attn",
        "encoder.layers.{before}.final_layer_norm.weight",
        "encoder",
        first_norm=first[0],
        flags=("post_norm",),
    )
    decoder = _bart(
        _DECODER,
        "self_attn",
        _BEFORE + "final_layer_norm.weight",
        "decoder",
        first_norm=first[1],
        flags=("causal", "post_norm"),
    )
    cross = _bart(
        _DECODER,
        "encoder_attn",
        _DECODER + "self_attn_layer_norm.weight",
        "decoder",
        kv_norm="encoder.layers.{last}.final_layer_norm.weight",
        source_depth="encoder_layers",
        flags=("cross", "post_norm"),
    )
    return encoder, decoder, cross


# wav2vec 2.0: an encoder alone, with norms behind (base) or in front ("stable", large).
_WAV = Stack(
    path=_ENCODER + "attention",
    q=_ENCODER + "attention.q_proj.weight",
    k=_ENCODER + "attention.k_proj.weight",
    v=_ENCODER + "attention.v_proj.weight",
    o=_ENCODER + "attention.out_proj.weight",
    norm=_ENCODER + "layer_norm.weight",
    defaults={"do_stable_layer_norm": False},
    only_if={"do_stable_layer_norm": True},
)
_WAV_POST = replace(
    _WAV,
    norm="encoder.layers.{before}.final_layer_norm.weight",
    first_norm="encoder.layer_norm.weight",
    only_if={"do_stable_layer_norm": False},
    flags=("post_norm",),
)
_GATED = {_ENCODER + "attention.gru_rel_pos_linear.weight": "rel_pos_bias"}
_WAVLM = (replace(_WAV, flags_stored=_GATED), replace(_WAV_POST, flags_stored=_GATED))

FAMILIES = (
    Family(name="t5", model_types=("t5", "mt5"), stacks=_T5),
    Family(
        name="bart",
        model_types=("mbart", "pegasus", "m2m_100", "blenderbot", "speech_to_text"),
        stacks=_PRE,
    ),
    Family(name="whisper", model_types=("whisper",), stacks=_PRE),
    Family(
        name="bart",
        model_types=("bart", "plbart"),
        stacks=_post(("encoder.layernorm_embedding.weight", "decoder.layernorm_embedding.weight")),
    ),
    Family(name="bart", model_types=("marian",), stacks=_post(("", ""))),
    Family(name="wav2vec2", model_types=("wav2vec2", "hubert", "unispeech", "unispeech-sat"), stacks=(_WAV, _WAV_POST)),
    Family(name="wav2vec2", model_types=("wavlm",), stacks=_WAVLM),
)
