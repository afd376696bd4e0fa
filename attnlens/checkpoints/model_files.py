"""The files a model on disk is read from: what tells whether it is still the same, and what nothing may replace."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from attnlens.checkpoints.adapter_config import AdapterConfig
from attnlens.checkpoints.base import INDEX_SUFFIX
from attnlens.checkpoints.formats import PACKED_SUFFIXES, SUFFIXES
from attnlens.checkpoints.packed import CONFIGURATIONS
from attnlens.checkpoints.shards import read_index
from attnlens.errors import CheckpointError
from attnlens.strict_json import there

_WEIGHTS = (*SUFFIXES, *PACKED_SUFFIXES, INDEX_SUFFIX)


def model_files(path: Path) -> list[Path]:
    """Return the files that the model of a folder, weight file or index may be read from, sorted.

    They are its weights, what describes them, the shards of an index, and those of an adapter's base. What cannot be
    read is left to the reading of the model, which says so.
    """
    found, base = _files_of(path)
    return sorted(found | (_files_of(base)[0] if base else set()))


def _files_of(path: Path) -> tuple[set[Path], Path | None]:
    """Return the files of one model, and where the base of an adapter is; a base is no adapter itself."""
    folder, whole = (path, True) if there(path.is_dir) else (path.parent, False)
    files = {folder / name for name in CONFIGURATIONS} | {path}
    with suppress(OSError):  # a folder that may be entered and not listed
        files |= {file for file in folder.iterdir() if file.name.lower().endswith(_WEIGHTS)} if whole else set()
    for index in [file for file in files if file.name.endswith(INDEX_SUFFIX)]:
        with suppress(CheckpointError):
            files |= {folder / shard for shard in read_index(index)[0].values()}
    base = ""
    if whole and there((folder / "adapter_config.json").is_file):
        with suppress(CheckpointError):
            base = AdapterConfig(folder).base()
    return {file for file in files if there(file.is_file)}, Path(base) if base and there(Path(base).exists) else None
