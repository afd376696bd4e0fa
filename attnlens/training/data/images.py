"""Data sets of images as uint8 arrays, decoded once, and what an epoch of them is on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from attnlens.errors import UsageError
from attnlens.memory import fits_on
from attnlens.training.data.augment import augmented, draw_epoch, fill_value
from attnlens.training.data.mixing import draw_kept, draw_mixing, mixed, packed
from attnlens.training.data.on_device import Chunked, Dataset, Epoch, hash_of
from attnlens.training.data.order import digest, epoch_order, generator
from attnlens.training.data.rows import BLOCK, Held, Pixels, blocks, in_file, picked
from attnlens.words import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnlens.training.config import Config


UNEVEN = 1.25
"""Times its fair share from which on the commonest class makes plain accuracy a poor measure."""
LARGE = 128
"""From so many pixels on, images are trained with larger patches."""

Labels = NDArray[np.int64]
Classes = str | Sequence[str]
"""``even``, ``odd``, or names of classes."""


@dataclass(frozen=True)
class Images(Dataset):
    """A data set: images ``[image, channel, row, column]`` in memory or in a file, labels, class names."""

    train: Held
    train_labels: Labels
    test: Held
    test_labels: Labels
    classes: tuple[str, ...]
    left_out: dict[str, int] = field(default_factory=dict)
    """Images that are not used, by reason."""
    note: str = ""
    """What was found, in a line."""
    whole_sha256: str = ""
    """Hash of the data set these were cut from; empty where nothing was left out."""
    kind: ClassVar[str] = "images"
    holds: ClassVar[str] = "holds images"
    foreign: ClassVar[Mapping[str, str]] = {"context": "text"}

    @property
    def preset(self) -> str:
        """See `Dataset`."""
        return "large images" if self.train.shape[-1] >= LARGE else "images"

    def sha256(self) -> str:
        """Return the hash of the decoded training and test images and their labels."""
        arrays = (self.train, self.train_labels, self.test, self.test_labels)
        return hash_of(*arrays, start=repr(self.classes))

    @property
    def told(self) -> str:
        """See `Dataset`."""
        where = ", read from disk as they are needed" if in_file(self.train) else ""
        return f"{self.note}{where}" if self.note else ""

    def class_names(self) -> list[str]:
        """See `Dataset`."""
        return list(self.classes)

    def whole(self) -> str:
        """See `Dataset`."""
        return self.whole_sha256 or self.sha256()

    def only(self, classes: Classes) -> Images:
        """Keep the images of some classes, their labels counted anew in the order the classes have here.

        ``even`` and ``odd`` are every second of the sorted names, from the first or the second on. Raises `UsageError`
        for names that are no classes, and for fewer than two.
        """
        ordered = sorted(self.classes)
        halves = {"even": ordered[::2], "odd": ordered[1::2]}
        chosen = halves.get(classes, [classes]) if isinstance(classes, str) else list(classes)
        unknown = [name for name in chosen if name not in self.classes]
        if unknown:
            known = ", ".join(ordered[:20]) + (", ..." if len(ordered) > 20 else "")
            raise UsageError(f"--classes names {unknown[0]}, no class of {self.name}: choose even, odd or from {known}")
        kept = tuple(name for name in self.classes if name in chosen)
        if len(kept) < 2:
            every = counted(len(ordered), "class", "classes")
            raise UsageError(f"--classes keeps {len(kept)} of {self.name}'s {every}: name two or more")
        number = np.full(len(self.classes), -1, np.int64)
        number[[self.classes.index(name) for name in kept]] = np.arange(len(kept))
        train, test = number[self.train_labels], number[self.test_labels]
        return replace(
            self,
            train=picked(self.train, np.flatnonzero(train >= 0)),
            train_labels=train[train >= 0],
            test=picked(self.test, np.flatnonzero(test >= 0)),
            test_labels=test[test >= 0],
            classes=kept,
            whole_sha256=self.whole(),
        )

    def unused(self) -> dict[str, int]:
        """See `Dataset`."""
        return self.left_out

    def sizes(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """See `Dataset`."""
        channels, image_size = self.train.shape[1:3]
        sizes = {"image_size": image_size, "patch_size": chosen["patch_size"], "channels": channels}
        return {**sizes, "classes": len(self.classes)}

    def kept(self, chosen: Mapping[str, Any]) -> Images:
        """See `Dataset`."""
        return self.limited(chosen["train_images"], chosen["test_images"])

    def counts(self, chosen: Mapping[str, Any]) -> tuple[int, int]:  # noqa: ARG002  # `kept` made the choice
        """See `Dataset`."""
        return len(self.train), len(self.test)

    def resident(self, config: Config, device: torch.device) -> ResidentImages:
        """See `Dataset`."""
        return ResidentImages(self, config, device)

    def limited(self, train: int | None, test: int | None) -> Images:
        """Keep the given numbers of images, drawn once for all seeds, classes in equal numbers while they last."""
        kept = self if train is None and test is None else replace(self, whole_sha256=self.whole())
        if train is not None:
            chosen = _balanced(self.train_labels, train, "--train-images")
            kept = replace(kept, train=picked(self.train, chosen), train_labels=self.train_labels[chosen])
        if test is not None:
            chosen = _balanced(self.test_labels, test, "--test-images")
            kept = replace(kept, test=picked(self.test, chosen), test_labels=self.test_labels[chosen])
        return kept

    def moments(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of every channel of the training images, in 0..1."""
        counts = np.zeros((self.train.shape[1], 256), np.int64)
        for block in blocks(self.train):
            counts += [np.bincount(block[:, channel].ravel(), minlength=256) for channel in range(len(counts))]
        share, value = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
        mean = share @ value
        return mean.tolist(), np.sqrt(np.maximum(share @ value**2 - mean**2, 1e-6)).tolist()

    def commonest(self) -> float | None:
        """See `Dataset`."""
        share = float(np.bincount(self.test_labels).max() / len(self.test_labels))
        return share if share * len(self.classes) > UNEVEN else None

    def tuning(self) -> Images:
        """Split the training images into nine tenths to train on and one tenth to choose learning rates on."""
        order = generator(0, 0, "split").permutation(len(self.train))
        held = max(1, len(order) // 10)
        kept, chosen = np.sort(order[held:]), np.sort(order[:held])
        return Images(
            f"{self.name}, tuning split",
            picked(self.train, kept),
            self.train_labels[kept],
            picked(self.train, chosen),
            self.train_labels[chosen],
            self.classes,
        )


class ResidentImages:
    """Images as uint8; an epoch is a permutation of them, augmented as a whole or a chunk at a time.

    Images that lie in a file stay there, those that would fill half of a GPU's free memory stay in the host's, and only
    what is at work is on the device. The numbers are the same.
    """

    def __init__(self, images: Images, config: Config, device: torch.device) -> None:
        import torch

        self.device, self.recipe, self.count = device, config.recipe, len(images.train)
        self.whole = float(self.count)
        self.size = images.train.shape[-1]
        on_device = fits_on(device, images.train.nbytes + images.test.nbytes)
        held = [on_device and not in_file(part) for part in (images.train, images.test)]
        self.train = torch.from_numpy(images.train).to(device) if held[0] else images.train
        self.test_inputs = (
            torch.from_numpy(images.test).to(device)
            if held[1]
            else Chunked(len(images.test), 1, lambda start, stop: self._moved(images.test[start:stop]))
        )
        labels = (images.train_labels, images.test_labels)
        self.train_labels, self.test_targets = (torch.from_numpy(array).to(device) for array in labels)
        self.fill = torch.from_numpy(fill_value(config.mean)).to(device)
        batch = config.recipe.batch_size
        self.chunk = batch * max(1, BLOCK // max(1, batch * images.train[:1].nbytes))  # what is mixed lies in one batch
        self.drop_rates = config.network.drop_rates(config.recipe.drop_path) if config.recipe.drop_path else []

    def _moved(self, pixels: Pixels) -> Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """See `attnlens.training.data.on_device.Resident`."""
        import torch

        order = epoch_order(seed, epoch, self.count, self.recipe.batch_size)
        draws = draw_epoch(self.recipe.augment, seed, epoch, len(order), self.size)
        batch = self.recipe.batch_size
        mixing = draw_mixing(self.recipe, seed, epoch, len(order) // batch, self.size)
        more = mixing | draw_kept(self.drop_rates, seed, epoch, len(order))
        index = torch.from_numpy(order).to(self.device)

        def made(start: int, stop: int) -> Tensor:
            train: Any = self.train
            kept = isinstance(train, torch.Tensor)
            images = train[index[start:stop]] if kept else self._moved(train[order[start:stop]])
            images = augmented(images, {name: values[..., start:stop] for name, values in draws.items()}, self.fill)
            steps = slice(start // batch, stop // batch)
            return mixed(images, {name: values[..., steps] for name, values in mixing.items()}, batch)

        images = made(0, len(order)) if len(order) <= self.chunk else Chunked(len(order), self.chunk, made)
        return Epoch(images, packed(self.train_labels[index], more, batch), digest(order, draws | more))


def _balanced(labels: Labels, count: int, option: str) -> NDArray[np.int64]:
    if not 0 < count <= len(labels):
        raise UsageError(f"{option} {count}: the data set has {counted(len(labels), 'such image')}")
    order = generator(0, 0, "subset").permutation(len(labels))
    shuffled = labels[order]
    rank = np.empty(len(labels), np.int64)  # an image's place among those of its class
    for label in np.unique(labels):
        here = np.flatnonzero(shuffled == label)
        rank[here] = np.arange(len(here))
    return np.sort(order[np.argsort(rank, kind="stable")[:count]])
