"""GPT-2: packed q, k and v, every projection stored ``[in, out]``."""

from attnlens.foreign.stack import Config, Family, Stack

LAYER = "h.{layer}."


def scale(config: Config, layer: int, head_dim: int) -> float:
    """Return 1 / sqrt(head_dim), or 1, divided by layer + 1 where the configuration asks for it."""
    base = head_dim**-0.5 if config.get("scale_attn_weights", True) else 1.0
    return float(base / (layer + 1) if config.get("scale_attn_by_inverse_layer_idx") else base)


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    stacks=(
        Stack(
            path=LAYER + "attn",
            q=LAYER + "attn.c_attn.weight",
            k=LAYER + "attn.c_attn.weight",
            v=LAYER + "attn.c_attn.weight",
            o=LAYER + "attn.c_proj.weight",
            norm=LAYER + "ln_1.weight",
            stored_in_out=True,
            heads="n_head",
            depth="n_layer",
            width="n_embd",
            scale=scale,
            flags=("causal",),
        ),
    ),
)
