"""Data sets as uint8 arrays, decoded once: torchvision's CIFAR, class folders or tars of images, hfds, and digits."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from attnlens.atomic import write_atomic
from attnlens.checkpoints.archives import DAMAGED_ARRAY
from attnlens.errors import OutputError, UsageError
from attnlens.printable import printable
from attnlens.training.data.augment import augmented, draw_epoch, fill_value
from attnlens.training.data.cache import read_decoded, write_decoded
from attnlens.training.data.decoding import pixels_of
from attnlens.training.data.folders import TEST_FOLDERS, split_of
from attnlens.training.data.image_files import SUFFIXES, DatasetError, Read, folder_files, hidden, tar_files
from attnlens.training.data.memory import fits_on, free_memory, in_words
from attnlens.training.data.on_device import Chunked, Dataset, Epoch, hash_of
from attnlens.training.data.order import digest, epoch_order, generator
from attnlens.training.data.reading import Say, decoded, in_memory, silent
from attnlens.training.data.rows import BLOCK, Held, Pixels, blocks, in_file, picked

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnlens.training.config import Config

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
DIGITS_TRAIN = 1000
UNEVEN = 1.25
"""Times its fair share from which on the commonest class makes plain accuracy a poor measure."""
LARGE = 128
"""From so many pixels on, images are trained with larger patches."""
_FORMAT = 2
"""Of what is kept decoded; a change of how images are decoded or told apart is another one."""

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
            raise UsageError(f"--classes keeps {len(kept)} of {self.name}'s {len(ordered)} classes: name two or more")
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
        self.chunk = max(1, BLOCK // max(1, images.train[:1].nbytes))

    def _moved(self, pixels: Pixels) -> Tensor:
        import torch

        return torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """See `attnlens.training.data.on_device.Resident`."""
        import torch

        order = epoch_order(seed, epoch, self.count, self.recipe.batch_size)
        draws = draw_epoch(self.recipe.augment, seed, epoch, len(order), self.size)
        index = torch.from_numpy(order).to(self.device)

        def made(start: int, stop: int) -> Tensor:
            train: Any = self.train
            kept = isinstance(train, torch.Tensor)
            images = train[index[start:stop]] if kept else self._moved(train[order[start:stop]])
            return augmented(images, {name: values[..., start:stop] for name, values in draws.items()}, self.fill)

        images = made(0, len(order)) if len(order) <= self.chunk else Chunked(len(order), self.chunk, made)
        return Epoch(images, self.train_labels[index], digest(order, draws))


def load_dataset(
    name: str,
    *,
    data_dir: Path | None = None,
    image_size: int | None = None,
    cache: Path | None = None,
    say: Say = silent,
) -> Images:
    """Return a data set: ``digits``, ``cifar10``, ``cifar100``, ``hfds/NAME``, a folder or a tar of class folders.

    What had to be decoded is kept as uint8 under ``cache`` with its hash and read from there the next time; what takes
    more than a quarter of the free memory stays in that file. ``image_size`` resizes (bicubic, cropped to a centred
    square); ``say`` is told how far it got. Raises `DatasetError` or `UsageError`.
    """
    if name in NAMED:
        return _resized(NAMED[name](name, data_dir or _default_folder("data")), image_size)
    cache = cache or _default_folder("decoded")
    if name.startswith("hfds/"):
        return _hfds(name, data_dir, image_size, say)
    path = (data_dir / name) if data_dir is not None and (data_dir / name).exists() else Path(name)
    if path.is_dir():
        say(f"reading the names of the files in {path}")
        key, names = _folder_key(path, image_size)
        if names:
            split_of(name_of(path), names)  # what is no data set is refused before hours of decoding
        return _cached(cache, name_of(path), key, lambda: folder_files(path), image_size, say)
    if path.is_file() and path.name.lower().endswith(TAR_SUFFIXES):
        say(f"hashing {path}")
        key = f"{_file_sha256(path)}-{image_size}"
        return _cached(cache, name_of(path), key, lambda: tar_files(path), image_size, say, packed=True)
    raise UsageError(
        f"--dataset {name} is no folder, no tar and no known name: choose {', '.join(NAMED)}, hfds/NAME, or a "
        "folder or tar of images in class folders"
    )


def name_of(path: Path) -> str:
    """Return a folder's or archive's name without what says how it is packed."""
    return printable(path.resolve().name.split(".tar")[0].removesuffix(".tgz"))


def _default_folder(part: str) -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("attnlens") / part


def _digits(name: str, folder: Path) -> Images:  # noqa: ARG001  # they come with scikit-learn
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, 1,000 of them to train on, chosen once for all."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DatasetError("the digits come with scikit-learn: pip install scikit-learn") from error
    data = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)[:, None]
    order = generator(0, 0, "split").permutation(len(pixels))
    train, test = order[:DIGITS_TRAIN], order[DIGITS_TRAIN:]
    labels = data.target.astype(np.int64)
    return Images(name, pixels[train], labels[train], pixels[test], labels[test], tuple("0123456789"))


def _cifar(name: str, root: Path) -> Images:
    """Read CIFAR through torchvision, which verifies checksums and downloads what is missing."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        train, test = (kind(str(root), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DatasetError(
            f"{name} is not in {root} and could not be downloaded ({error}): put torchvision's files there, or train "
            "on a folder of images or on --dataset digits"
        ) from error
    pixels = [np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)) for data in (train, test)]
    labels = [np.array(data.targets, np.int64) for data in (train, test)]
    return Images(name, pixels[0], labels[0], pixels[1], labels[1], tuple(train.classes))


NAMED: dict[str, Callable[[str, Path], Images]] = {"digits": _digits, "cifar10": _cifar, "cifar100": _cifar}
"""Data sets by name, each with what reads it: given its name and the folder its files are looked for in."""


def _hfds(name: str, root: Path | None, image_size: int | None, say: Say) -> Images:
    """Read a data set of the Hugging Face hub through timm."""
    try:
        import datasets  # noqa: F401  # timm needs it
    except ImportError as error:
        raise DatasetError(f"{name} needs the package datasets: pip install datasets") from error
    from timm.data import create_dataset

    read: dict[str, tuple[list[Pixels], list[int]]] = {}
    splits, free, taken = {"train": ("train",), "test": TEST_FOLDERS}, free_memory(), 0
    for part, names in splits.items():
        for split in names:
            try:
                data = create_dataset(name, str(root) if root else None, split=split)
            except (ValueError, KeyError, OSError) as error:
                reason = error
                continue
            read[part] = [], []
            for image, label in data:
                read[part][0].append(pixels_of(image, image_size))
                read[part][1].append(int(label))
                taken += read[part][0][-1].nbytes
                say(f"{name}: {len(read[part][0])} images of {split} decoded")
                if free is not None and taken > free / 3:  # they are stacked, and an epoch copies them
                    raise DatasetError(
                        f"{name} takes more than {in_words(taken)} decoded, and {in_words(free)} of memory are free: "
                        "pass a smaller --image-size, or save its images to class folders, which are read from disk"
                    )
            break
        else:
            raise DatasetError(f"{name} has no split {' or '.join(names)} that can be read ({reason})")
    (train, train_labels), (test, test_labels) = read["train"], read["test"]
    classes = tuple(str(number) for number in range(1 + max(train_labels)))
    together = _stacked([*train, *test], name)
    count = len(train)
    labels = np.array(train_labels, np.int64), np.array(test_labels, np.int64)
    return Images(name, together[:count], labels[0], together[count:], labels[1], classes)


_decoded = decoded


def _stacked(pixels: list[Pixels], name: str) -> Pixels:
    sizes = {array.shape for array in pixels}
    channels, height, width = pixels[0].shape
    if len(sizes) > 1 or height != width:
        raise UsageError(f"the images of {name} are not all squares of one size: pass --image-size")
    assert channels in (1, 3)
    return np.stack(pixels)


def _resized(images: Images, image_size: int | None) -> Images:
    if image_size is None or image_size == images.train.shape[-1]:
        return images
    from PIL import Image

    def resize(held: Held) -> Pixels:
        pixels = held[:]
        modes = "L" if pixels.shape[1] == 1 else "RGB"
        resized = [
            np.asarray(Image.fromarray(p.transpose(1, 2, 0).squeeze(), modes).resize((image_size, image_size), 3))
            for p in pixels
        ]
        stacked = np.stack(resized)
        return stacked[:, None] if modes == "L" else np.ascontiguousarray(stacked.transpose(0, 3, 1, 2))

    return replace(images, train=resize(images.train), test=resize(images.test))


def _balanced(labels: Labels, count: int, option: str) -> NDArray[np.int64]:
    if not 0 < count <= len(labels):
        raise UsageError(f"{option} {count}: the data set has {len(labels)} such images")
    order = generator(0, 0, "subset").permutation(len(labels))
    shuffled = labels[order]
    rank = np.empty(len(labels), np.int64)  # an image's place among those of its class
    for label in np.unique(labels):
        here = np.flatnonzero(shuffled == label)
        rank[here] = np.arange(len(here))
    return np.sort(order[np.argsort(rank, kind="stable")[:count]])


def _cached(
    cache: Path,
    name: str,
    key: str,
    files: Callable[[], Iterator[Read]],
    image_size: int | None,
    say: Say,
    *,
    packed: bool = False,
) -> Images:
    """Return the decoded data set from the cache where its hash still holds, else decode it and fill the cache."""
    hashed = hashlib.sha256(f"{_FORMAT} {key}".encode(errors="surrogateescape")).hexdigest()
    path = cache / f"{hashed[:24]}.npz"
    with contextlib.suppress(*DAMAGED_ARRAY):  # no cache yet, or a damaged one: it is made again
        if path.is_file():
            say(f"{name}: checking what was decoded before")
        return Images(name, *read_decoded(path))
    data = _decoded(name, files(), image_size, cache, say, packed=packed)
    with contextlib.suppress(OutputError, *DAMAGED_ARRAY):  # a cache that cannot be written costs time, nothing else
        write_atomic(path, lambda file: write_decoded(file, data))
        return Images(name, *read_decoded(path))
    return Images(name, *in_memory(data))


def _folder_key(folder: Path, image_size: int | None) -> tuple[str, list[str]]:
    """Return what stands for the content of a folder, and the names of the images in it."""
    listing, names = hashlib.sha256(), []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status, name = path.stat(), path.relative_to(folder).as_posix()
            listing.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
            if path.suffix.lower() in SUFFIXES and not hidden(name):
                names.append(name)
    return f"{folder.resolve()} {listing.hexdigest()} {image_size}", names


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
