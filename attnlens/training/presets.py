"""What a data set is trained with when nothing else is asked for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from attnlens.training.config import Augmentation


class Preset(NamedTuple):
    """Defaults of one data set."""

    patch_size: int
    epochs: int
    batch_size: int
    lr: float
    augment: Augmentation
    target: float


class TextPreset(NamedTuple):
    """Defaults of a text: ``train_images`` are the windows an epoch draws, ``target`` is in bits per byte."""

    context: int
    epochs: int
    batch_size: int
    lr: float
    target: float
    train_images: int
    test_images: int | None


TEXT = TextPreset(128, 20, 16, 1e-3, 3.0, 1600, None)

PRESETS = {
    "digits": Preset(2, 12, 50, 1e-3, "none", 0.6),
    "cifar10": Preset(4, 100, 512, 1e-3, "flip-randaugment", 0.8),
    "cifar100": Preset(4, 100, 512, 1e-3, "flip-randaugment", 0.5),
}
OTHER = Preset(4, 100, 512, 1e-3, "flip-randaugment", 0.8)
LARGE = OTHER._replace(patch_size=16)
"""From 128 pixels on."""


def preset_of(dataset: str, image_size: int) -> Preset:
    """Return the defaults of a data set, by name, else by the size of its images."""
    return PRESETS.get(dataset, LARGE if image_size >= 128 else OTHER)


def eval_every(epochs: int, train_images: int, test_images: int) -> int:
    """Return the epochs between measurements: some twenty in all, and no more than a tenth of the training's cost.

    A forward pass costs a third of a training step.
    """
    return max(1, epochs // 20, math.ceil(10 * test_images / (3 * train_images)))


def chosen(preset: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the preset's values with those that were given in their place."""
    return preset | {name: value for name, value in given.items() if value is not None}
