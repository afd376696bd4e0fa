"""What a network is to a comparison: sizes, how it is built, run as a stack, described, and what it is compared by.

A stack holds weights of several networks of one architecture, each tensor with a leading axis of models. Any module is
run as a stack through `torch.func.functional_call` (one model) and `torch.vmap` over stacked weights (several).
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from attnlens.errors import ModelNotFoundError, UnsupportedAttentionError, UsageError
from attnlens.training.ladder import ATTENTION, FILTERS, Rung
from attnlens.training.metrics import ACCURACY, Metric

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from attnlens.fit.params import InitParams
    from attnlens.models.opened import OpenedModel

DRAWING = RLock()
"""Held while a network draws from torch's global generator, which all threads share."""
Weights = Mapping[str, "Tensor"]
Read = Callable[["Tensor"], "Tensor"]


class Part(BaseModel):
    """A frozen piece of a configuration that knows its own fields and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Wiring(NamedTuple):
    """What `attnlens.signal.rewire_` is told about an arm's network."""

    attention: str = "keep"
    skips: bool = True
    norms: bool = True

    def describe(self) -> str:
        """Write it in words; empty for the network as it is built."""
        parts = [] if self.attention == "keep" else [f"{self.attention} attention"]
        parts += [f"no {what}" for what, on in (("skips", self.skips), ("norms", self.norms)) if not on]
        return ", ".join(parts)


PLAIN = Wiring()


class Moments(NamedTuple):
    """Mean and standard deviation of every channel of the training images, in 0..1; empty lists for a text."""

    mean: list[float]
    std: list[float]


class Forward(Protocol):
    """The forward pass of a stack: ``inputs [set, item, ...]`` as the data holds them, ``where [model]`` its set.

    Returns logits ``[model, item, ..., class]``. Buffers that a network updates while it trains (BatchNorm's running
    statistics) are updated in ``weights``, each model's from its own batches.
    """

    def __call__(self, weights: Weights, inputs: Tensor, where: Tensor, *, training: bool) -> Tensor:
        """Return the logits."""
        ...


class Network(Part):
    """One kind of network; its fields are the sizes, and no two kinds have the same names of sizes.

    A kind is one file in this folder: a subclass under `register`. The class variables say what a comparison of such
    networks reads, trains and tells.
    """

    prefix: ClassVar[str]
    """What ``--model`` begins with; empty for the kind that takes its sizes from a pre-trained model."""
    module: ClassVar[str]
    """The class that is built, by its full name or timm's."""
    reads: ClassVar[str]
    """The kind of data: `Dataset.kind`."""
    needs: ClassVar[str]
    """What it reads and what to name instead, after "reads"."""
    items: ClassVar[str]
    """What a batch is made of."""
    metric: ClassVar[Metric]
    """What its runs are compared by."""
    default_arms: ClassVar[tuple[str, ...]]
    limits: ClassVar[str]
    """What its scores cannot be compared with, for the report."""
    classifier: ClassVar[str] = ""
    """The module that depends on the data's classes; empty where none does."""
    transfer: ClassVar[str] = "transfer-attention"
    """The initialiser that takes from a source's weights."""
    parts: ClassVar[Mapping[str, str]] = {
        "scale": "norms",
        "spectrum": "spectra",
        "permuted": "layers",
        "pretrained-attention": "weights",
    }
    """What it keeps, by arm."""
    ladder: ClassVar[tuple[Rung, ...]] = ATTENTION
    """What ``--arms ladder`` stands for."""
    control_keeps: ClassVar[str] = "same singular values, random directions: what the structure adds to the scale"

    @classmethod
    def sizes_of(cls, name: str) -> dict[str, Any]:
        """Return the sizes behind a ``--model`` name. Raises `ModelNotFoundError`, always for a kind without names."""
        raise ModelNotFoundError(f"{name!r} names no sizes of a {cls.__name__}: give a pre-trained --model")

    @abstractmethod
    def draw(self) -> nn.Module:
        """Build the module, its default initialisation drawn from torch's global generator."""

    @abstractmethod
    def reader(self, moments: Moments, device: torch.device) -> Read:
        """Return what turns inputs as the data holds them into what the module takes, over any leading axes."""

    @abstractmethod
    def example(self, items: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random inputs ``[item, ...]`` and targets, of the kind the data has."""

    @abstractmethod
    def describe(self) -> str:
        """Say what the network is, for a report."""

    def check(self, dataset: str) -> None:
        """Refuse sizes that do not go together. Raises `UsageError`."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many classes it tells apart."""

    @property
    def targets_per_item(self) -> int:
        """How many targets an item has."""
        return 1

    def build(self, seed: int, wiring: Wiring = PLAIN) -> nn.Module:
        """Return the module drawn under ``seed``, and rewired; torch's global generators are put back.

        Raises what `attnlens.signal.rewire_` raises.
        """
        from attnlens.inits.apply import seeded

        with DRAWING, seeded(seed):
            model = self.draw()
        if wiring != PLAIN:
            from attnlens.signal import rewire_

            rewire_(model, wiring.attention, skips=wiring.skips, norms=wiring.norms, seed=seed)
        return model

    def forward(
        self,
        module: nn.Module,
        wiring: Wiring,  # noqa: ARG002  # for kinds with a pass of their own for the plain network
        moments: Moments,
        models: int,
        device: torch.device,
    ) -> Forward:
        """Return the forward pass of a stack of networks like ``module``: the module's own."""
        return ModuleForward.of(module, models, device, self.reader(moments, device))

    def exported(self) -> dict[str, str]:
        """Return what a file of its weights says about the network."""
        return {"network": self.module, "sizes": json.dumps(self.model_dump())}

    @classmethod
    def fitted(cls, params: InitParams | None, **options: Any) -> tuple[str, dict[str, Any]]:
        """Return the initialiser, with its options, that draws what was fitted."""
        return "fitted", {"params": params, **options}

    def pretrained(self, opened: OpenedModel, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a source's weights as this network, whose state is ``like``, holds them, but for its classifier.

        Raises `UnsupportedAttentionError` where they do not fit.
        """
        import torch

        weights = {}
        for name, value in like.items():
            counter = not value.is_floating_point()  # of batches BatchNorm has seen: a new training counts its own
            if counter or (self.classifier and name.startswith(f"{self.classifier}.")):
                continue
            stored = torch.as_tensor(opened.checkpoint[name]).detach().to("cpu", value.dtype, copy=True)
            if stored.shape != value.shape:
                raise UnsupportedAttentionError(
                    f"{opened.name}: {name} is {tuple(stored.shape)}, the network's {tuple(value.shape)}: train a "
                    "source with the same --patch-size, --image-size and --context, or leave the arm pretrained out"
                )
            weights[name] = stored
        return weights

    @classmethod
    def control(cls, params: InitParams | None) -> dict[str, Any]:
        """Return the options of `norm-matched`: whose scale the control keeps."""
        return {"of": "mimetic"} if params is None else {"of": "fitted", "params": params}


KNOWN: list[type[Network]] = []
Kind = TypeVar("Kind", bound=type[Network])


def register(kind: Kind) -> Kind:
    """Make a kind of network known to `attnlens.training.networks.registry`."""
    KNOWN.append(kind)
    return kind


class ImageNetwork(Network):
    """A kind that tells square images apart by classes."""

    reads: ClassVar[str] = "images"
    needs: ClassVar[str] = "images: name another --dataset"
    items: ClassVar[str] = "images"
    metric: ClassVar[Metric] = ACCURACY
    limits: ClassVar[str] = "Accuracies on these images, decoded as hashed above, stand beside no published number."

    image_size: int = Field(ge=1)
    patch_size: int = Field(ge=1)
    channels: int = Field(ge=1)
    classes: int = Field(ge=2)

    @property
    def outputs(self) -> int:
        """See `Network`."""
        return self.classes

    def check(self, dataset: str) -> None:
        """Refuse patches that do not fill the images. Raises `UsageError`."""
        if self.image_size % self.patch_size:
            raise UsageError(
                f"--patch-size {self.patch_size} does not divide the images of {dataset}, {self.image_size} pixels wide"
            )

    def reader(self, moments: Moments, device: torch.device) -> Read:
        """Return what normalises uint8 images."""
        import torch

        mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in moments)
        return lambda images: (images.to(mean.dtype) * (1 / 255) - mean) / std

    def example(self, items: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random uint8 images ``[item, channel, y, x]`` and labels."""
        import torch

        size = (items, self.channels, self.image_size, self.image_size)
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        return images, torch.randint(0, self.classes, (items,), generator=generator)


class FilterNetwork(ImageNetwork):
    """A kind whose depthwise filters are what its arms draw."""

    default_arms: ClassVar[tuple[str, ...]] = ("default", "conv-covariance", "norm-matched")
    transfer: ClassVar[str] = "transfer-filters"
    parts: ClassVar[Mapping[str, str]] = {"scale": "norms", "permuted": "layers", "pretrained-filters": "weights"}
    ladder: ClassVar[tuple[Rung, ...]] = FILTERS
    control_keeps: ClassVar[str] = "same norm of every filter, random directions: what the covariance adds to the scale"

    @classmethod
    def fitted(cls, params: InitParams | None, **options: Any) -> tuple[str, dict[str, Any]]:  # noqa: ARG003  # no gains
        """Return the initialiser that draws filters with the fitted covariance."""
        return "conv-covariance", {"params": params}

    @classmethod
    def control(cls, params: InitParams | None) -> dict[str, Any]:  # noqa: ARG003  # the covariance alone has a scale
        """Return the options of `norm-matched`: every filter's norm is kept."""
        return {"of": "conv-covariance"}


@dataclass(frozen=True)
class ModuleForward:
    """Any module as a stack: its own forward pass under each model's weights and buffers.

    ``training`` and ``evaluating`` are two copies of the module, so that no mode is switched while it runs. ``read``
    turns what the data holds into what the module takes.
    """

    training: nn.Module
    evaluating: nn.Module
    models: int
    read: Read

    @classmethod
    def of(cls, module: nn.Module, models: int, device: torch.device, read: Read) -> ModuleForward:
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
            only = {name: value[0] for name, value in weights.items()}
            return functional_call(module, only, (items[0],))[None]

        def one(model: dict[str, Any], item: Tensor) -> Tensor:
            return functional_call(module, model, (item,))

        return vmap(one)(dict(weights), items)
