"""ConvMixer: timm's module at the sizes of a preset or of one of timm's own entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from attnlens.errors import ModelNotFoundError
from attnlens.training.networks.base import FilterNetwork, register

if TYPE_CHECKING:
    from torch import nn

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "convmixer-tiny": {"dim": 64, "depth": 6, "kernel_size": 5, "activation": "gelu"},
    "convmixer-tiny-7": {"dim": 64, "depth": 6, "kernel_size": 7, "activation": "gelu"},
}
"""Sizes by name, beside timm's own entries."""


@register
class ConvMixer(FilterNetwork):
    """Sizes of a ConvMixer: ``dim`` channels, ``depth`` pairs of a depthwise and a pointwise convolution.

    BatchNorm's running mean and variance are buffers of each model, updated by its own training batches with torch's
    momentum of .1; evaluation reads them and never a test batch.
    """

    prefix: ClassVar[str] = "convmixer"
    module: ClassVar[str] = "timm.models.convmixer.ConvMixer"
    classifier: ClassVar[str] = "head"

    dim: int = Field(ge=2)
    depth: int = Field(ge=1)
    kernel_size: int = Field(ge=1)
    activation: Literal["gelu", "relu"] = "gelu"

    @classmethod
    def sizes_of(cls, name: str) -> dict[str, Any]:
        """Return the sizes of a preset or of timm's entry. Raises `ModelNotFoundError`."""
        if name in PRESETS:
            return dict(PRESETS[name])
        import timm
        import torch

        if not timm.is_model(name):
            known = [*PRESETS, *timm.list_models(f"{cls.prefix}_*")]
            raise ModelNotFoundError(f"no ConvMixer is named {name!r}: choose from {', '.join(known)}")
        with torch.device("meta"):
            model = timm.create_model(name)
        return {
            "dim": model.num_features,
            "depth": len(model.blocks),
            "kernel_size": model.blocks[0][0].fn[0].kernel_size[0],
            "activation": type(model.stem[1]).__name__.lower(),
        }

    def draw(self) -> nn.Module:
        """Build timm's ConvMixer as timm and torch draw it."""
        from timm.models.convmixer import ConvMixer as Module
        from torch import nn

        return Module(
            dim=self.dim,
            depth=self.depth,
            kernel_size=self.kernel_size,
            patch_size=self.patch_size,
            in_chans=self.channels,
            num_classes=self.classes,
            act_layer={"gelu": nn.GELU, "relu": nn.ReLU}[self.activation],
        )

    def describe(self) -> str:
        """Say what the network is."""
        return (
            f"ConvMixer (timm), width {self.dim}, depth {self.depth}, depthwise filters {self.kernel_size} x "
            f"{self.kernel_size}, patch {self.patch_size} of {self.image_size} px, {self.activation.upper()}, "
            "BatchNorm with running statistics of each model's own"
        )
