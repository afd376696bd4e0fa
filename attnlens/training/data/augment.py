"""Augmenting a whole epoch on the device from draws made on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from attnlens.training.data import randaugment
from attnlens.training.data.order import generator

if TYPE_CHECKING:
    from torch import Tensor

SHIFT_SHARE = 8
"""Shifts go up to this part of the image's size."""


def draw_epoch(augment: str, seed: int, epoch: int, count: int, size: int) -> dict[str, NDArray[Any]]:
    """Draw everything random about an epoch's ``count`` images, in their order of use."""
    random = generator(seed, epoch, "augment")
    draws: dict[str, NDArray[Any]] = {}
    if augment.startswith("flip"):
        draws["flip"] = random.random(count) < 0.5
    if augment.endswith("shift"):
        furthest = max(1, size // SHIFT_SHARE)
        draws["shift"] = random.integers(-furthest, furthest + 1, (2, count))
    if augment.endswith("randaugment"):
        draws |= randaugment.draw(count, random)
    return draws


def augmented(images: Tensor, draws: Mapping[str, NDArray[Any]], fill: Tensor) -> Tensor:
    """Return the images ``[image, channel, row, column]`` (uint8) after the draws; ``fill`` is a value a channel."""
    import torch

    if "flip" in draws:
        flip = torch.from_numpy(draws["flip"]).to(images.device)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    if "shift" in draws:
        images = shifted(images, torch.from_numpy(draws["shift"]).to(images.device), fill)
    if "operation" in draws:
        images = randaugment.apply_draws(images, draws, fill)
    return images


def shifted(images: Tensor, shift: Tensor, fill: Tensor) -> Tensor:
    """Move each image by its (rows, columns) of ``shift [2, image]``, ``fill`` where nothing moved in."""
    import torch

    _, channels, height, width = images.shape
    rows = torch.arange(height, device=images.device) - shift[0][:, None]
    columns = torch.arange(width, device=images.device) - shift[1][:, None]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
    moved = images.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, channels, -1)).view(images.shape)
    return torch.where(inside[:, None], moved, fill.view(1, -1, 1, 1))


def fill_value(mean: list[float]) -> NDArray[np.uint8]:
    """Return the mean colour (0..1) as uint8."""
    return np.round(255 * np.array(mean)).astype(np.uint8)
