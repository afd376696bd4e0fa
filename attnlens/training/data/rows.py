"""Images in a file rather than in memory: written one after another, read back a few at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from attnlens.memory import free_memory, in_words
from attnlens.training.data.image_files import DatasetError

Pixels = NDArray[np.uint8]
BLOCK = 1 << 26
"""Bytes that are read at once of images that lie in a file."""
_OF_FREE = 0.25
"""Share of the free memory that a data set may take and still be held in it: an epoch's copies take more."""


@dataclass(frozen=True)
class Picked:
    """Some of the images ``[image, channel, row, column]`` of a file, in an order of their own."""

    file: Pixels
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Pixels:
        """Read images, by a slice or by an array of positions."""
        return np.asarray(self.file[self.rows[index]])

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return (len(self.rows), *self.file.shape[1:])

    @property
    def nbytes(self) -> int:
        """As of an array."""
        return len(self.rows) * self.file[:1].nbytes


Held = Pixels | Picked
"""Images in memory, in a file (`numpy.memmap`), or some of those in a file."""


def in_file(images: Held) -> bool:
    """Whether images are read from a file when they are needed."""
    return isinstance(images, Picked | np.memmap)


def picked(images: Held, rows: NDArray[Any]) -> Held:
    """Return the images at some positions: a copy of those in memory, a view of those in a file."""
    if isinstance(images, Picked):
        return Picked(images.file, images.rows[rows])
    return Picked(images, np.arange(len(images))[rows]) if isinstance(images, np.memmap) else images[rows]


def blocks(images: NDArray[Any] | Picked) -> Iterator[NDArray[Any]]:
    """Yield the entries of an array in their order, some `BLOCK` bytes at a time."""
    step = max(1, BLOCK // max(1, images.nbytes // max(1, len(images))))
    for start in range(0, len(images), step):
        yield np.ascontiguousarray(images[start : start + step])


def fits(size: int) -> bool:
    """Whether a data set of so many bytes is held in memory."""
    free = free_memory()
    return free is None or size <= _OF_FREE * free


class Rows:
    """Images of one shape, appended to a file without a name, which is gone with the process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.shape: tuple[int, ...] = ()
        self._file: IO[bytes] | None = None

    def _opened(self) -> IO[bytes]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=self.folder)
        except OSError:
            return tempfile.TemporaryFile()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, image: Pixels) -> None:
        """Append an image. Raises `DatasetError` where the disk is full."""
        if self._file is None:
            self._file, self.shape = self._opened(), image.shape
        assert image.shape == self.shape
        try:
            self._file.write(np.ascontiguousarray(image).data)
        except OSError as error:
            taken = in_words(self.count * image.nbytes)
            raise DatasetError(
                f"the decoded images do not fit on the disk of the cache ({error.strerror} after {taken}): pass a "
                "smaller --image-size, or set XDG_CACHE_HOME to a folder on a larger disk"
            ) from error
        self.count += 1

    def array(self) -> Pixels:
        """Return all images, mapped: they stay when the file is closed."""
        assert self._file is not None
        self._file.flush()
        return np.memmap(self._file, np.uint8, "c", shape=(self.count, *self.shape))
