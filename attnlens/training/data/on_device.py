"""A data set on the device, and one epoch of it in the order that every arm of a seed sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from attnlens.training.data.augment import augmented, draw_epoch, fill_value
from attnlens.training.data.images import Images
from attnlens.training.data.order import digest, epoch_order, generator
from attnlens.training.data.text import Text
from attnlens.training.shapes import GptShape

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
    """What training asks of a data set."""

    count: int
    """Items an epoch draws from, or draws."""
    whole: float
    """Items that make one pass through the training data."""
    test: Tensor
    test_labels: Tensor

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """Return an epoch of a data seed."""
        ...


def resident(data: Images | Text, config: Config, device: torch.device) -> Resident:
    """Put a data set on the device."""
    return ResidentImages(data, config, device) if isinstance(data, Images) else ResidentText(data, config, device)


class ResidentImages:
    """Images as uint8; an epoch is a permutation of them, augmented at once."""

    def __init__(self, images: Images, config: Config, device: torch.device) -> None:
        import torch

        parts = (images.train, images.train_labels, images.test, images.test_labels)
        self.train, self.train_labels, self.test, self.test_labels = (
            torch.from_numpy(part).to(device) for part in parts
        )
        self.fill = torch.from_numpy(fill_value(config.mean)).to(device)
        self.count, self.recipe, self.device = len(images.train), config.recipe, device
        self.whole = float(self.count)

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """See `Resident`."""
        import torch

        order = epoch_order(seed, epoch, self.count, self.recipe.batch_size)
        draws = draw_epoch(self.recipe.augment, seed, epoch, len(order), self.train.shape[-1])
        index = torch.from_numpy(order).to(self.device)
        images = augmented(self.train[index], draws, self.fill)
        return Epoch(images, self.train_labels[index], digest(order, draws))


class ResidentText:
    """Bytes; an epoch is a fixed number of windows that begin anywhere, each byte of which is a target."""

    def __init__(self, text: Text, config: Config, device: torch.device) -> None:
        import torch

        assert isinstance(config.shape, GptShape)
        self.context, self.count = config.shape.context, text.windows
        self.batch_size, self.device = config.recipe.batch_size, device
        self.whole = len(text.train) / self.context
        self.train = torch.from_numpy(text.train.copy()).to(device)
        held = torch.from_numpy(text.test.copy()).to(device)
        self.test, self.test_labels = self._windows(held, torch.from_numpy(text.test_starts(self.context)))

    def _windows(self, content: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return bytes ``[window, context]`` and those one further on."""
        import torch

        places = starts.to(self.device)[:, None] + torch.arange(self.context, device=self.device)
        return content[places], content[places + 1]

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """See `Resident`."""
        import torch

        drawn = self.count // self.batch_size * self.batch_size
        starts = generator(seed, epoch, "order").integers(0, len(self.train) - self.context, drawn, dtype=np.int64)
        return Epoch(*self._windows(self.train, torch.from_numpy(starts)), digest(starts, {}))
