"""What training needs of a data set: its description, and one epoch on the device, equal for every arm of a seed."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from numpy.typing import NDArray

from attnlens.errors import UsageError
from attnlens.training.data.rows import Picked, blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnlens.training.config import Config


class Chunked:
    """Items ``[item, ...]`` that are made when they are needed, ``chunk`` at a time: they need not fit in memory."""

    def __init__(self, count: int, chunk: int, make: Callable[[int, int], Tensor]) -> None:
        self.count, self.chunk, self.make = count, chunk, make
        self._first = -1
        self._held: Tensor | None = None

    def part(self, start: int, stop: int) -> Tensor:
        """Return items from ``start`` to before ``stop``; the last chunk is kept for the next call."""
        import torch

        pieces: list[Tensor] = []
        while start < stop:
            first = start // self.chunk * self.chunk
            end = min(first + self.chunk, self.count)
            if first != self._first or self._held is None:
                self._held = None  # not two chunks at once
                self._first, self._held = first, self.make(first, end)
            pieces.append(self._held[start - first : stop - first])
            start = end
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __getitem__(self, index: tuple[None, slice]) -> Tensor:
        """Return ``[1, item, ...]`` for ``[None, start:stop]``, as a tensor does; nothing is kept."""
        start, stop, _ = index[1].indices(self.count)
        return self.make(start, stop)[None]


@dataclass(frozen=True)
class SideBySide:
    """Several sets of items ``[set, item, ...]``, of which a part is made at a time."""

    sets: Sequence[Chunked]

    def __getitem__(self, index: Any) -> Tensor:
        """Return what a tensor does for ``[:, start:stop]``."""
        import torch

        start, stop, _ = index[1].indices(self.sets[0].count)
        return torch.stack([one.part(start, stop) for one in self.sets])


def side_by_side(sets: Sequence[Tensor | Chunked]) -> Tensor | SideBySide:
    """Stack sets of equally many items, without making them where they are made in chunks."""
    import torch

    chunked = [one for one in sets if isinstance(one, Chunked)]
    return SideBySide(chunked) if chunked else torch.stack([one for one in sets if isinstance(one, torch.Tensor)])


class Epoch(NamedTuple):
    """Inputs and targets ``[item, ...]`` in their order of use, and the hash of what was drawn for them."""

    inputs: Tensor | Chunked
    targets: Tensor
    stream: str


class Resident(Protocol):
    """A data set on the device."""

    count: int
    """Items an epoch draws from, or draws."""
    whole: float
    """Items that make one pass through the training data."""
    test_inputs: Any
    """A tensor, or `Chunked`."""
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

    def commonest(self) -> float | None:
        """Return the share of the commonest class in what is tested on, None where classes are about even."""
        return None

    def unused(self) -> dict[str, int]:
        """Return how many items are not used, by reason."""
        return {}

    def text_facts(self) -> dict[str, Any] | None:
        """Return what a configuration says about a text; None for images."""
        return None


def hash_of(*arrays: NDArray[Any] | Picked, start: str = "") -> str:
    """Return the SHA-256 of the shapes and values of some arrays, after the words of ``start``."""
    hashed = hashlib.sha256(start.encode())
    for array in arrays:
        hashed.update(repr(tuple(array.shape)).encode())
        for block in blocks(array):
            hashed.update(block.data)
    return hashed.hexdigest()
