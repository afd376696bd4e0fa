"""Texts as bytes: files at hand or WikiText-103, split by position into training and test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from attnlens.errors import UsageError
from attnlens.patterns import matching_paths
from attnlens.strict_json import there, within
from attnlens.training.data.image_files import DatasetError
from attnlens.training.data.on_device import Dataset, Epoch, hash_of
from attnlens.training.data.order import digest, generator
from attnlens.words import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnlens.training.config import Config

PREFIX = "text:"
WIKITEXT = "wikitext-103"
TEST_SHARE = 10
"""One byte in so many, the last ones, is held out."""
SUFFIXES = (".txt", ".md", ".rst", ".tex", ".text")
"""Files of a folder that are read; a file or pattern that is named may have any ending."""
_LARGEST = 2 * 2**30

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Text(Dataset):
    """A text in memory: the bytes to train on and the bytes to test on, and how many windows an epoch draws."""

    train: Bytes
    test: Bytes
    files: int
    split: str
    windows: int = 1
    test_windows: int | None = None
    kind: ClassVar[str] = "text"
    holds: ClassVar[str] = "is text"
    foreign: ClassVar[Mapping[str, str]] = dict.fromkeys(("patch_size", "image_size", "augment"), "images")
    default_model: ClassVar[str] = "gpt-tiny"

    def sha256(self) -> str:
        """Return the hash of both splits."""
        return hash_of(self.train, self.test)

    def sizes(self, chosen: Mapping[str, Any]) -> dict[str, Any]:
        """See `Dataset`."""
        return {"context": chosen["context"]}

    def kept(self, chosen: Mapping[str, Any]) -> Text:
        """See `Dataset`."""
        return self.cut(chosen["context"], chosen["train_images"], chosen["test_images"])

    def counts(self, chosen: Mapping[str, Any]) -> tuple[int, int]:
        """See `Dataset`."""
        return self.windows, len(self.test_starts(chosen["context"]))

    def text_facts(self) -> dict[str, Any]:
        """See `Dataset`."""
        sizes = {"train_bytes": len(self.train), "test_bytes": len(self.test)}
        return {"files": self.files, **sizes, "split": self.split}

    def resident(self, config: Config, device: torch.device) -> ResidentText:
        """See `Dataset`."""
        return ResidentText(self, config, device)

    def cut(self, context: int, windows: int, test_windows: int | None) -> Text:
        """Resolve how many windows are drawn an epoch and how many of the test split are measured on.

        Raises `UsageError` where a split is too short, or holds fewer windows than requested.
        """
        for split, title in ((self.train, "training"), (self.test, "test")):
            if len(split) <= context:
                raise UsageError(
                    f"the {title} split of {self.name} has {counted(len(split), 'byte')}, too few for a window of "
                    f"{context} and the byte behind it: give a longer text or a smaller --context"
                )
        held = len(self.test_starts(context))
        if test_windows is not None and test_windows > held:
            raise UsageError(
                f"--test-images {test_windows}: the test split of {self.name} has {counted(held, 'window')}"
            )
        return replace(self, windows=windows, test_windows=test_windows)

    def test_starts(self, context: int) -> NDArray[np.int64]:
        """Return where the windows of the test split begin: side by side, so that each byte is predicted once.

        The first byte and the last ones that fill no window are not predicted. ``test_windows`` of them are spread
        evenly over the split.
        """
        starts = np.arange(0, len(self.test) - context, context)
        if self.test_windows is None:
            return starts
        return starts[np.linspace(0, len(starts) - 1, self.test_windows).round().astype(np.int64)]

    def tuning(self) -> Text:
        """Split the training bytes by position: the last tenth is what learning rates are chosen on."""
        train, test = split_text(self.train)
        return replace(self, name=f"{self.name}, tuning split", train=train, test=test, test_windows=None)


class ResidentText:
    """Bytes; an epoch is a fixed number of windows that begin anywhere, each byte of which is a target."""

    def __init__(self, text: Text, config: Config, device: torch.device) -> None:
        import torch

        self.context, self.count = config.network.targets_per_item, text.windows
        self.batch_size, self.device = config.recipe.batch_size, device
        self.whole = len(text.train) / self.context
        self.train, test = (torch.from_numpy(split.copy()).to(device) for split in (text.train, text.test))
        self.test_inputs, self.test_targets = self._windows(test, torch.from_numpy(text.test_starts(self.context)))

    def _windows(self, content: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return bytes ``[window, context]`` and those one further on."""
        import torch

        positions = starts.to(self.device)[:, None] + torch.arange(self.context, device=self.device)
        return content[positions], content[positions + 1]

    def epoch(self, seed: int, epoch: int) -> Epoch:
        """See `attnlens.training.data.on_device.Resident`."""
        import torch

        drawn = self.count // self.batch_size * self.batch_size
        starts = generator(seed, epoch, "order").integers(0, len(self.train) - self.context, drawn, dtype=np.int64)
        return Epoch(*self._windows(self.train, torch.from_numpy(starts)), digest(starts, {}))


def split_text(content: Bytes) -> tuple[Bytes, Bytes]:
    """Cut the last tenth off."""
    end = len(content) - len(content) // TEST_SHARE
    return content[:end], content[end:]


def load_text(name: str, *, data_dir: Path | None = None) -> Text:
    """Return ``text:FILE``, ``text:FOLDER``, ``text:PATTERN`` (files joined by a line break) or ``text:wikitext-103``.

    Files are taken as they are, byte for byte, in the order of their paths; the last tenth of the whole is the test
    split. WikiText-103 keeps its own splits. Raises `DatasetError` for what is no text, `UsageError` for no files.
    """
    pattern = name.removeprefix(PREFIX)
    if pattern == WIKITEXT:
        return _wikitext(data_dir)
    paths = text_files(name, data_dir=data_dir)
    total = sum(path.stat().st_size for path in paths)
    if total > _LARGEST:
        raise DatasetError(f"{name} holds {total} bytes, more than {_LARGEST} can be read: name fewer files")
    try:
        content = np.frombuffer(b"\n".join(path.read_bytes() for path in paths), np.uint8)
    except OSError as error:
        raise DatasetError(f"{name} cannot be read ({error})") from error
    if not content.size:
        raise DatasetError(f"{name} is empty")
    if not content.all():
        odd = next(path for path in paths if b"\0" in path.read_bytes())
        raise DatasetError(f"{odd} holds bytes of value 0: that is no text")
    train, test = split_text(content)
    return Text(_title(pattern), train, test, len(paths), "the last tenth of the bytes is the test part")


def text_files(name: str, *, data_dir: Path | None = None) -> list[Path]:
    """Return the files of a text, none of one that the package datasets keeps. Raises `UsageError` without any."""
    pattern = name.removeprefix(PREFIX)
    if pattern == WIKITEXT:
        return []
    pattern = pattern if data_dir is None else str(data_dir / pattern)
    path = Path(pattern)
    if there(path.is_dir):
        files = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and there(file.is_file)]
        files = [within(path, file, DatasetError) for file in files]
        hint = f"it holds no file ending in {', '.join(SUFFIXES)}"
    elif there(path.is_file):
        files, hint = [path], ""
    else:
        files = [match for match in matching_paths(pattern) if there(match.is_file)]
        hint = "there is no such file or folder, and no file matches it as a pattern"
    if not files:
        raise UsageError(f"--dataset {name}: {hint}. Name a text file, a folder of them, or {PREFIX}{WIKITEXT}")
    return sorted(files)


def _title(pattern: str) -> str:
    return f"{PREFIX}{Path(pattern).name}"


def _wikitext(cache: Path | None) -> Text:
    """Read WikiText-103 (raw) through the package datasets, its own training and test parts."""
    try:
        import datasets
    except ImportError as error:
        raise DatasetError(
            f"{WIKITEXT} needs the package datasets: pip install datasets, or train on {PREFIX}FILE"
        ) from error
    try:
        folder = None if cache is None else str(cache)
        parts = datasets.load_dataset("Salesforce/wikitext", "wikitext-103-raw-v1", cache_dir=folder)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise DatasetError(f"{WIKITEXT} could not be read ({reason}): train on {PREFIX}FILE instead") from error
    train, test = (np.frombuffer("".join(parts[part]["text"]).encode(), np.uint8) for part in ("train", "test"))
    return Text(f"{PREFIX}{WIKITEXT}", train, test, 1, "WikiText-103's own training and test parts")
