"""The families of networks a comparison trains: how each is built, run as a stack, and described.

A stack holds weights of several networks of one architecture, each tensor with a leading axis of models. Any module is
run as a stack through `torch.func.functional_call` (one model) and `torch.vmap` over stacked weights (several); the
plain ViT has a batched forward pass of its own (`network`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from attnlens.training.shapes import AnyShape, ConvMixerShape, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from attnlens.training.config import Config

Weights = Mapping[str, "Tensor"]


class Wiring(NamedTuple):
    """What `attnlens.signal.rewire_` is told about an arm's network."""

    attention: str = "keep"
    skips: bool = True
    norms: bool = True

    def describe(self) -> str:
        """Write it in words; empty for the network as its family builds it."""
        parts = [] if self.attention == "keep" else [f"{self.attention} attention"]
        parts += [f"no {what}" for what, on in (("skips", self.skips), ("norms", self.norms)) if not on]
        return ", ".join(parts)


PLAIN = Wiring()


class Forward(Protocol):
    """The forward pass of a stack: ``inputs [set, item, ...]`` as the data holds them, ``where [model]`` its set.

    Returns logits ``[model, item, ..., class]``. Buffers that a network updates while it trains (BatchNorm's running
    statistics) are updated in ``weights``, each model's from its own batches.
    """

    def __call__(self, weights: Weights, inputs: Tensor, where: Tensor, *, training: bool) -> Tensor:
        """Return the logits."""
        ...


class Family(Protocol):
    """One kind of network at given sizes."""

    def build(self, seed: int) -> nn.Module:
        """Build the network, its default initialisation drawn under ``seed``; global generators are put back."""
        ...

    def forward(self, module: nn.Module, wiring: Wiring, config: Config, models: int, device: torch.device) -> Forward:
        """Return the forward pass of a stack of networks like ``module``."""
        ...

    def example(self, items: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random inputs ``[item, ...]`` and targets, of the kind the data has."""
        ...

    def describe(self) -> str:
        """Say what the network is, for a report."""
        ...

    def exported(self) -> dict[str, str]:
        """Return what a file of its weights says about the network."""
        ...


def family_of(shape: AnyShape) -> Family:
    """Return the family of some sizes."""
    from attnlens.training.convmixer import ConvMixerFamily
    from attnlens.training.gpt import GptFamily
    from attnlens.training.network import ViTFamily

    if isinstance(shape, Shape):
        return ViTFamily(shape)
    return ConvMixerFamily(shape) if isinstance(shape, ConvMixerShape) else GptFamily(shape)


def build(shape: AnyShape, seed: int, wiring: Wiring = PLAIN) -> nn.Module:
    """Build a network of a family and rewire it. Raises what `attnlens.signal.rewire_` raises."""
    model = family_of(shape).build(seed)
    if wiring != PLAIN:
        from attnlens.signal import rewire_

        rewire_(model, wiring.attention, skips=wiring.skips, norms=wiring.norms, seed=seed)
    return model


@dataclass(frozen=True)
class ModuleForward:
    """Any module as a stack: its own forward pass under each model's weights and buffers.

    ``training`` and ``evaluating`` are two copies of the module, so that no mode is switched while it runs. ``read``
    turns what the data holds into what the module takes.
    """

    training: nn.Module
    evaluating: nn.Module
    models: int
    read: Callable[[Tensor], Tensor]

    @classmethod
    def of(
        cls, module: nn.Module, models: int, device: torch.device, read: Callable[[Tensor], Tensor]
    ) -> ModuleForward:
        """Copy the module to the device, once for either mode.

        torch's fused attention has no rule for batches of models; on a CPU scores are formed too, as in the plain ViT.
        """
        import copy

        training = copy.deepcopy(module).to(device).train()
        parts: Any = training.modules()
        for part in parts:
            if hasattr(part, "fused_attn"):
                part.fused_attn = models == 1 and device.type != "cpu"
        return cls(training, copy.deepcopy(training).eval(), models, read)

    def __call__(self, weights: Weights, inputs: Tensor, where: Tensor, *, training: bool) -> Tensor:
        """See `Forward`."""
        from torch import vmap
        from torch.func import functional_call

        module = self.training if training else self.evaluating
        items = self.read(inputs)[where]
        if self.models == 1:
            own = {name: value[0] for name, value in weights.items()}
            return functional_call(module, own, (items[0],))[None]

        def one(own: dict[str, Any], item: Tensor) -> Tensor:
            return functional_call(module, own, (item,))

        return vmap(one)(dict(weights), items)


def image_reader(config: Config, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return what turns uint8 images into normalised ones, over any leading axes."""
    import torch

    mean = torch.tensor(config.mean, device=device).view(-1, 1, 1)
    std = torch.tensor(config.std, device=device).view(-1, 1, 1)
    return lambda images: (images.to(mean.dtype) * (1 / 255) - mean) / std


def random_images(shape: Shape | ConvMixerShape, items: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return random uint8 images ``[item, channel, y, x]`` and labels."""
    import torch

    size = (items, shape.channels, shape.image_size, shape.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, shape.classes, (items,), generator=generator)
