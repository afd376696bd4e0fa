"""Attention classes of timm that are not read, each with the reason a user is told."""

from attnlens.layouts.registry import refuse

_NO_PAIRS = "has no pairwise q k^T (family C7): "

refuse(
    "C7",
    _NO_PAIRS + "its queries are one number per token, a softmax over them weighs the keys into one vector",
    "timm.models.mobilevit.LinearSelfAttention",
)
refuse(
    "C7",
    _NO_PAIRS + "its queries are summed into one vector that multiplies every key",
    "timm.models.swiftformer.EfficientAdditiveAttention",
)
refuse(
    "C7",
    _NO_PAIRS + "a Linear on the central token gives the weights of its neighbours, there are neither queries nor keys",
    "timm.models.volo.OutlookAttention",
)
refuse(
    "C7",
    "has queries, keys and values of width one (family C7): a product of numbers, with no matrix to look into",
    "timm.models.csatv2.SpatialTransformerBlock",
)
refuse(
    "C4",
    "stores its projections as three-dimensional parameters, which no layout here describes",
    "timm.layers.attention2d.MultiQueryAttentionV2",
)
refuse(
    "P",
    "pools without any weights (family P): its queries, keys and values are the tokens themselves",
    "timm.layers.attention_pool.AttentionPoolPrr",
)
