"""From what a user typed (a name, a file, a folder, a module) to an architecture and its weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.checkpoints import Checkpoint, open_checkpoint
from attnlens.checkpoints.adapter_config import AdapterConfig
from attnlens.checkpoints.adapters import with_adapter
from attnlens.checkpoints.applied import unread_beside
from attnlens.checkpoints.formats import refuse_folder
from attnlens.checkpoints.networks import ChosenNetwork, outline, rechosen
from attnlens.errors import AttnlensError, CheckpointError, ModelNotFoundError, UnsupportedAttentionError, UsageError
from attnlens.models.architecture import Architecture, check_model_args
from attnlens.models.bare import check_heads, of_lens, open_bare
from attnlens.models.by_tensor_names import describe_filters, in_order
from attnlens.models.described import describe_architecture
from attnlens.models.diffusers import describe_diffusers
from attnlens.models.forms import fitting
from attnlens.models.live import open_live, open_live_by_names
from attnlens.models.opened import ONLINE, Access, OpenedModel, StrPath, Weights
from attnlens.models.row_order import ReorderedRows
from attnlens.models.sizes import in_words, shown_arguments
from attnlens.models.transformers import describe_transformers, told_model_type
from attnlens.models.undress import LiveWeights
from attnlens.models.weights import (
    alone_in,
    config_in,
    is_weight_name,
    parse_object,
    title_of,
    weights_in,
    weights_of,
    weights_on_hub,
)
from attnlens.strict_json import there, within
from attnlens.words import counted

if TYPE_CHECKING:
    from torch import nn

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""Folder of the small pre-trained ViT shipped with the package."""


def named_and_weights(source: Any, checkpoint: Any, model: Any) -> tuple[Any, Any]:
    """Return what names the architecture and what holds the weights, of a call that may name them either way.

    Raises `UsageError` where three things are given.
    """
    if model is None:
        return source, checkpoint
    if source is not None and checkpoint is not None:
        raise UsageError("model=, a checkpoint and a first argument are one too many: give the weights and model=")
    return model, checkpoint if source is None else source


def open_model(
    model: StrPath | nn.Module | Mapping[str, Any] | None,
    checkpoint: Weights | None,
    num_heads: int | None = None,
    access: Access = ONLINE,
    *,
    filters: bool = False,
    model_args: dict[str, Any] | None = None,
    input_size: int | tuple[int, ...] | None = None,
) -> OpenedModel:
    """Find the architecture and the weights for ``model`` and ``checkpoint``, and check that they fit each other.

    ``model`` is None (the shipped ViT), a live module, a state dict, a checkpoint file, a folder or ``local-dir:`` name
    with a ``config.json`` of timm or transformers, an ``hf-hub:`` name, or a timm name with or without tag;
    ``checkpoint`` overrides the weights, a file's or a state dict's. Weights timm did not write are converted where
    they do not fit as they are. With ``num_heads`` a file, folder, state dict or live module is read by its tensors'
    names alone. ``name@revision`` pins a hub's branch, tag or commit. ``filters``: the caller reads depthwise filters
    too, and takes a model that has no attention beside them. ``model_args``: arguments of a timm architecture that is
    named; those that the weights' shapes show need not be given. ``input_size``: that of a live module, where it does
    not state it.
    Raises `ModelNotFoundError`, `CheckpointError`, `UnsupportedAttentionError` or `UsageError`.
    """
    if num_heads is not None and (not isinstance(num_heads, int) or isinstance(num_heads, bool) or num_heads < 1):
        raise UsageError(f"--num-heads {num_heads!r} is not a number of heads: give 1 or more")
    if access.row_order is not None and num_heads is None:
        raise UsageError(
            "--row-order goes with --num-heads: a model that is named says itself how its packed rows are ordered"
        )
    if access.offline and access.remote:
        raise UsageError("--offline and --remote exclude each other: choose one")
    if not isinstance(model, str | os.PathLike | Mapping | None):
        opened = _open_live(model, checkpoint, num_heads, input_size, access)
    elif num_heads is not None:
        opened = _as_configured(model, checkpoint, num_heads, access)
    else:
        opened = _open(model, checkpoint, access, model_args)
    if model_args and opened.timm_args is None:
        raise UsageError(
            f"--model-arg is for architectures of timm, and {opened.name} says itself what it is: leave it out"
        )
    architecture = opened.architecture
    if architecture.filters and not filters and not architecture.specs:
        raise UnsupportedAttentionError(
            f"{opened.name} has depthwise filters and no attention that can be read: `attnlens inspect` and `attnlens "
            "fit-params` take it"
        )
    if not architecture.specs and not architecture.filters:
        first = (*architecture.refused, *architecture.refused_filters)[0]
        advice = ". With num_heads=N it is read by its tensors' names" if first.family == "unknown" else ""
        raise UnsupportedAttentionError(
            f"no layer of {opened.name} can be read. {first.path} ({first.module_class}) {first.reason}{advice}"
        )
    opened = fitting(opened)
    _check_beside(opened)
    opened.checkpoint.expect(opened.architecture.shapes)
    return opened


def _as_configured(model: Any, checkpoint: Any, num_heads: int, access: Access) -> OpenedModel:
    """Open weights as the config.json beside them describes them, which outranks what names and a head count tell.

    By these where there is no such file, or it does not describe them. Raises `UsageError` where it says other head
    counts.
    """
    by_names = partial(open_bare, model, checkpoint, num_heads, access)
    given = checkpoint if model is None else model
    alone = (model is None or checkpoint is None) and access.row_order is None
    path = Path(given) if alone and isinstance(given, str | os.PathLike) else None
    if path is None or not there(path.exists):
        return by_names()
    folder = path if there(path.is_dir) else path.parent
    packed = there(path.is_file) and "config.json" in open_checkpoint(path, access.network).metadata
    if not packed and not there((folder / "config.json").is_file):
        return by_names()
    try:
        opened = fitting(_open(path, None, access))
    except CheckpointError:
        return _labelled(by_names(), "the config.json beside it does not describe these weights")
    except AttnlensError:
        return by_names()
    check_heads(opened.architecture, num_heads, f"{path}, by its config.json,")
    return opened


def _labelled(opened: OpenedModel, words: str) -> OpenedModel:
    specs = tuple(
        spec.replace(label="; ".join(filter(None, (spec.label, words)))) for spec in opened.architecture.specs
    )
    return replace(opened, architecture=replace(opened.architecture, specs=specs))


def _check_beside(opened: OpenedModel) -> None:
    """Refuse weights beside which something stands that may change them and that nobody looks at."""
    stored = opened.checkpoint.origin if isinstance(opened.checkpoint, ReorderedRows) else opened.checkpoint
    if isinstance(stored, LiveWeights):
        return
    specs = opened.architecture.specs
    projections = [name for spec in specs for slot in spec.slots().values() for name in slot.named(slot.tensor)]
    beside = unread_beside(opened.checkpoint, projections, opened.architecture.shapes)
    if beside is not None:
        raise CheckpointError(
            f"{beside}, and no rule for it is known: merge it into the weight, or take it out of the file if it "
            "changes nothing"
        )


def _open(
    model: Any, checkpoint: Weights | None, access: Access, model_args: dict[str, Any] | None = None
) -> OpenedModel:
    given = check_model_args(model_args or {}, "this call")
    if model is None and checkpoint is None:
        return _open_folder(EMBEDDED, None, "embedded", given, ONLINE)
    state = checkpoint if model is None else model
    if isinstance(state, Mapping):
        lens = of_lens(weights_of(state, access), "state dict", {"model": "state dict"})
        if lens is not None:
            return lens
        raise UsageError(
            "a state dict does not say which architecture it is for: name it, as in inspect(state_dict, "
            "model='vit_base_patch16_224'), or give num_heads to read it by its tensors' names"
        )
    if model is None:
        return _open_file(Path(os.fspath(checkpoint)), "--checkpoint", given, access)  # type: ignore[arg-type]
    name = os.fspath(model)
    scheme, _, rest = name.partition(":")
    if scheme == "local-dir":
        return _open_folder(Path(rest), checkpoint, name, given, access)
    if scheme in ("hf-hub", "hf_hub"):
        return _open_hub(rest, checkpoint, name, access, given)
    path = Path(name)
    if there(path.is_dir):
        return _open_folder(path, checkpoint, f"local-dir:{name}", given, access)
    tag = path.suffix == ".pt" and os.sep not in name  # timm has tags named pt
    if is_weight_name(path) and (not tag or there(path.is_file)):
        if checkpoint is not None:
            raise UsageError(f"{name} and --checkpoint {checkpoint} are both files: MODEL must name the architecture")
        return _open_file(path, "MODEL", given, access)
    return _open_timm(name, checkpoint, access, given)


def _open_live(
    module: Any,
    checkpoint: Weights | None,
    num_heads: int | None,
    input_size: int | tuple[int, ...] | None,
    access: Access,
) -> OpenedModel:
    given = None if checkpoint is None else weights_of(checkpoint, access)
    if num_heads is None:
        architecture, own = open_live(module, input_size=input_size)
        return OpenedModel(architecture.name, architecture, given or own, {"model": architecture.name})
    order = access.row_order
    architecture, named = open_live_by_names(module, num_heads, row_order=order, input_size=input_size)
    if given is not None:
        named = given if order is None else in_order(given, num_heads, order)
    source = {"model": architecture.name, "layout": f"guessed from tensor names, {counted(num_heads, 'head')}"}
    return OpenedModel(architecture.name, architecture, named, source)


def _open_timm(name: str, checkpoint: Weights | None, access: Access, given: dict[str, Any]) -> OpenedModel:
    pinned, _, revision = name.partition("@")
    base, _, tag = pinned.removeprefix("timm/").partition(".")
    weights = None if checkpoint is None else weights_of(checkpoint, access)
    architecture, arguments = _of_timm(base, given, weights)
    base = architecture.name  # timm's own, where it was renamed
    if tag and tag not in architecture.weights:
        tags = ", ".join(known for known in architecture.weights if known) or "none"
        raise ModelNotFoundError(f"{base} has no pretrained tag {tag!r}: timm knows {tags}")
    if weights is not None:
        source = {"model": name, **in_words(arguments, given)}
        return OpenedModel(base, architecture, weights, source, timm_args=arguments)
    if not architecture.weights:
        raise ModelNotFoundError(f"timm has no pretrained weights for {base}: pass --checkpoint FILE")
    tag = tag or next(iter(architecture.weights))
    full = f"{base}.{tag}" if tag else base
    weights, source = _pretrained(full, architecture.weights[tag], revision, access)
    return OpenedModel(full, architecture, weights, {"model": name, **source}, timm_args=given)


def _of_timm(name: str, given: dict[str, Any], weights: Checkpoint | None) -> tuple[Architecture, dict[str, Any]]:
    """Describe an architecture with arguments that may build a network only beside those that the weights show."""
    try:
        return describe_architecture(name, given), given
    except ModelNotFoundError:
        plain = describe_architecture(name)
        arguments = weights and shown_arguments(plain.name, given, {key: weights.shape(key) for key in weights})
        if not arguments:
            raise
        return replace(describe_architecture(plain.name, arguments), weights=plain.weights), arguments


def _pretrained(
    name: str, entry: dict[str, str | None], revision: str, access: Access
) -> tuple[Checkpoint, dict[str, str]]:
    """Open the weights timm's registry names, on the hub or at a plain URL, and say where they are."""
    repo, url = entry["hf_hub_id"], entry["url"]
    if repo:
        from attnlens.checkpoints.hub import open_weights

        repo, _, own = repo.partition("@")
        pin = revision or own or None
        name_in_repo = entry["hf_hub_filename"]
        found, source = open_weights(repo, name_in_repo, pin, offline=access.offline, remote=access.remote)
        return rechosen(found, access.network), source
    if not url:
        raise ModelNotFoundError(f"timm says nowhere where the weights of {name} are: pass --checkpoint FILE")
    if revision:
        raise UsageError(f"{name} is not on a hub but at {url}, which has no revisions: leave out @{revision}")
    from attnlens.checkpoints.download import fetch_url

    return open_checkpoint(fetch_url(url, offline=access.offline), access.network), {"url": url}


def _open_hub(repo: str, checkpoint: Weights | None, name: str, access: Access, given: dict[str, Any]) -> OpenedModel:
    from attnlens.checkpoints.hub import fetch

    repo, _, revision = repo.partition("@")
    config = fetch(repo, "config.json", revision or None, offline=access.offline)
    if config is None:
        raise ModelNotFoundError(f"{repo} has no config.json: pass its architecture as MODEL and --checkpoint FILE")
    if checkpoint is not None:
        return _configured(config, repo, weights_of(checkpoint, access), {"model": name, "hub": repo}, given)
    weights, source = weights_on_hub(repo, config, revision, access)
    return _configured(config, repo, weights, {"model": name, **source}, given)


def _open_folder(
    folder: Path, checkpoint: Weights | None, name: str, given: dict[str, Any], access: Access
) -> OpenedModel:
    config = within(folder, folder / "config.json", CheckpointError)
    if not there(config.is_file):
        refuse_folder(folder)
        if there((folder / "adapter_config.json").is_file):
            return _open_adapter(folder, checkpoint, name, given, access)
        if there((folder / "model_index.json").is_file):
            raise ModelNotFoundError(
                f"{folder} is a pipeline of diffusers: give one of its parts, as {folder / 'unet'}"
            )
        alone = alone_in(folder) if checkpoint is None and there(folder.is_dir) else None
        if alone is not None and "architecture" in open_checkpoint(alone, access.network).metadata:
            return _open_file(alone, "MODEL", given, access)
        raise ModelNotFoundError(
            f"{folder} has no config.json: give a timm or transformers model folder, or MODEL with --checkpoint FILE"
        )
    weights = weights_of(checkpoint if checkpoint is not None else weights_in(folder), access)
    title = name if name == "embedded" else folder.resolve().name
    return _configured(config, title, weights, {"model": name}, given)


def _open_adapter(
    folder: Path, checkpoint: Weights | None, name: str, given: dict[str, Any], access: Access
) -> OpenedModel:
    """Open a folder of PEFT: the base model its configuration names, where it is at hand, with the adapter merged."""
    base = (config := AdapterConfig(folder)).base()
    if checkpoint is not None or not base or not there(Path(base).exists):
        raise ModelNotFoundError(
            f"{folder} is a PEFT adapter of {base or 'a base that it does not name'}, which is no folder or file here: "
            "merge it (peft's merge_and_unload), save the result with save_pretrained, and give that folder"
        )
    opened = _open(Path(base).absolute(), None, access, given)  # what is there, under whatever name
    merged = with_adapter(opened.checkpoint, config, inputs_first=opened.inputs_first)
    return replace(opened, name=folder.resolve().name, checkpoint=merged, source={"model": name, "base": base})


def _open_file(path: Path, given_as: str, given: dict[str, Any], access: Access) -> OpenedModel:
    """Open a file that says itself, in its metadata or a config.json beside it, what architecture it is for.

    A file that says nothing and holds depthwise filters, and no attention, is read by its tensors' shapes.
    """
    checkpoint = open_checkpoint(path, access.network)
    named, config = checkpoint.metadata.get("architecture"), path.parent / "config.json"
    if named and ("model_args" in checkpoint.metadata or not there(config.is_file)):  # else a card's words, not a name
        model_args = {**parse_object(checkpoint.metadata.get("model_args", "{}").encode(), path), **given}
        architecture = describe_architecture(named, model_args)
        return OpenedModel(title_of(path), architecture, checkpoint, {"model": path.name}, timm_args=model_args)
    packed_with = checkpoint.metadata.get("config.json")
    if packed_with is not None:
        where = f"the config.json in {path}"
        return _described_by(
            parse_object(packed_with.encode(), where), where, title_of(path), checkpoint, {"model": path.name}, given
        )
    if there(config.is_file):
        return _configured(config, title_of(path), checkpoint, {"model": path.name}, given)
    lens = of_lens(checkpoint, title_of(path), {"model": path.name})
    if lens is not None:
        return lens
    stated = checkpoint.metadata.get("named_architecture")
    with contextlib.suppress(ModelNotFoundError):  # a training script's own name, and none of timm's
        if stated:
            built_with = parse_object(checkpoint.metadata.get("named_arguments", "{}").encode(), path)
            architecture, arguments = _of_timm(stated, {**built_with, **given}, checkpoint)
            source = {"model": path.name, "named_by": "the arguments that the file's training script stored"}
            return OpenedModel(title_of(path), architecture, checkpoint, source, timm_args=arguments)
    filters = describe_filters(checkpoint)
    if filters is not None:
        source = {"model": path.name, "layout": "depthwise filters guessed from tensor shapes"}
        return OpenedModel(title_of(path), filters, checkpoint, source)
    raise UsageError(
        f"{path} does not say which architecture it is for: name it, as MODEL with --checkpoint {path}, "
        f"or give --num-heads to read it by its tensors' names ({given_as} was a file; it holds "
        f"{outline(checkpoint)})"
    )


def _configured(
    config: Path, title: str, weights: Checkpoint, source: dict[str, str], given: dict[str, Any]
) -> OpenedModel:
    """Open weights of the architecture a ``config.json`` names: timm's with its ``model_args``, or transformers'."""
    return _described_by(config_in(config.parent), str(config), title, weights, source, given)


def _described_by(
    data: dict[str, Any], where: str, title: str, weights: Checkpoint, source: dict[str, str], given: dict[str, Any]
) -> OpenedModel:
    name = data.get("architecture")
    if isinstance(name, str):
        model_args = {**check_model_args(data.get("model_args", {}), where), **given}
        architecture = describe_architecture(name, model_args)
        return OpenedModel(title, architecture, weights, source, timm_args=model_args)
    weights = weights.whole() if isinstance(weights, ChosenNetwork) else weights  # a configuration describes all parts
    if isinstance(data.get("_class_name"), str):
        return OpenedModel(title, describe_diffusers(data, data["_class_name"], weights, where), weights, source)
    if "model_type" not in data:
        told = told_model_type(data, weights)
        data = {**data, "model_type": told}
        source = {**source, "layout": f"model_type {told}, told by the tensors' names"} if told else source
    if isinstance(data["model_type"], str):
        return OpenedModel(title, describe_transformers(data, weights, where), weights, source)
    raise ModelNotFoundError(
        f"{where} names no architecture of timm and no model_type of transformers: pass MODEL and the file as "
        "--checkpoint"
    )
