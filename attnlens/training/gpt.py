"""The causal transformer over bytes as a family."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnlens.training.families import Forward, ModuleForward, Wiring
from attnlens.training.network import DRAWING
from attnlens.training.shapes import GptShape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from attnlens.gpt import GPT
    from attnlens.training.config import Config

PREFIX = "gpt-"
BYTES = 256


def sizes_of(name: str) -> dict[str, int]:
    """Return the sizes behind a preset's name. Raises `ModelNotFoundError`."""
    from attnlens.errors import ModelNotFoundError
    from attnlens.gpt import PRESETS

    if name not in PRESETS:
        raise ModelNotFoundError(f"no language model is named {name!r}: choose from {', '.join(PRESETS)}")
    return {size: value for size, value in PRESETS[name].items() if size != "vocab_size"}


@dataclass(frozen=True)
class GptFamily:
    """See `attnlens.training.families.Family`."""

    shape: GptShape

    def build(self, seed: int) -> GPT:
        """Build the network as GPT-2's rule draws it."""
        from attnlens.gpt import GPT
        from attnlens.inits.apply import seeded

        with DRAWING, seeded(seed):
            return GPT(vocab_size=BYTES, **self.shape.model_dump())

    def forward(self, module: nn.Module, wiring: Wiring, config: Config, models: int, device: torch.device) -> Forward:  # noqa: ARG002
        """Run the module's own forward pass, rewired or not."""
        return ModuleForward.of(module, models, device, lambda windows: windows.long())

    def example(self, items: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random windows and the bytes behind each of their bytes."""
        import torch

        windows = torch.randint(0, BYTES, (items, self.shape.context + 1), dtype=torch.uint8, generator=generator)
        return windows[:, :-1], windows[:, 1:]

    def describe(self) -> str:
        """Say what the network is."""
        shape = self.shape
        return (
            f"causal transformer over bytes, width {shape.embed_dim}, depth {shape.depth}, {shape.num_heads} heads, "
            f"windows of {shape.context} bytes, learned positions"
        )

    def exported(self) -> dict[str, str]:
        """Return class and sizes."""
        return {"network": "attnlens.gpt.GPT", "sizes": json.dumps(self.shape.model_dump())}
