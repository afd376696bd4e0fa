"""What an initialised product still means in a layer where more than the product acts."""

from __future__ import annotations

from collections.abc import Collection

from attnlens.layouts.flags import FLAGS
from attnlens.layouts.spec import AttentionSpec

_NORMALISED = (
    "{0} are normalised after their projection: a common factor of alpha and beta divides out, their ratio and the "
    "directions of the product stay"
)
_MEANING = {
    "q_norm": _NORMALISED.format("queries"),
    "k_norm": _NORMALISED.format("keys"),
    "cosine": "queries and keys are scaled to length one: only the directions of the QK product count, the learned "
    "temperature sets the size of the score",
    "rope": "queries and keys are rotated by position: the QK product is the score at zero distance",
}
_OV_FLAGS = (
    "v_norm",
    "act_on_v",
    "norm_before_proj",
    "act_before_proj",
    "gate",
    "norm_after",
    "passthrough",
    "local_values",
)
_QK_FLAGS = (
    "q_norm",
    "k_norm",
    "cosine",
    "rope",
    "rope_unknown",
    "rel_pos_bias",
    "position_gate",
    "talking_heads",
    "differential",
    "act_on_qk",
    "softmax_on_k",
    "conv_on_q",
    "q_pool",
    "kv_pool",
    "spatial_reduction",
    "cascaded",
)


def whole_layer_reason(spec: AttentionSpec) -> str:
    """Say why a layer is not initialised at all; empty where it is."""
    refusal = spec.opt_in_refusal()
    if refusal is not None:
        return refusal.reason.split(". Pass")[0]
    if "latent_query" in spec.leaves_out:
        return "has a learned latent as query, not tokens: its product has no diagonal that means anything"
    return ""


def layer_notes(spec: AttentionSpec, roles: Collection[str]) -> tuple[str, ...]:
    """Say what acts beside the products that were initialised."""
    about = [flag for flag in _QK_FLAGS if "q" in roles] + [flag for flag in _OV_FLAGS if "v" in roles]
    notes = [_MEANING.get(flag, FLAGS.get(flag, flag)) for flag in about if flag in spec.leaves_out]
    slots = spec.slots()
    if any(role in roles and slots[role].batch_norm for role in slots):
        notes.append(
            "a BatchNorm stands behind a projection: its running statistics are folded in, and in training, where it "
            "normalises by the batch, the size of the product divides out"
        )
    return tuple(dict.fromkeys(notes))
