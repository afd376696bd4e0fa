"""Weights as a caller gives them: a file, a folder that holds one, or a state dict; and the JSON beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnlens.checkpoints import Checkpoint, open_checkpoint
from attnlens.checkpoints.adapter_config import ADAPTER_BESIDE
from attnlens.checkpoints.base import INDEX_SUFFIX, NUMPY_SUFFIXES, SAFETENSORS_SUFFIXES, TORCH_SUFFIXES
from attnlens.checkpoints.formats import OTHER_FORMATS, PACKED_SUFFIXES
from attnlens.checkpoints.networks import rechosen
from attnlens.checkpoints.open import as_read
from attnlens.checkpoints.shards import TRANSFORMERS_FILES
from attnlens.errors import CheckpointError, ModelNotFoundError, UsageError
from attnlens.models.diffusers import WEIGHT_FILES as DIFFUSERS_FILES
from attnlens.models.opened import Access, Weights
from attnlens.state import read_state
from attnlens.strict_json import parse_json, there, within

TIMM_FILES = (
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
"""What timm looks for in a folder behind the names of transformers, in that order; on the hub it looks for fewer."""
_SUFFIXES = (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES, *NUMPY_SUFFIXES, INDEX_SUFFIX, *OTHER_FORMATS, *PACKED_SUFFIXES)


def _stem(name: str) -> str:
    """Return a file's name without its endings: ``last`` of ``last.pth.tar``."""
    cut = next((len(suffix) for suffix in _SUFFIXES if name.lower().endswith(suffix) and name.lower() != suffix), 0)
    return _stem(name[:-cut]) if cut else name


_WHOLE = {_stem(name) for name in (*TRANSFORMERS_FILES, *DIFFUSERS_FILES)} | {"adapter_model", "model", "weights"}
_WORD = (
    r"(open_clip_|flax_|pytorch_|adapter_)?model|checkpoint|ckpt|epoch|global_step|step|iter|of"
    r"|best|last|latest|final|state_dict|ema"
)
_COMMON = re.compile(rf"{'|'.join(map(re.escape, sorted(_WHOLE)))}|({_WORD})([._=-]?({_WORD}|\d++))*")
"""Stems that say nothing of which model a file is of"""


def weights_of(given: Weights, access: Access) -> Checkpoint:
    """Open what a caller gave as weights: a state dict in memory or a file; of several networks the one asked for."""
    if isinstance(given, Checkpoint):
        return rechosen(given, access.network)
    if isinstance(given, Mapping):
        from attnlens.checkpoints.memory import StateDict

        return as_read(StateDict(given), access.network)
    if not isinstance(given, str | os.PathLike):
        raise UsageError(
            f"a {type(given).__name__} is no checkpoint: give a file or a state dict, as model.state_dict()"
        )
    return open_checkpoint(given, access.network)


def is_weight_name(path: Path) -> bool:
    """Return whether a file's name ends as one that holds weights, in a format that is read or told from those."""
    return path.name.lower().endswith(_SUFFIXES)


def weights_in(folder: Path) -> Path:
    """Return the weight file, or the index of its shards, of a model folder: the one that its library would take.

    Refuses a folder with an adapter in it, and one whose configuration names another file.
    """
    if there((folder / "adapter_config.json").is_file):
        raise CheckpointError(f"{folder} {ADAPTER_BESIDE}")
    if there((folder / "config.json").is_file):
        _check_names_no_file(config_in(folder), folder / "config.json")
    names = (*TRANSFORMERS_FILES, *TIMM_FILES, *DIFFUSERS_FILES)
    found = next((folder / name for name in names if there((folder / name).is_file)), None)
    if found is None:
        raise ModelNotFoundError(f"{folder} holds no weights: one of {', '.join(names)} is expected")
    return within(folder, found, CheckpointError)


def alone_in(folder: Path) -> Path | None:
    """Return the weight file, or index of shards, of a folder that holds one; None where it holds none or several."""
    indices = [path for path in folder.iterdir() if path.name.endswith(INDEX_SUFFIX)]
    files = indices or [path for path in folder.iterdir() if there(path.is_file) and is_weight_name(path)]
    return within(folder, files[0], CheckpointError) if len(files) == 1 else None


def title_of(path: Path) -> str:
    """Return what a weight file's model is called: its folder's name where every model's file is called the same."""
    stem, folder = _stem(path.name if is_weight_name(path) else path.stem), path.absolute().parent.name
    if not folder or not _COMMON.fullmatch(stem.lower()):
        return stem
    return folder if stem.lower() in _WHOLE else f"{folder}-{stem}"


def config_in(folder: Path) -> dict[str, Any]:
    """Return the JSON object that is a model folder's ``config.json``. Raises `CheckpointError`."""
    path = within(folder, folder / "config.json", CheckpointError)
    try:
        content = read_state(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    return parse_object(content, path)


def weights_on_hub(repo: str, config: Path, revision: str, access: Access) -> tuple[Checkpoint, dict[str, str]]:
    """Open the weights of a hub repository with a ``config.json``, and say which repository and commit they are of."""
    from attnlens.checkpoints.hub import open_weights, refuse_adapter

    refuse_adapter(repo, revision or None, offline=access.offline)
    _check_names_no_file(config_in(config.parent), repo)
    found, source = open_weights(repo, None, revision or None, offline=access.offline, remote=access.remote)
    return rechosen(found, access.network), source


def _check_names_no_file(config: Mapping[str, Any], where: Path | str) -> None:
    """Refuse a configuration that has transformers read weights from a file of another name than it looks for."""
    if named := config.get("transformers_weights"):
        raise CheckpointError(
            f"{where} says that the weights are in {named!s:.100}: give that file as --checkpoint, or take this out"
        )


def parse_object(text: bytes, where: Path | str) -> dict[str, Any]:
    """Parse a JSON object. Raises `CheckpointError` naming ``where`` for anything else."""
    try:
        data = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{where} holds broken JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} holds a JSON {type(data).__name__} where an object is expected")
    return data
