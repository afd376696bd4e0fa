"""Weights without an architecture: read by their tensors' names, once the number of heads is said."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attnlens.checkpoints import Checkpoint, open_checkpoint
from attnlens.errors import CheckpointError, UsageError
from attnlens.models.architecture import Architecture
from attnlens.models.by_tensor_names import describe_names, in_order
from attnlens.models.named import HeadsOf, describe_lens, describe_named, lens_layers
from attnlens.models.opened import Access, OpenedModel, Weights
from attnlens.models.row_order import CONFIGURED
from attnlens.models.weights import is_weight_name, parse_object, title_of, weights_in, weights_of
from attnlens.strict_json import there, within
from attnlens.words import counted


def open_bare(model: Any, checkpoint: Weights | None, num_heads: int, access: Access) -> OpenedModel:
    """Open a file, or the weights of a folder, by the names of its tensors alone."""
    given = checkpoint if model is None else model
    if isinstance(given, Mapping) and (model is None or checkpoint is None):
        weights = weights_of(given, access)
        return _by_names(weights, num_heads, "state dict", {"model": "state dict"}, "the state dict", _asked(access))
    path = Path(given) if isinstance(given, str | os.PathLike) else None
    folder = path is not None and there(path.is_dir)
    if path is None or (model is not None and checkpoint is not None) or not (folder or is_weight_name(path)):
        raise UsageError(
            "--num-heads goes with a weight file alone: a model that is named, a live module or the shipped ViT "
            "says itself how many heads it has"
        )
    weights = open_checkpoint(weights_in(path) if folder else path, access.network)
    model_type, quantised = _config_of(weights, path if folder else path.parent)
    known = CONFIGURED.get(model_type)
    order = (known, f"as model_type {model_type} has them") if known else None
    title = path.name if folder else title_of(path)
    opened = _by_names(weights, num_heads, title, {"model": path.name}, str(path), _asked(access) or order)
    named = (name for spec in opened.architecture.specs for name in spec.tensors()) if quantised else ()
    codes = [name for name in named if name in opened.checkpoint and _is_one_byte(opened, name)]
    if codes:
        raise CheckpointError(
            f"the config.json beside {path} says that the weights are quantised, and {codes[0]} has no scales: give "
            "the model it was quantised from"
        )
    return opened


def _is_one_byte(opened: OpenedModel, name: str) -> bool:
    return getattr(opened.checkpoint[name].dtype, "itemsize", 0) == 1


def _asked(access: Access) -> tuple[str, str] | None:
    return None if access.row_order is None else (access.row_order, "as asked")


def _config_of(weights: Checkpoint, folder: Path) -> tuple[str, bool]:
    """Return the model_type of the config.json beside weights, and whether it says that they are quantised."""
    config = folder / "config.json"
    packed_with = weights.metadata.get("config.json")
    if packed_with is None and not there(config.is_file):
        return "", False
    try:
        text = within(folder, config, CheckpointError).read_bytes() if packed_with is None else packed_with.encode()
    except OSError as error:
        raise CheckpointError(f"cannot read {config}: {error.strerror}") from error
    data = parse_object(text, config)
    return str(data.get("model_type", "")), bool(data.get("quantization_config"))


def _by_names(
    weights: Checkpoint,
    num_heads: int,
    title: str,
    source: dict[str, str],
    where: str,
    order: tuple[str, str] | None = None,
) -> OpenedModel:
    """Open weights by their names: those of a network that is known, or names that attention usually has."""
    lens = of_lens(weights, title, source, num_heads)
    if lens is not None:
        return lens
    if order is not None:
        weights = in_order(weights, num_heads, order[0])
    named = describe_named(weights, num_heads)
    told = f"of {named.name}, told by tensor names" if named else "guessed from tensor names"
    architecture = named or describe_names(weights, num_heads, where, *(order or ()))
    return OpenedModel(title, architecture, weights, {**source, "layout": f"{told}, {counted(num_heads, 'head')}"})


def check_heads(found: Architecture, num_heads: int | None, where: str) -> None:
    """Raise `UsageError` where layers say themselves that they have another number of heads."""
    heads = sorted({spec.q.heads for spec in found.specs})
    if num_heads is not None and heads != [num_heads]:
        held = " and ".join([*map(str, heads[:-1]), counted(heads[-1], "head")])
        raise UsageError(f"{where} stores {held} in each layer, not {num_heads}: leave out --num-heads")


def of_lens(
    weights: Checkpoint, title: str, source: dict[str, str], num_heads: int | None = None
) -> OpenedModel | None:
    """Open weights of TransformerLens, which hold a matrix for each head; None for any others."""
    paths = lens_layers(weights)
    if not paths:
        return None
    architecture = describe_lens(weights, paths)
    check_heads(architecture, num_heads, title)
    return OpenedModel(title, architecture, HeadsOf(weights), {**source, "layout": "TransformerLens"})
