"""What training needs of a data set: its description, and one epoch on the device, equal for every arm of a seed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from attnlens.errors import UsageError

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


@dataclass(frozen=True)
class Dataset(ABC):
    """A data set in memory; ``chosen`` are the choices that were made for it, by option."""

    name: str
    """As reports call it."""
    kind: ClassVar[str]
    """What networks that fit it read: ``images`` or ``text``."""
    holds: ClassVar[str]
    """The same as a verb and its object."""
    foreign: ClassVar[Mapping[str, str]]
    """Options that do not go with it, each with what it is about."""
    default_model: ClassVar[str | None] = None
    """What is trained where no model is named; None is the shipped ViT."""

    @property
    def preset(self) -> str:
        """Name of the defaults a data set of its sort is trained with."""
        return self.kind

    @abstractmethod
    def sha256(self) -> str:
        """Return the hash of all that is trained and tested on."""

    def whole(self) -> str:
        """Return the hash of the data set before anything of it was left out."""
        return self.sha256()

    def only(self, classes: str | Sequence[str]) -> Dataset:
        """Keep some classes. Raises `UsageError`, always where there are none."""
        raise UsageError(f"--classes {classes} is about images, and {self.name} {self.holds}: leave it out")

    @abstractmethod
    def sizes(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """Return the sizes of a network that depend on the data."""

    @abstractmethod
    def kept(self, chosen: Mapping[str, Any]) -> Dataset:
        """Keep what is trained and tested on. Raises `UsageError` where there is less."""

    @abstractmethod
    def counts(self, chosen: Mapping[str, Any]) -> tuple[int, int]:
        """Return the items of an epoch and the items tested on."""

    @abstractmethod
    def tuning(self) -> Dataset:
        """Split the training data in two: what learning rates are tried on, and what they are chosen on."""

    @abstractmethod
    def resident(self, config: Config, device: torch.device) -> Resident:
        """Put it on the device."""

    def moments(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation by channel, empty where nothing is normalised."""
        return [], []

    def class_names(self) -> list[str]:
        """Return the names of the classes, empty where there are none."""
        return []

    def text_facts(self) -> dict[str, Any] | None:
        """Return what a configuration says about a text; None for images."""
        return None


def hash_of(*arrays: NDArray[Any], start: str = "") -> str:
    """Return the SHA-256 of the shapes and values of some arrays, after the words of ``start``."""
    hashed = hashlib.sha256(start.encode())
    for array in arrays:
        hashed.update(repr(array.shape).encode())
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()
