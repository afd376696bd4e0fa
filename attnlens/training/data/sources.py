"""What brings a data set as `Images`: torchvision's CIFAR, class folders or tars of images, hfds, and digits."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from attnlens.atomic import write_atomic
from attnlens.checkpoints.archives import DAMAGED_ARRAY
from attnlens.errors import OutputError, UsageError
from attnlens.memory import free_memory, in_words
from attnlens.printable import printable
from attnlens.strict_json import there
from attnlens.training.data.cache import read_decoded, write_decoded
from attnlens.training.data.decoding import pixels_of
from attnlens.training.data.folders import TEST_FOLDERS, split_of
from attnlens.training.data.image_files import SUFFIXES, DatasetError, Read, folder_files, hidden, tar_files
from attnlens.training.data.images import Images
from attnlens.training.data.order import generator
from attnlens.training.data.reading import Say, decoded, in_memory, silent
from attnlens.training.data.rows import Held, Pixels

if TYPE_CHECKING:
    pass

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
DIGITS_TRAIN = 1000
_FORMAT = 2
"""Of what is kept decoded; a change of how images are decoded or told apart is another one."""


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
    path = _given_path(name, data_dir)
    if there(path.is_dir):
        say(f"reading the names of the files in {path}")
        key, names = _folder_key(path, image_size)
        if names:
            split_of(name_of(path), names)  # what is no data set is refused before hours of decoding
        return _cached(cache, name_of(path), key, lambda: folder_files(path), image_size, say)
    if there(path.is_file) and path.name.lower().endswith(TAR_SUFFIXES):
        say(f"hashing {path}")
        key = f"{_file_sha256(path)}-{image_size}"
        return _cached(cache, name_of(path), key, lambda: tar_files(path), image_size, say, packed=True)
    raise UsageError(
        f"--dataset {name} is no folder, no tar and no known name: choose {', '.join(NAMED)}, hfds/NAME, a "
        "folder or tar of images in class folders, or text:FILE"
    )


def image_files(name: str, *, data_dir: Path | None = None) -> list[Path]:
    """Return the archive, or the images of a folder, that a data set is read from; none of one known by its name."""
    path = _given_path(name, data_dir)
    if name in NAMED or not path.is_dir():
        return [] if name in NAMED else [path]
    names = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    images = [one for one in names if _is_image(one)]
    split = split_of(name_of(path), images) if images else None
    return [path / one for one in (*split.train, *split.test)] if split else []


def _given_path(name: str, data_dir: Path | None) -> Path:
    return (data_dir / name) if data_dir is not None and there((data_dir / name).exists) else Path(name)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not hidden(name)


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
    except (OSError, RuntimeError, ValueError) as error:
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
                say(f"{name}: images of {split} decoded: {len(read[part][0]):,}")
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
    data = decoded(name, files(), image_size, cache, say, packed=packed)
    with contextlib.suppress(OutputError, *DAMAGED_ARRAY):  # a cache that cannot be written costs time, nothing else
        write_atomic(path, lambda file: write_decoded(file, data))
        return Images(name, *read_decoded(path))
    return Images(name, *in_memory(data))


def _folder_key(folder: Path, image_size: int | None) -> tuple[str, list[str]]:
    """Return what stands for the content of a folder, and the names of the images in it."""
    listing, names = hashlib.sha256(), []
    for path in sorted(folder.rglob("*")):
        if there(path.is_file):
            status, name = path.stat(), path.relative_to(folder).as_posix()
            listing.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape"))
            if _is_image(name):
                names.append(name)
    return f"{folder.resolve()} {listing.hexdigest()} {image_size}", names


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
