"""Sizes of the networks a comparison trains, one class a family; what else a family is stands in `families`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Part(BaseModel):
    """A frozen piece of a configuration that knows its own fields and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Shape(Part):
    """Sizes of a plain ViT."""

    image_size: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    channels: int = Field(ge=1)
    classes: int = Field(ge=2)
    embed_dim: int = Field(ge=4)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    mlp_ratio: float = Field(gt=0)

    @property
    def tokens(self) -> int:
        """Number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def training_flops(self) -> float:
        """Return the floating-point operations of one training image, forward and backward, matrix products only.

        ``depth T (3 (8 + 4 r) d^2 + 14 T d)``: linear layers three times, attention 3.5 times its forward pass, as a
        fused backward pass forms the scores again; r is the MLP's ratio, T the number of tokens.
        """
        d, linear = self.embed_dim, 3 * (8 + 4 * self.mlp_ratio)
        return self.depth * self.tokens * (linear * d**2 + 14 * self.tokens * d)

    @property
    def training_bytes(self) -> float:
        """Return the bytes of memory traffic of one training image in bfloat16, derived and not measured.

        106 reads or writes of a token's d channels in each layer: what lies behind the byte bound of 24,000 images/s
        at 3.0 TB/s for width 192, depth 12 and 256 tokens, when nothing but element-wise chains is fused.
        """
        return 106 * 2 * self.depth * self.tokens * self.embed_dim


class ConvMixerShape(Part):
    """Sizes of a ConvMixer: ``dim`` channels, ``depth`` pairs of a depthwise and a pointwise convolution."""

    image_size: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    channels: int = Field(ge=1)
    classes: int = Field(ge=2)
    dim: int = Field(ge=2)
    depth: int = Field(ge=1)
    kernel_size: int = Field(ge=1)
    activation: Literal["gelu", "relu"] = "gelu"


class GptShape(Part):
    """Sizes of a causal transformer over bytes that reads windows of ``context`` bytes."""

    context: int = Field(ge=2)
    embed_dim: int = Field(ge=4)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)


AnyShape = Shape | ConvMixerShape | GptShape
