"""Data sets as uint8 arrays, decoded once: torchvision's CIFAR, class folders or tars of images, hfds, and digits."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from attnlens.atomic import write_atomic
from attnlens.checkpoints.archives import DAMAGED_ARRAY, array_header, check_archive
from attnlens.errors import OutputError, UsageError
from attnlens.printable import printable
from attnlens.training.data.augment import augmented, draw_epoch, fill_value
from attnlens.training.data.image_files import SUFFIXES, Budget, DatasetError, Read, folder_files, opened, tar_files
from attnlens.training.data.on_device import Dataset, Epoch, hash_of
from attnlens.training.data.order import digest, epoch_order, generator

if TYPE_CHECKING:
    import torch

    from attnlens.training.config import Config

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
TEST_FOLDERS = ("test", "val", "validation")
HELD_OUT = 5
"""Without a test folder every fifth image of a class, in a fixed random order, is held out."""
DIGITS_TRAIN = 1000
LARGE = 128
"""From so many pixels on, images are trained with larger patches."""
_AT_ONCE = 256

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
Classes = str | Sequence[str]
"""``even``, ``odd``, or names of classes."""


@dataclass(frozen=True)
class Images(Dataset):
    """A data set in memory: images ``[image, channel, row, column]``, labels, class names."""

    train: Pixels
    train_labels: Labels
    test: Pixels
    test_labels: Labels
    classes: tuple[str, ...]
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
            train=self.train[train >= 0],
            train_labels=train[train >= 0],
            test=self.test[test >= 0],
            test_labels=test[test >= 0],
            classes=kept,
            whole_sha256=self.whole(),
        )

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
            kept = replace(kept, train=self.train[chosen], train_labels=self.train_labels[chosen])
        if test is not None:
            chosen = _balanced(self.test_labels, test, "--test-images")
            kept = replace(kept, test=self.test[chosen], test_labels=self.test_labels[chosen])
        return kept

    def moments(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of every channel of the training images, in 0..1."""
        counts = np.stack([np.bincount(self.train[:, c].ravel(), minlength=256) for c in range(self.train.shape[1])])
        share, value = counts / counts.sum(1, keepdims=True), np.arange(256) / 255
        mean = share @ value
        return mean.tolist(), np.sqrt(np.maximum(share @ value**2 - mean**2, 1e-6)).tolist()

    def tuning(self) -> Images:
        """Split the training images into nine tenths to train on and one tenth to choose learning rates on."""
        order = generator(0, 0, "split").permutation(len(self.train))
        held = max(1, len(order) // 10)
        kept, chosen = np.sort(order[held:]), np.sort(order[:held])
        return Images(
            f"{self.name}, tuning split",
            self.train[kept],
            self.train_labels[kept],
            self.train[chosen],
            self.train_labels[chosen],
            self.classes,
        )


class ResidentImages:
    """Images as uint8; an epoch is a permutation of them, augmented at once."""

    def __init__(self, images: Images, config: Config, device: torch.device) -> None:
        import torch

        arrays = (images.train, images.train_labels, images.test, images.test_labels)
        self.train, self.train_labels, self.test_inputs, self.test_targets = (
            torch.from_numpy(array).to(device) for array in arrays
        )
        self.fill = torch.from_numpy(fill_value(config.mean)).to(device)
        self.count, self.recipe, self.device = len(images.train), config.recipe, device
        self.whole = float(self.count)

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """See `attnlens.training.data.on_device.Resident`."""
        import torch

        order = epoch_order(seed, epoch, self.count, self.recipe.batch_size)
        draws = draw_epoch(self.recipe.augment, seed, epoch, len(order), self.train.shape[-1])
        index = torch.from_numpy(order).to(self.device)
        images = augmented(self.train[index], draws, self.fill)
        return Epoch(images, self.train_labels[index], digest(order, draws))


def load_dataset(
    name: str, *, data_dir: Path | None = None, image_size: int | None = None, cache: Path | None = None
) -> Images:
    """Return a data set: ``digits``, ``cifar10``, ``cifar100``, ``hfds/NAME``, a folder or a tar of class folders.

    What had to be decoded is kept as uint8 under ``cache`` with its hash and read from there the next time.
    ``image_size`` resizes (bicubic, cropped to a centred square). Raises `DatasetError` or `UsageError`.
    """
    if name in NAMED:
        return _resized(NAMED[name](name, data_dir or _default_folder("data")), image_size)
    cache = cache or _default_folder("decoded")
    if name.startswith("hfds/"):
        return _hfds(name, data_dir, image_size)
    path = (data_dir / name) if data_dir is not None and (data_dir / name).exists() else Path(name)
    if path.is_dir():
        return _cached(cache, name_of(path), _folder_key(path, image_size), lambda: folder_files(path), image_size)
    if path.is_file() and path.name.lower().endswith(TAR_SUFFIXES):
        key = f"{_file_sha256(path)}-{image_size}"
        return _cached(cache, name_of(path), key, lambda: tar_files(path), image_size)
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


def _hfds(name: str, root: Path | None, image_size: int | None) -> Images:
    """Read a data set of the Hugging Face hub through timm."""
    try:
        import datasets  # noqa: F401  # timm needs it
    except ImportError as error:
        raise DatasetError(f"{name} needs the package datasets: pip install datasets") from error
    from timm.data import create_dataset

    read: dict[str, tuple[list[Pixels], list[int]]] = {}
    splits = {"train": ("train",), "test": TEST_FOLDERS}
    for part, names in splits.items():
        for split in names:
            try:
                data = create_dataset(name, str(root) if root else None, split=split)
            except (ValueError, KeyError, OSError) as error:
                reason = error
                continue
            pairs = [(_fitted(image, image_size), int(label)) for image, label in data]
            read[part] = [pixels for pixels, _ in pairs], [label for _, label in pairs]
            break
        else:
            raise DatasetError(f"{name} has no split {' or '.join(names)} that can be read ({reason})")
    (train, train_labels), (test, test_labels) = read["train"], read["test"]
    classes = tuple(str(number) for number in range(1 + max(train_labels)))
    together = _stacked([*train, *test], name)
    count = len(train)
    labels = np.array(train_labels, np.int64), np.array(test_labels, np.int64)
    return Images(name, together[:count], labels[0], together[count:], labels[1], classes)


def _decoded(name: str, files: Iterator[Read], image_size: int | None) -> Images:
    """Decode images in class folders, below train/ and test/ or without, in the order of their paths."""
    budget = Budget(name)

    def decode(item: Read) -> tuple[str, Pixels]:
        with opened(name, item, budget) as image:
            return item[0], _fitted(image, image_size)

    decoded: dict[str, Pixels] = {}
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(files, _AT_ONCE)):  # a pool's own map would read every file before the first is seen
            decoded |= dict(pool.map(decode, batch))
    if not decoded:
        raise DatasetError(f"{name} holds no images ({', '.join(SUFFIXES)})")
    paths = sorted(decoded)
    tops = {path.split("/")[0] for path in paths}
    if len(tops) == 1 and not tops & {"train", *TEST_FOLDERS}:  # everything lies in one folder: step into it
        decoded = {path.split("/", 1)[-1]: decoded[path] for path in paths}
        paths = sorted(decoded)
        tops = {path.split("/")[0] for path in paths}
    tested = next((folder for folder in TEST_FOLDERS if folder in tops), None)
    split = "train" in tops and tested is not None
    least = 3 if split else 2
    flat = next((path for path in paths if len(path.split("/")) < least), None)
    if flat is not None:
        raise DatasetError(f"{name}: {flat} lies in no class folder: expected [train/|test/]CLASS/IMAGE")
    folders = [path.split("/")[-2] for path in paths]
    classes = tuple(sorted(set(folders)))
    if len(classes) < 2:
        raise DatasetError(f"{name} has one class, {classes[0]}: there is nothing to tell apart")
    pixels = _stacked([decoded[path] for path in paths], name)
    labels = np.array([classes.index(folder) for folder in folders], np.int64)
    if split:
        train = np.array([path.startswith("train/") for path in paths])
        test = np.array([path.startswith(f"{tested}/") for path in paths])
    else:
        test = np.zeros(len(paths), bool)
        for label in range(len(classes)):
            mine = generator(label, 0, "split").permutation(np.flatnonzero(labels == label))
            test[mine[::HELD_OUT]] = True
        train = ~test
    return Images(name, pixels[train], labels[train], pixels[test], labels[test], classes)


def _fitted(image: Any, image_size: int | None) -> Pixels:
    """Return an image as ``[channel, row, column]`` RGB, resized and cropped where a size is given."""
    image = image.convert("RGB")
    if image_size is not None and image.size != (image_size, image_size):
        from PIL import ImageOps

        image = ImageOps.fit(image, (image_size, image_size), method=3)  # bicubic
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


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

    def resize(pixels: Pixels) -> Pixels:
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


def _cached(cache: Path, name: str, key: str, files: Callable[[], Iterator[Read]], image_size: int | None) -> Images:
    """Return the decoded data set from the cache where its hash still holds, else decode it and fill the cache."""
    digest = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
    path = cache / f"{digest[:24]}.npz"
    try:
        return _cached_images(path, name)
    except DAMAGED_ARRAY:
        pass  # no cache yet, or a damaged one: it is made again
    images = _decoded(name, files(), image_size)
    arrays: dict[str, Any] = {
        "train": images.train,
        "train_labels": images.train_labels,
        "test": images.test,
        "test_labels": images.test_labels,
        "classes": np.array(images.classes),
        "sha256": np.array(images.sha256()),
    }
    with contextlib.suppress(OutputError):  # a cache that cannot be written costs time, nothing else
        write_atomic(path, lambda file: np.savez(file, **arrays))
    return images


def _cached_images(path: Path, name: str) -> Images:
    """Read what `_cached` wrote. Raises one of a handful of errors for anything else."""
    members = check_archive(path, stored=True)
    with zipfile.ZipFile(path) as archive:
        for member in members:
            with archive.open(member) as file:
                array_header(file)
    with np.load(path, allow_pickle=False) as stored:
        arrays = {key: stored[key] for key in ("train", "train_labels", "test", "test_labels", "classes", "sha256")}
    parts = [arrays[key] for key in ("train", "train_labels", "test", "test_labels")]
    kinds = [(part.dtype.str, part.ndim) for part in parts]
    if kinds != [("|u1", 4), ("<i8", 1)] * 2 or (arrays["classes"].dtype.kind, arrays["classes"].ndim) != ("U", 1):
        raise ValueError("it holds arrays of other types")
    train, train_labels, test, test_labels = parts
    images = Images(name, train, train_labels, test, test_labels, tuple(arrays["classes"].tolist()))
    same_length = len(train) == len(train_labels) and len(test) == len(test_labels)
    labels = np.concatenate([train_labels, test_labels])
    known = len(labels) > 0 and labels.min() >= 0 and labels.max() < len(images.classes)
    if not same_length or not known or images.sha256() != str(arrays["sha256"]):
        raise ValueError("it is damaged")
    return images


def _folder_key(folder: Path, image_size: int | None) -> str:
    listing = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            told = f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n"
            listing.update(told.encode(errors="surrogateescape"))  # names are bytes that need be no text
    return f"{folder.resolve()} {listing.hexdigest()} {image_size}"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
