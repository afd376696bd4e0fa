"""The cache of decoded images: one file a data set, checked when it is read, mapped where memory is short."""

from __future__ import annotations

import json
import math
import zipfile
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.lib import format as stored_format
from numpy.typing import NDArray

from attnlens.checkpoints.archives import array_header, check_archive, data_offset
from attnlens.training.data.on_device import hash_of
from attnlens.training.data.rows import Held, blocks, fits

_ARRAYS = ("train", "train_labels", "test", "test_labels")


class Decoded(NamedTuple):
    """A data set of images as it was decoded: pixels ``[image, channel, row, column]``, labels, names of classes."""

    train: Held
    train_labels: NDArray[np.int64]
    test: Held
    test_labels: NDArray[np.int64]
    classes: tuple[str, ...]
    left_out: dict[str, int]
    """Images that are not used, by reason."""
    note: str
    """What was found, in a line."""

    def sha256(self) -> str:
        """Return the hash of images, labels and classes."""
        return hash_of(*self[:4], start=repr(self.classes))


def write_decoded(file: IO[bytes], data: Decoded) -> None:
    """Write an ``.npz`` whose members are stored as they are, images a block at a time."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, images in (("train", data.train), ("test", data.test)):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": tuple(images.shape)}
                stored_format.write_array_header_1_0(member, header)
                for block in blocks(images):
                    member.write(block.data)
        others: dict[str, Any] = {
            "train_labels": data.train_labels,
            "test_labels": data.test_labels,
            "classes": np.array(data.classes),
            "told": np.array([json.dumps({"left_out": data.left_out, "note": data.note})]),
            "sha256": np.array(data.sha256()),
        }
        for name, array in others.items():
            with archive.open(f"{name}.npy", "w") as member:
                stored_format.write_array(member, array, allow_pickle=False)


def read_decoded(path: Path) -> Decoded:
    """Read what `write_decoded` wrote, into memory or mapped. Raises one of `DAMAGED_ARRAY` for anything else."""
    found: dict[str, Any] = {}
    whole = fits(path.stat().st_size)
    with path.open("rb") as opened, zipfile.ZipFile(opened) as archive:
        for member in check_archive(opened, stored=True):
            with archive.open(member) as file:
                shape, kind = array_header(file)
                name, start = member.filename.removesuffix(".npy"), data_offset(opened, member) + file.tell()
            if name in ("train", "test") and not whole:
                found[name] = _mapped(path, start, shape, kind)
    with np.load(path, allow_pickle=False) as stored:
        names = (*_ARRAYS, "classes", "told", "sha256")
        found |= {name: stored[name] for name in names if name not in found}
    kinds = [(found[name].dtype.str, found[name].ndim) for name in _ARRAYS]
    words = [(found[name].dtype.kind, found[name].ndim) for name in ("classes", "told")]
    if kinds != [("|u1", 4), ("<i8", 1)] * 2 or words != [("U", 1)] * 2:
        raise ValueError("it holds arrays of other types")
    told = json.loads(found["told"][0])
    train, train_labels, test, test_labels = (found[name] for name in _ARRAYS)
    classes, left_out = tuple(found["classes"].tolist()), {str(what): int(n) for what, n in told["left_out"].items()}
    data = Decoded(train, train_labels, test, test_labels, classes, left_out, str(told["note"]))
    same_length = len(data.train) == len(data.train_labels) and len(data.test) == len(data.test_labels)
    labels = np.concatenate([data.train_labels, data.test_labels])
    known = len(labels) > 0 and labels.min() >= 0 and labels.max() < len(data.classes)
    if not same_length or not known or data.sha256() != str(found["sha256"]):
        raise ValueError("it is damaged")
    return data


def _mapped(path: Path, start: int, shape: tuple[int, ...], kind: np.dtype[Any]) -> NDArray[Any]:
    """Map an array that lies in a file as it is; pages are private, so that torch may take it for writable."""
    if start + math.prod(shape) * kind.itemsize > path.stat().st_size:
        raise ValueError("a member is longer than its file")
    return np.memmap(path, kind, "c", start, shape)
