"""What the network applies beside a layer's product: the names used in ``leaves_out``, and how each is recognised."""

from __future__ import annotations

from collections.abc import Iterable

FLAGS = {
    "qk_bias": "q or k has a bias, which adds terms of one token to the score",
    "q_norm": "queries are normalised after their projection",
    "k_norm": "keys are normalised after their projection",
    "v_norm": "values are normalised after their projection",
    "cosine": "queries and keys are scaled to length one; a learned temperature stands for the scale",
    "rope": "queries and keys are rotated by position",
    "rope_unknown": "rotary position embeddings may be applied: no forward pass could be followed",
    "rel_pos_bias": "a term of relative position is added to the score",
    "position_gate": "a learned gate mixes the score map with one of positions alone",
    "pos_embed": "a position embedding is added to the input inside the layer",
    "talking_heads": "score maps of different heads are mixed",
    "differential": "the score map of every second head is subtracted from the one before it",
    "q_pool": "queries stand on a coarser grid than the input",
    "kv_pool": "keys and values are pooled after their projection",
    "spatial_reduction": "keys and values come from a reduced grid of the input",
    "conv_before_qkv": "a depthwise convolution precedes the projections",
    "conv_on_q": "a depthwise convolution stands behind the query projection",
    "class_query": "only the class token is a query",
    "latent_query": "the query is a learned latent, not a token: W_Q reads the latent",
    "pooled_query": "only the first token of the result is used, that of the mean or class token",
    "query_added": "the query is added to the heads' output",
    "local_values": "a depthwise convolution of the values is added to the heads' output",
    "gate": "a gate computed from the input multiplies the heads' output",
    "norm_before_proj": "a norm precedes the output projection",
    "act_before_proj": "an activation precedes the output projection",
    "act_on_v": "an activation stands behind the value projection",
    "act_on_qk": "an activation stands behind the query and key projections",
    "softmax_on_k": "a softmax over tokens stands behind the key projection",
    "token_count_scale": "scores are scaled by the number of tokens",
    "channel_slice": "each head reads a slice of the input's channels",
    "cascaded": "each head also reads the output of the head before it",
    "passthrough": "further channels pass the attention by and meet it in the output projection",
    "parallel_mlp": "an MLP runs beside the attention in the same block and shares its output",
    "multi_scale": "further heads read convolutions of q, k and v; they are not part of the product",
    "extra_key": "learned or zero keys and values are appended",
    "clamped": "inputs and outputs of the projections are clamped",
    "out_pool": "the output is pooled",
    "out_upsampled": "the output is upsampled to the grid of the input",
    "cross": "cross attention: queries read one stream, keys and values another: the diagonal stands between the two",
    "causal": "a causal mask stands over the scores: a token attends to itself and those before it",
    "softcap": "scores pass through a tanh before the softmax",
    "post_norm": "post-norm: the gain folded in is that of the norm behind the layer before, and the sum of input and "
    "output is normed again, which the effective OV product does not include",
    "norm_after": "a norm stands behind the layer's output",
    "norm_unknown": "the norms around the layer are not known, so that it has raw products only",
    "norm_mixed": "the input comes out of a norm only in part: its gain is not folded in",
    "modulated": "a scale and a shift computed from a condition stand behind the norm: no gain is folded in",
    "norm_not_folded": "an activation stands between the norm and the projections: its gain is not folded in",
    "tokens_mixed": "a convolution or pooling per channel, which commutes with the gain, stands between norm and layer",
}
"""Every flag with what it says, to follow the name of a layer."""

ATTRIBUTE_FLAGS: dict[str, str] = {
    "q_norm": "q_norm",
    "k_norm": "k_norm",
    "norm_q": "q_norm",
    "norm_k": "k_norm",
    "norm_v": "v_norm",
    "gate": "gate",
    "relative_position_bias_table": "rel_pos_bias",
    "rel_pos": "rel_pos_bias",
    "rel_pos_h": "rel_pos_bias",
    "attention_biases": "rel_pos_bias",
    "cpb_mlp": "rel_pos_bias",
    "meta_mlp": "rel_pos_bias",
    "logit_scale": "cosine",
    "proj_l": "talking_heads",
    "sr": "spatial_reduction",
    "q_pool": "q_pool",
    "pool_q": "q_pool",
    "pool_k": "kv_pool",
    "gating_param": "position_gate",
}
"""Attribute of an attention module -> what its presence adds, whatever the class."""


def layers_by_reason(reasons: Iterable[tuple[int, Iterable[str]]]) -> dict[str, list[int]]:
    """Return the layers each reason is true of, from the reasons of each layer; empty ones are left out."""
    layers_of: dict[str, list[int]] = {}
    for layer, texts in reasons:
        for text in filter(None, texts):
            layers_of.setdefault(text, []).append(layer)
    return layers_of


def in_words(by_reason: dict[str, list[int]], layers: int) -> str:
    """Join reasons into one sentence, each with how many of ``layers`` layers it is true of where not of all."""
    return "; ".join(
        why if len(where) == layers else f"{why} ({len(where)} of {layers} layers)" for why, where in by_reason.items()
    )
