"""The causal transformer over bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from attnlens.errors import ModelNotFoundError
from attnlens.training.metrics import BITS_PER_BYTE, Metric
from attnlens.training.networks.base import Moments, Network, Read, register
from attnlens.words import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BYTES = 256


@register
class Gpt(Network):
    """Sizes of a causal transformer over bytes that reads windows of ``context`` bytes."""

    prefix: ClassVar[str] = "gpt-"
    module: ClassVar[str] = "attnlens.gpt.GPT"
    reads: ClassVar[str] = "text"
    needs: ClassVar[str] = "bytes: name a text, as in --dataset text:FILE"
    items: ClassVar[str] = "windows"
    metric: ClassVar[Metric] = BITS_PER_BYTE
    default_arms: ClassVar[tuple[str, ...]] = ("default", "mimetic", "mimetic-positive", "qk-only", "norm-matched")
    limits: ClassVar[str] = (
        "The first bytes of a window have next to no context: other windows give other bits per byte."
    )

    context: int = Field(ge=2)
    embed_dim: int = Field(ge=4)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    mlp_ratio: float = Field(default=4.0, gt=0)

    @classmethod
    def sizes_of(cls, name: str) -> dict[str, Any]:
        """Return the sizes of a preset. Raises `ModelNotFoundError`."""
        from attnlens.gpt import PRESETS

        if name not in PRESETS:
            raise ModelNotFoundError(f"no language model is named {name!r}: choose from {', '.join(PRESETS)}")
        return {size: value for size, value in PRESETS[name].items() if size != "vocab_size"}

    @property
    def outputs(self) -> int:
        """Every value of a byte."""
        return BYTES

    @property
    def targets_per_item(self) -> int:
        """Every byte of a window has one behind it."""
        return self.context

    def draw(self) -> nn.Module:
        """Build the network as GPT-2's rule draws it."""
        from attnlens.gpt import GPT

        return GPT(vocab_size=BYTES, **self.model_dump())

    def reader(self, moments: Moments, device: torch.device) -> Read:  # noqa: ARG002  # bytes are not normalised
        """Return what turns bytes into indices."""
        return lambda windows: windows.long()

    def example(self, items: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random windows and the bytes behind each of their bytes."""
        import torch

        windows = torch.randint(0, BYTES, (items, self.context + 1), dtype=torch.uint8, generator=generator)
        return windows[:, :-1], windows[:, 1:]

    def describe(self) -> str:
        """Say what the network is."""
        return (
            f"causal transformer over bytes, width {self.embed_dim}, depth {self.depth}, "
            f"{counted(self.num_heads, 'head')}, windows of {self.context} bytes, learned positions"
        )
