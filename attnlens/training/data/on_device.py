"""What training asks of a data set: what it is, and one epoch of it on the device, the same for every arm of a seed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnlens.training.config import Config


class Epoch(NamedTuple):
    """Inputs and targets ``[item, ...]`` in their order of use, and the hash of what was drawn for them."""

    inputs: Tensor
    targets: Tensor
    stream: str


class Resident(Protocol):
    """A data set on the device."""

    count: int
    """Items an epoch draws from, or draws."""
    whole: float
    """Items that make one pass through the training data."""
    test_inputs: Tensor
    test_targets: Tensor

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """Return an epoch of a data seed."""
        ...


class Dataset(Protocol):
    """A data set in memory, as `attnlens.training.options` and the comparison need it."""

    @property
    def name(self) -> str:
        """Name, as reports call it."""
        ...

    @property
    def kind(self) -> str:
        """What networks that fit it read: ``images`` or ``text``."""
        ...

    @property
    def preset(self) -> str:
        """Name of the defaults a data set of its sort is trained with."""
        ...

    @property
    def default_model(self) -> str | None:
        """What is trained where no model is named; None is the shipped ViT."""
        ...

    @property
    def foreign(self) -> Mapping[str, str]:
        """Options that do not go with it, each with the error that says so."""
        ...

    def sha256(self) -> str:
        """Return the hash of all that is trained and tested on."""
        ...

    def sizes(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sizes of a network that depend on the data, among the choices that were made."""
        ...

    def kept(self, chosen: Mapping[str, Any]) -> Dataset:
        """Keep what is trained and tested on. Raises `UsageError` where there is less."""
        ...

    def counts(self, chosen: Mapping[str, Any]) -> tuple[int, int]:
        """Return the items of an epoch and the items tested on."""
        ...

    def moments(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation by channel, empty where nothing is normalised."""
        ...

    def text_facts(self) -> dict[str, Any] | None:
        """Return what a configuration says about a text; None for images."""
        ...

    def tuning(self) -> Dataset:
        """Split the training data in two: what learning rates are tried on, and what they are chosen on."""
        ...

    def resident(self, config: Config, device: torch.device) -> Resident:
        """Put it on the device."""
        ...
