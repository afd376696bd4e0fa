"""What a tree of image files is as a data set: classes, which images train, which test, which are left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attnlens.training.data.image_files import DatasetError
from attnlens.training.data.order import generator
from attnlens.words import counted

TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")
"""In this order: the first one whose images lie in class folders is tested on, the others are left out."""
HELD_OUT = 5
"""Without a test folder every fifth image of a class, in a fixed random order, is held out."""
_NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Split:
    """Paths of the images to train and to test on, each sorted, with labels that count ``classes``."""

    train: tuple[str, ...]
    train_labels: NDArray[np.int64]
    test: tuple[str, ...]
    test_labels: NDArray[np.int64]
    classes: tuple[str, ...]
    unused: dict[str, int]
    """By folder, images that are neither trained nor tested on."""
    tested: str
    """Name of the folder tested on; empty where a part of each class is held out."""


def split_of(name: str, paths: Iterable[str], *, packed: bool = False) -> Split:
    """Return the split of images in ``[train/|test/]CLASS/.../IMAGE``: the class is the first folder below the split.

    ``val`` or ``validation`` is tested on where there is no ``test``; without any of them every `HELD_OUT`-th image of
    a class is, and a class of one image is trained on alone. A lone folder around everything is stepped into where the
    split lies in it, and in an archive (``packed``). Raises `DatasetError` for what is no data set of classes.
    """
    around, found = _inside(sorted(paths), packed=packed)
    tops = Counter(path.partition("/")[0] for path in found if "/" in path)
    splits = {top.lower(): top for top in sorted(tops)}
    train = next((splits[known] for known in TRAIN_FOLDERS if known in splits), None)
    tests = [splits[known] for known in TEST_FOLDERS if known in splits]
    if train is None and tests and len(tops) == len(tests):
        raise DatasetError(f"{name} holds {tests[0]}/ and no train/: there is nothing to train on")
    if train is None or not (tests or all("/" in path for path in _below(train, found))):
        return _held_out(name, found, around, {})  # no split: a folder called train, too, is then a class
    flat = next((path for path in found if "/" not in path), None)
    if flat is not None:
        raise _no_class(name, flat)
    labelled = [top for top in tests if all("/" in path for path in _below(top, found))]
    tests = labelled or tests  # a test/ of images without classes stands beside many a val/ with them
    used = (train, *tests[:1])
    unused = {top: count for top, count in tops.items() if top not in used}
    inside = _below(train, found)
    if not tests:
        return _held_out(name, inside, f"{around}{train}/", unused)
    classes, tested = _classes(name, inside, train), _below(tests[0], found)
    strange = sorted({path.partition("/")[0] for path in tested if "/" in path} - set(classes))
    if strange:
        raise DatasetError(
            f"{name}: {tests[0]}/ holds {'the class' if len(strange) == 1 else 'the classes'} {_named(strange)}, of "
            f"which {train}/ holds no image: give both the same classes"
        )
    _classes(name, tested, tests[0], least=1)
    return Split(
        *_labelled(inside, classes, f"{around}{train}/"),
        *_labelled(tested, classes, f"{around}{tests[0]}/"),
        classes,
        unused,
        tests[0],
    )


def _below(top: str, paths: Iterable[str]) -> list[str]:
    return [path.removeprefix(f"{top}/") for path in paths if path.startswith(f"{top}/")]


def _inside(paths: Sequence[str], *, packed: bool) -> tuple[str, list[str]]:
    """Step into folders that lie around everything; return their path, and what lies in them in the same order."""
    around, inside = "", list(paths)
    while len({path.partition("/")[0] for path in inside}) == 1 and all(path.count("/") > 1 for path in inside):
        top = inside[0].partition("/")[0]
        stripped = _below(top, inside)
        split = set(TRAIN_FOLDERS) & {path.partition("/")[0].lower() for path in stripped}
        if top.lower() in (*TRAIN_FOLDERS, *TEST_FOLDERS) or not (packed or split):
            break
        around, inside, packed = f"{around}{top}/", stripped, False  # a second folder is somebody's class
    return around, inside


def _held_out(name: str, paths: Sequence[str], around: str, unused: dict[str, int]) -> Split:
    classes = _classes(name, paths)
    every, labels = _labelled(paths, classes, around)
    test = np.zeros(len(every), bool)
    for label in range(len(classes)):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            test[generator(label, 0, "split").permutation(members)[::HELD_OUT]] = True
    if not test.any():
        raise DatasetError(
            f"{name} holds {len(every)} images of {len(classes)} classes, one each: none is left to test on. Give at "
            "least two of a class, or a test/ folder"
        )
    trained, tested = (tuple(path for path, one in zip(every, test, strict=True) if one == part) for part in (0, 1))
    return Split(trained, labels[~test], tested, labels[test], classes, unused, "")


def _classes(name: str, paths: Iterable[str], top: str = "", least: int = 2) -> tuple[str, ...]:
    """Return the classes of paths below ``top``. Raises `DatasetError` for an image in none, and for too few."""
    paths = list(paths)
    flat = next((path for path in paths if "/" not in path), None)
    if flat is not None:
        raise _no_class(name, f"{top}/{flat}" if top else flat)
    classes = tuple(sorted({path.partition("/")[0] for path in paths}))
    if len(classes) < least:
        raise DatasetError(
            f"{name} has one class, {classes[0]}: there is nothing to tell apart. If its subfolders are the classes, "
            "name that folder"
        )
    return classes


def _labelled(paths: Sequence[str], classes: Sequence[str], prefix: str) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    number = {label: index for index, label in enumerate(classes)}
    labels = np.array([number[path.partition("/")[0]] for path in paths], np.int64)
    return tuple(f"{prefix}{path}" for path in paths), labels


def _no_class(name: str, path: str) -> DatasetError:
    return DatasetError(f"{name}: {path} lies in no class folder: expected [train/|test/]CLASS/IMAGE")


def _named(words: Sequence[str]) -> str:
    more = len(words) - _NAMED_AT_MOST
    return ", ".join(words[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def told(split: Split, left_out: Mapping[str, int]) -> str:
    """Say what of a data set is used and what is left out: one line."""
    tested = f"{split.tested}/" if split.tested else "a fifth of each class"
    counts = f"{len(split.train)} training and {counted(len(split.test), 'test image')} ({tested})"
    words = [f"{counts} of {len(split.classes)} classes: {_named(split.classes)}"]
    missing = [split.classes[label] for label in sorted(set(split.train_labels) - set(split.test_labels))]
    if missing:
        words.append(f"no test image of {_named(missing)}")
    if left_out:
        words.append("left out: " + ", ".join(f"{count} {what}" for what, count in left_out.items()))
    return "; ".join(words)
