"""Family A, the standard of timm: one `qkv` with rows ``[q | k | v][head][unit]``, and an output projection."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attnlens.layouts.builders import blocks, columns, out_features
from attnlens.layouts.registry import Slots, has, rule
from attnlens.layouts.spec import Slot


def fused_qkv(module: Any, heads: int, width: int) -> dict[str, Slot]:
    """Describe `qkv` with rows ``[q | k | v][head][unit]``; biases inside it, or apart with an implicit zero for k."""
    slots = dict(zip("qkv", blocks(module, "qkv", heads, width, width, width), strict=True))
    for role in "qv":
        if slots[role].bias is None and has(module, f"{role}_bias"):
            slots[role] = replace(slots[role], bias=f"{role}_bias")
    return slots


@rule(
    "A",
    "timm.layers.attention.Attention",
    "timm.layers.attention.AttentionRope",
    "timm.models.eva.EvaAttention",
    flags={"norm": "norm_before_proj"},
)
@rule("A", "timm.models.hiera.MaskUnitAttention", flags={"q_stride": "q_pool"})
@rule("A", "timm.models.mvitv2.MultiScaleAttention", flags={"residual_pooling": "query_added"})
@rule("A", "timm.models.vision_transformer_sam.Attention", flags={"rope": "rope"})
@rule(
    "A",
    "timm.models.beit.Attention",
    "timm.models.cait.TalkingHeadAttn",
    "timm.models.convit.MHSA",
    "timm.models.davit.WindowAttention",
    "timm.models.fastvit.Attention",
    "timm.models.hieradet_sam2.MultiScaleAttention",
    "timm.models.metaformer.Attention",
    "timm.models.swin_transformer.WindowAttention",
    "timm.models.swin_transformer_v2.WindowAttention",
    "timm.models.swin_transformer_v2_cr.WindowMultiHeadAttention",
    "timm.models.twins.LocallyGroupedAttn",
    "timm.models.vision_transformer_relpos.RelPosAttention",
    "timm.models.volo.Attention",
)
def standard(module: Any) -> Slots | None:
    """Describe `qkv` + `proj`."""
    if not has(module, "qkv"):
        return None
    heads = int(module.heads if has(module, "heads") else module.num_heads)
    width = out_features(module, "qkv") // (3 * heads)
    return {**fused_qkv(module, heads, width), "o": columns(module, "proj", heads, width)}


@rule("A", "timm.models.maxxvit.AttentionCl")
def fused_last(module: Any) -> Slots | None:
    """Describe `qkv` + `proj` of a class that takes two forms: this one where ``head_first`` is off."""
    return None if module.head_first else standard(module)


@rule(
    "C10",
    "timm.models.gcvit.WindowAttentionGlobal",
    refusal="is a GCViT global block (family C10): its queries come from a feature generator, so there is no W_Q",
)
def gcvit_global(module: Any) -> Slots | None:
    """Refuse a global window block: its child named `qkv` holds k and v alone."""
    return {} if module.use_global else None


@rule("A", "timm.models.gcvit.WindowAttentionGlobal")
def gcvit_local(module: Any) -> Slots | None:
    """Describe a local window block."""
    return standard(module)


@rule("A-nest", "timm.models.nest.Attention")
def nest(module: Any) -> Slots:
    """Describe the standard with interleaved output columns: ``W_O[h] = proj.weight[:, h::num_heads].T``."""
    heads = int(module.num_heads)
    width = out_features(module, "qkv") // (3 * heads)
    return {**fused_qkv(module, heads, width), "o": columns(module, "proj", heads, width, interleaved=True)}
