"""The files a model on disk is read from: what tells whether it is still the same, and what nothing may replace."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from attnlens.checkpoints.adapters import base_of
from attnlens.checkpoints.base import INDEX_SUFFIX
from attnlens.checkpoints.formats import PACKED_SUFFIXES, SUFFIXES
from attnlens.checkpoints.packed import CONFIGURATIONS
from attnlens.checkpoints.shards import read_index
from attnlens.errors import CheckpointError

_WEIGHTS = (*SUFFIXES, *PACKED_SUFFIXES, INDEX_SUFFIX)


def model_files(path: Path) -> list[Path]:
    """Return the files that the model of a folder, weight file or index may be read from, sorted.

    They are its weights, what describes them, the shards of an index, and those of an adapter's base. What cannot be
    read is left to the reading of the model, which says so.
    """
    return sorted(_found(path, set()))


def _found(path: Path, found: set[Path]) -> set[Path]:
    folder = path if path.is_dir() else path.parent
    weights = folder.iterdir() if path.is_dir() else [path]
    files = {file for file in weights if file.name.lower().endswith(_WEIGHTS)}
    files |= {folder / name for name in CONFIGURATIONS}
    for index in [file for file in files if file.name.endswith(INDEX_SUFFIX)]:
        with suppress(CheckpointError):
            files |= {folder / shard for shard in read_index(index)[0].values()}
    new = {file for file in files if file.is_file()} - found
    found |= new
    if path.is_dir() and new and (folder / "adapter_config.json") in new:
        with suppress(CheckpointError):
            base = Path(base_of(folder))
            if base.name and base.exists():
                _found(base, found)
    return found
