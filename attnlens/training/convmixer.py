"""ConvMixer as a family: timm's module at the sizes of a preset or of one of timm's own entries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnlens.errors import ModelNotFoundError
from attnlens.training.families import PLAIN, Forward, ModuleForward, Wiring, image_reader, random_images
from attnlens.training.network import DRAWING
from attnlens.training.shapes import ConvMixerShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from attnlens.training.config import Config

PREFIX = "convmixer"
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "convmixer-tiny": {"dim": 64, "depth": 6, "kernel_size": 5, "activation": "gelu"},
    "convmixer-tiny-7": {"dim": 64, "depth": 6, "kernel_size": 7, "activation": "gelu"},
}
"""Sizes by name, beside timm's own entries."""


def sizes_of(name: str) -> dict[str, Any]:
    """Return the sizes behind a preset's or timm's name. Raises `ModelNotFoundError`."""
    if name in PRESETS:
        return dict(PRESETS[name])
    import timm
    import torch

    if not timm.is_model(name):
        known = [*PRESETS, *timm.list_models(f"{PREFIX}_*")]
        raise ModelNotFoundError(f"no ConvMixer is named {name!r}: choose from {', '.join(known)}")
    with torch.device("meta"):
        model = timm.create_model(name)
    return {
        "dim": model.num_features,
        "depth": len(model.blocks),
        "kernel_size": model.blocks[0][0].fn[0].kernel_size[0],
        "activation": type(model.stem[1]).__name__.lower(),
    }


@dataclass(frozen=True)
class ConvMixerFamily:
    """See `attnlens.training.families.Family`.

    BatchNorm's running mean and variance are buffers of each model, updated by its own training batches with torch's
    momentum of .1; evaluation reads them and never a test batch.
    """

    shape: ConvMixerShape

    def build(self, seed: int) -> nn.Module:
        """Build timm's ConvMixer as timm and torch draw it."""
        from timm.models.convmixer import ConvMixer
        from torch import nn

        from attnlens.inits.apply import seeded

        shape = self.shape
        with DRAWING, seeded(seed):
            return ConvMixer(
                dim=shape.dim,
                depth=shape.depth,
                kernel_size=shape.kernel_size,
                patch_size=shape.patch_size,
                in_chans=shape.channels,
                num_classes=shape.classes,
                act_layer={"gelu": nn.GELU, "relu": nn.ReLU}[shape.activation],
            )

    def forward(self, module: nn.Module, wiring: Wiring, config: Config, models: int, device: torch.device) -> Forward:
        """Run timm's own forward pass."""
        assert wiring == PLAIN
        return ModuleForward.of(module, models, device, image_reader(config, device))

    def example(self, items: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random images and labels."""
        return random_images(self.shape, items, generator)

    def describe(self) -> str:
        """Say what the network is."""
        shape = self.shape
        return (
            f"ConvMixer (timm), width {shape.dim}, depth {shape.depth}, depthwise filters {shape.kernel_size} x "
            f"{shape.kernel_size}, patch {shape.patch_size} of {shape.image_size} px, {shape.activation.upper()}, "
            "BatchNorm with running statistics of each model's own"
        )

    def exported(self) -> dict[str, str]:
        """Return class and sizes: no name of timm's takes them."""
        return {"network": "timm.models.convmixer.ConvMixer", "sizes": json.dumps(self.shape.model_dump())}
