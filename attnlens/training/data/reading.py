"""Decoding the images of a folder or archive to a file of pixels, and cutting them into training and test images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from attnlens.errors import UsageError
from attnlens.memory import free_memory, in_words
from attnlens.training.data.cache import Decoded
from attnlens.training.data.decoding import pixels_of, quiet_pillow
from attnlens.training.data.folders import split_of, told
from attnlens.training.data.image_files import SUFFIXES, Budget, DatasetError, Read, UnreadableError, hidden, opened
from attnlens.training.data.rows import Pixels, Rows, picked
from attnlens.words import counted

Say = Callable[[str], None]
"""Is told how far something has got."""
_AT_ONCE = 256


def silent(_text: str) -> None:
    """Say nothing."""


def decoded(
    name: str, files: Iterator[Read], image_size: int | None, cache: Path, say: Say = silent, *, packed: bool = False
) -> Decoded:
    """Decode images in class folders, below train/ and test/ or without, in the order of their paths.

    Hidden files and images that are damaged are left out, and counted. Raises `DatasetError` where nothing is left,
    and what `split_of` raises; `UsageError` where images differ in size.
    """
    budget = Budget(name)
    places: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    damaged: list[UnreadableError] = []
    animated: list[str] = []

    def decode(item: Read) -> tuple[str, Pixels | UnreadableError, bool]:
        try:
            with opened(name, item, budget) as image:
                return item[0], pixels_of(image, image_size), getattr(image, "is_animated", False)
        except UnreadableError as error:
            return item[0], error, False

    with Rows(cache) as rows, quiet_pillow():
        with ThreadPoolExecutor() as pool:
            while batch := list(islice(files, _AT_ONCE)):  # a pool's own map would read all files before the first
                seen = [item for item in batch if not hidden(item[0])]
                left_out["hidden"] += len(batch) - len(seen)
                for path, pixels, moving in pool.map(decode, seen):
                    if isinstance(pixels, UnreadableError):
                        damaged.append(pixels)
                        continue
                    _check_size(name, pixels, rows)
                    animated += [path] * moving
                    places[path] = rows.count  # an archive may hold a name twice: the last one counts, as on a disk
                    rows.add(pixels)
                say(f"{name}: images decoded: {len(places):,}")
        if not places:
            raise damaged[0] if damaged else no_images(name)
        pixels = rows.array()
    split = split_of(name, places, packed=packed)
    left_out |= Counter({f"in {folder}/": count for folder, count in split.unused.items()})
    left_out["unreadable"] = len(damaged)
    counts = {what: count for what, count in left_out.items() if count}
    words = [told(split, counts)]
    if damaged:
        words.append(f"the first unreadable one: {damaged[0].path} ({damaged[0].reason})")
    if animated:
        words.append(f"of {counted(len(animated), 'animated image')} ({animated[0]}, ...) the first frame")
    train, test = (picked(pixels, np.array([places[path] for path in paths])) for paths in (split.train, split.test))
    note = "; ".join(words)
    return Decoded(train, split.train_labels, test, split.test_labels, split.classes, counts, note)


def no_images(name: str) -> DatasetError:
    """Return the refusal of a folder or archive without any image."""
    return DatasetError(f"{name} holds no images ({', '.join(SUFFIXES)})")


def _check_size(name: str, pixels: Pixels, rows: Rows) -> None:
    _, height, width = pixels.shape
    if height != width or (rows.shape and rows.shape != pixels.shape):
        raise UsageError(f"the images of {name} are not all squares of one size: pass --image-size")


def in_memory(data: Decoded) -> Decoded:
    """Copy a data set to memory, for want of a cache. Raises `DatasetError` where there is too little."""
    size, free = data.train.nbytes + data.test.nbytes, free_memory()
    if free is not None and size > free / 2:
        raise DatasetError(
            f"the decoded images take {in_words(size)}, {in_words(free)} of memory are free, and the cache cannot be "
            "written: set XDG_CACHE_HOME to a folder with that much space, or pass a smaller --image-size"
        )
    return data._replace(train=np.array(data.train[:]), test=np.array(data.test[:]))
