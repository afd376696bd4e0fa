"""ConvNeXt: one of timm's own entries, at another patch size and for other images and classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from attnlens.errors import ModelNotFoundError, UsageError
from attnlens.training.networks.base import FilterNetwork, register

if TYPE_CHECKING:
    from torch import nn


@register
class ConvNeXt(FilterNetwork):
    """A ConvNeXt by timm's name: depthwise filters, LayerNorm, stages that each halve the grid.

    Everything but patch, channels and classes is as the entry has it, and timm's rule of patches holds: at patch 2 the
    first stage halves too, so that the last one has the grid it has at patch 4. No statistics run beside the weights.
    """

    prefix: ClassVar[str] = "convnext"
    module: ClassVar[str] = "timm.models.convnext.ConvNeXt"
    classifier: ClassVar[str] = "head.fc"

    entry: str
    """timm's name."""

    @classmethod
    def sizes_of(cls, name: str) -> dict[str, Any]:
        """Return timm's name, which says all sizes. Raises `ModelNotFoundError`; `UsageError` where stems overlap."""
        import timm

        if not timm.is_model(name):
            known = ", ".join(timm.list_models(f"{cls.prefix}*"))
            raise ModelNotFoundError(f"no ConvNeXt is named {name!r}: choose from {known}")
        stem = _skeleton(name).stem[0]
        if stem.kernel_size != stem.stride:
            raise UsageError(f"--model {name} has no patches: its stem overlaps. Name an entry without ols")
        return {"entry": name}

    def check(self, dataset: str) -> None:
        """Refuse patches that do not fill the images, and grids that cannot be halved. Raises `UsageError`."""
        super().check(dataset)
        grid, stages = self.image_size // self.patch_size, _skeleton(self.entry, patch_size=self.patch_size).stages
        halvings = sum(_halves(stage) for stage in stages)
        if grid % 2**halvings:
            raise UsageError(
                f"--patch-size {self.patch_size} makes a grid of {grid} x {grid} of {dataset}, and {self.entry} halves "
                f"it {halvings} times: choose --patch-size and --image-size for a multiple of {2**halvings}"
            )

    def draw(self) -> nn.Module:
        """Build timm's ConvNeXt as timm draws it."""
        import timm

        sizes = {"patch_size": self.patch_size, "in_chans": self.channels, "num_classes": self.classes}
        mean = "fastavg"  # timm's pooling by a plain mean: the usual one has no rule for batches of models
        module: nn.Module = timm.create_model(self.entry, global_pool=mean, **sizes)
        return module

    def describe(self) -> str:
        """Say what the network is."""
        stages = _skeleton(self.entry).stages
        first = stages[0].blocks[0]
        rows, columns = first.conv_dw.kernel_size
        widths = ", ".join(str(stage.blocks[0].conv_dw.in_channels) for stage in stages)
        blocks = ", ".join(str(len(stage.blocks)) for stage in stages)
        return (
            f"ConvNeXt (timm's {self.entry}), widths {widths}, blocks {blocks}, depthwise filters {rows} x {columns}, "
            f"{type(first.norm).__name__}, patch {self.patch_size} of {self.image_size} px"
        )


def _halves(stage: Any) -> bool:
    """Whether a stage begins with a convolution of stride 2."""
    return any(getattr(part, "stride", (1, 1)) == (2, 2) for part in stage.downsample.modules())


def _skeleton(name: str, **sizes: int) -> Any:
    """Return timm's entry without weights."""
    import timm
    import torch

    with torch.device("meta"):
        return timm.create_model(name, **sizes)
