"""Family C1: one `qkv` Linear with rows ``[head][q | k | v]``. Same tensor names as family A, other rows."""

from __future__ import annotations

from typing import Any

from attnlens.layouts.builders import by_head, columns, out_features, rows
from attnlens.layouts.registry import Slots, rule


def packed_by_head(module: Any, key_width: int, value_width: int, o: str = "proj") -> Slots:
    """Describe `qkv` with rows ``[head][q | k | v][unit]`` and the output projection ``o``."""
    heads = int(module.num_heads)
    q, k, v = by_head(module, "qkv", heads, key_width, key_width, value_width)
    return {"q": q, "k": k, "v": v, "o": columns(module, o, heads, value_width)}


@rule("C1", "timm.models.maxxvit.AttentionCl")
def maxvit(module: Any) -> Slots | None:
    """Describe the form of this class whose rows go by head first."""
    width = out_features(module, "qkv") // (3 * int(module.num_heads))
    return packed_by_head(module, width, width) if module.head_first else None


@rule("C1", "timm.models.efficientformer.Attention", "timm.models.tiny_vit.Attention")
def own_value_width(module: Any) -> Slots:
    """Describe heads whose values are wider than their keys."""
    return packed_by_head(module, int(module.key_dim), int(module.val_dim))


@rule("C1", "timm.models.levit.Attention", leaves_out=("act_before_proj",))
def levit(module: Any) -> Slots | None:
    """Describe Linears with a BatchNorm behind them."""
    return None if module.use_conv else packed_by_head(module, int(module.key_dim), int(module.val_dim), "proj.ln")


@rule("C3", "timm.models.levit.Attention", leaves_out=("act_before_proj",))
def levit_convolution(module: Any) -> Slots | None:
    """Describe 1x1 convolutions with a BatchNorm behind them."""
    return packed_by_head(module, int(module.key_dim), int(module.val_dim), "proj.ln") if module.use_conv else None


def _levit_downsample(module: Any) -> Slots:
    heads, width, value_width = int(module.num_heads), int(module.key_dim), int(module.val_dim)
    k, v = by_head(module, "kv", heads, width, value_width)
    q = rows(module, "q.ln", heads, width)
    return {"q": q, "k": k, "v": v, "o": columns(module, "proj.ln", heads, value_width)}


@rule("B3", "timm.models.levit.AttentionDownsample", leaves_out=("act_before_proj", "q_pool"))
def levit_downsample(module: Any) -> Slots | None:
    """Describe `q` on a subsampled grid and `kv` with rows ``[head][k | v]``."""
    return None if module.use_conv else _levit_downsample(module)


@rule("C4", "timm.models.levit.AttentionDownsample", leaves_out=("act_before_proj", "q_pool"))
def levit_downsample_convolution(module: Any) -> Slots | None:
    """Describe the same as 1x1 convolutions."""
    return _levit_downsample(module) if module.use_conv else None
