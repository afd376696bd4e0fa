"""From what a user typed (a name, a file, a folder, a module) to an architecture and its weights."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.architecture import Architecture, describe_architecture, describe_module
from attnlens.checkpoints import Checkpoint, ModuleWeights, open_checkpoint
from attnlens.checkpoints.files import SAFETENSORS_SUFFIXES, TORCH_SUFFIXES
from attnlens.errors import CheckpointError, ModelNotFoundError, UnsupportedAttentionError, UsageError

if TYPE_CHECKING:
    from torch import nn

StrPath = str | os.PathLike[str]

EMBEDDED = Path(__file__).parent / "embedded"
"""Folder of the small pre-trained ViT shipped with the package."""


@dataclass(frozen=True)
class OpenedModel:
    """An architecture with weights that fit it."""

    name: str
    architecture: Architecture
    checkpoint: Checkpoint
    source: dict[str, str]

    def provenance(self) -> dict[str, Any]:
        """Return where the weights came from: how they were named and, for a file, its size and hash."""
        return {**self.source, **self.checkpoint.provenance()}


def open_model(model: StrPath | nn.Module | None, checkpoint: StrPath | None) -> OpenedModel:
    """Find the architecture and the weights for ``model`` and ``checkpoint``, and check that they fit each other.

    ``model`` is None (the shipped ViT), a live module, a checkpoint file, a folder or ``local-dir:`` name with a
    ``config.json``, an ``hf-hub:`` name, or a timm name with or without tag; ``checkpoint`` overrides the weights.
    Raises `ModelNotFoundError`, `CheckpointError`, `UnsupportedAttentionError` or `UsageError`.
    """
    opened = _open(model, checkpoint)
    if not opened.architecture.specs:
        first = opened.architecture.refused[0]
        raise UnsupportedAttentionError(
            f"no attention layer of {opened.name} can be read. {first.path} ({first.module_class}) {first.reason}"
        )
    _check_fit(opened)
    return opened


def _open(model: Any, checkpoint: StrPath | None) -> OpenedModel:
    if model is None and checkpoint is None:
        return _open_folder(EMBEDDED, None, "embedded")
    if model is None:
        return _open_file(Path(os.fspath(checkpoint)), "--checkpoint")  # type: ignore[arg-type]
    if not isinstance(model, str | os.PathLike):
        architecture = describe_module(model)
        weights = ModuleWeights(model) if checkpoint is None else open_checkpoint(checkpoint)
        return OpenedModel(architecture.name, architecture, weights, {"model": architecture.name})
    name = os.fspath(model)
    scheme, _, rest = name.partition(":")
    if scheme == "local-dir":
        return _open_folder(Path(rest), checkpoint, name)
    if scheme in ("hf-hub", "hf_hub"):
        return _open_hub(rest, checkpoint, name)
    path = Path(name)
    if path.is_dir():
        return _open_folder(path, checkpoint, f"local-dir:{name}")
    if path.suffix.lower() in (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES) and (path.is_file() or os.sep in name):
        if checkpoint is not None:
            raise UsageError(f"{name} and --checkpoint {checkpoint} are both files: MODEL must name the architecture")
        return _open_file(path, "MODEL")
    return _open_timm(name, checkpoint)


def _open_timm(name: str, checkpoint: StrPath | None) -> OpenedModel:
    base, _, tag = name.removeprefix("timm/").partition(".")
    architecture = describe_architecture(base)
    if tag and tag not in architecture.weights:
        tags = ", ".join(known for known in architecture.weights if known) or "none"
        raise ModelNotFoundError(f"{base} has no pretrained tag {tag!r}: timm knows {tags}")
    if checkpoint is not None:
        return OpenedModel(base, architecture, open_checkpoint(checkpoint), {"model": name})
    if not architecture.weights:
        raise ModelNotFoundError(f"timm has no pretrained weights for {base}: pass --checkpoint FILE")
    tag = tag or next(iter(architecture.weights))
    entry = architecture.weights[tag]
    if not entry["hf_hub_id"]:
        raise ModelNotFoundError(
            f"{base}.{tag} is not on the hub but at {entry['url']}: download it and pass --checkpoint FILE"
        )
    from attnlens.checkpoints.hub import fetch_weights

    path = fetch_weights(entry["hf_hub_id"], entry["hf_hub_filename"])
    full = f"{base}.{tag}" if tag else base
    return OpenedModel(full, architecture, open_checkpoint(path), {"model": name, "hub": entry["hf_hub_id"]})


def _open_hub(repo: str, checkpoint: StrPath | None, name: str) -> OpenedModel:
    from attnlens.checkpoints.hub import fetch, fetch_weights

    repo, _, revision = repo.partition("@")
    config = fetch(repo, "config.json", revision or None)
    if config is None:
        raise ModelNotFoundError(f"{repo} has no config.json: pass its architecture as MODEL and --checkpoint FILE")
    architecture = _configured(config)
    path = Path(checkpoint) if checkpoint is not None else fetch_weights(repo, revision=revision or None)
    return OpenedModel(repo, architecture, open_checkpoint(path), {"model": name, "hub": repo})


def _open_folder(folder: Path, checkpoint: StrPath | None, name: str) -> OpenedModel:
    from attnlens.checkpoints.hub import WEIGHT_FILES

    config = folder / "config.json"
    if not config.is_file():
        raise ModelNotFoundError(
            f"{folder} has no config.json: give a timm model folder, or MODEL with --checkpoint FILE"
        )
    architecture = _configured(config)
    path = Path(checkpoint) if checkpoint is not None else None
    for weights in WEIGHT_FILES:
        path = path or (folder / weights if (folder / weights).is_file() else None)
    if path is None:
        raise ModelNotFoundError(f"{folder} holds no weights: one of {', '.join(WEIGHT_FILES)} is expected")
    title = name if name == "embedded" else folder.resolve().name
    return OpenedModel(title, architecture, open_checkpoint(path), {"model": name})


def _open_file(path: Path, given_as: str) -> OpenedModel:
    """Open a file that must itself say, in its metadata or a config.json beside it, what architecture it is for."""
    checkpoint = open_checkpoint(path)
    named = checkpoint.metadata.get("architecture")
    if named:
        model_args = _parse_json(checkpoint.metadata.get("model_args", "{}"), path)
        architecture = describe_architecture(named, model_args)
    elif (path.parent / "config.json").is_file():
        architecture = _configured(path.parent / "config.json")
    else:
        raise UsageError(
            f"{path} does not say which architecture it is for: name it, as in "
            f"`attnlens inspect MODEL --checkpoint {path}` ({given_as} was a file)"
        )
    return OpenedModel(path.stem, architecture, checkpoint, {"model": path.name})


def _configured(config: Path) -> Architecture:
    """Describe the architecture a timm ``config.json`` names, with its ``model_args``."""
    data = _parse_json(config.read_text(), config)
    name = data.get("architecture")
    if not isinstance(name, str):
        raise ModelNotFoundError(f"{config} names no timm architecture: pass it as MODEL and the file as --checkpoint")
    model_args = data.get("model_args", {})
    if not isinstance(model_args, dict):
        raise ModelNotFoundError(f"model_args in {config} is not an object: fix the file")
    return describe_architecture(name, model_args)


def _parse_json(text: str, where: Path) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where} holds broken JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} holds a JSON {type(data).__name__} where an object is expected")
    return data


def _check_fit(opened: OpenedModel) -> None:
    """Refuse weights of another architecture, naming the first tensors that are missing or of another shape."""
    shapes, checkpoint = opened.architecture.shapes, opened.checkpoint
    problems = []
    for name, wanted in shapes.items():
        if name not in checkpoint:
            problems.append(f"{name} is missing")
        elif list(checkpoint[name].shape) != wanted:
            problems.append(f"{name} is {tuple(checkpoint[name].shape)}, not {tuple(wanted)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the weights are not of {opened.architecture.name}: {'; '.join(problems[:3])}{more}. "
            "Name the architecture they were made for as MODEL"
        )
