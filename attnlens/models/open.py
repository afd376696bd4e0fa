"""From what a user typed (a name, a file, a folder, a module) to an architecture and its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnlens.checkpoints import Checkpoint, open_checkpoint
from attnlens.checkpoints.base import INDEX_SUFFIX, NUMPY_SUFFIXES, SAFETENSORS_SUFFIXES, TORCH_SUFFIXES
from attnlens.checkpoints.shards import TRANSFORMERS_FILES
from attnlens.errors import CheckpointError, ModelNotFoundError, UnsupportedAttentionError, UsageError
from attnlens.models.architecture import Architecture, check_model_args, describe_architecture
from attnlens.models.forms import fitting
from attnlens.models.opened import ONLINE, Access, OpenedModel, StrPath, Weights
from attnlens.strict_json import parse_json, within

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
    if access.offline and access.remote:
        raise UsageError("--offline and --remote exclude each other: choose one")
    if not isinstance(model, str | os.PathLike | Mapping | None):
        opened = _open_live(model, checkpoint, num_heads, input_size)
    elif num_heads is not None:
        opened = _open_bare(model, checkpoint, num_heads)
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
    opened.checkpoint.expect(opened.architecture.shapes)
    return opened


def _open(
    model: Any, checkpoint: Weights | None, access: Access, model_args: dict[str, Any] | None = None
) -> OpenedModel:
    given = check_model_args(model_args or {}, "--model-arg")
    if model is None and checkpoint is None:
        return _open_folder(EMBEDDED, None, "embedded", given)
    state = checkpoint if model is None else model
    if isinstance(state, Mapping):
        lens = _of_lens(_weights(state), "state dict", {"model": "state dict"})
        if lens is not None:
            return lens
        raise UsageError(
            "a state dict does not say which architecture it is for: name it, as in inspect(state_dict, "
            "model='vit_base_patch16_224'), or give num_heads to read it by its tensors' names"
        )
    if model is None:
        return _open_file(Path(os.fspath(checkpoint)), "--checkpoint", given)  # type: ignore[arg-type]
    name = os.fspath(model)
    scheme, _, rest = name.partition(":")
    if scheme == "local-dir":
        return _open_folder(Path(rest), checkpoint, name, given)
    if scheme in ("hf-hub", "hf_hub"):
        return _open_hub(rest, checkpoint, name, access, given)
    path = Path(name)
    if path.is_dir():
        return _open_folder(path, checkpoint, f"local-dir:{name}", given)
    if _is_weight_name(path) and (path.is_file() or os.sep in name or path.suffix != ".pt"):  # timm has tags named pt
        if checkpoint is not None:
            raise UsageError(f"{name} and --checkpoint {checkpoint} are both files: MODEL must name the architecture")
        return _open_file(path, "MODEL", given)
    return _open_timm(name, checkpoint, access, given)


def _open_live(
    module: Any, checkpoint: Weights | None, num_heads: int | None, input_size: int | tuple[int, ...] | None
) -> OpenedModel:
    from attnlens.models.live import open_live

    architecture, own = open_live(module, num_heads=num_heads, input_size=input_size)
    weights = own if checkpoint is None else _weights(checkpoint)
    source = {"model": architecture.name}
    if num_heads is not None:
        source["layout"] = f"guessed from tensor names, {num_heads} heads"
    return OpenedModel(architecture.name, architecture, weights, source)


def _weights(given: Weights) -> Checkpoint:
    """Open what a caller gave as weights: a state dict in memory or a file."""
    if isinstance(given, Mapping):
        from attnlens.checkpoints.memory import StateDict

        return given if isinstance(given, Checkpoint) else StateDict(given)
    if not isinstance(given, str | os.PathLike):
        raise UsageError(
            f"a {type(given).__name__} is no checkpoint: give a file or a state dict, as model.state_dict()"
        )
    return open_checkpoint(given)


def _is_weight_name(path: Path) -> bool:
    suffixes = (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES, *NUMPY_SUFFIXES, INDEX_SUFFIX)
    return path.name.lower().endswith(suffixes)


def _open_timm(name: str, checkpoint: Weights | None, access: Access, given: dict[str, Any]) -> OpenedModel:
    pinned, _, revision = name.partition("@")
    base, _, tag = pinned.removeprefix("timm/").partition(".")
    weights = None if checkpoint is None else _weights(checkpoint)
    architecture, arguments = _of_timm(base, given, weights)
    base = architecture.name  # timm's own, where it was renamed
    if tag and tag not in architecture.weights:
        tags = ", ".join(known for known in architecture.weights if known) or "none"
        raise ModelNotFoundError(f"{base} has no pretrained tag {tag!r}: timm knows {tags}")
    if weights is not None:
        from attnlens.models.sizes import in_words

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
    from attnlens.models.sizes import shown_arguments

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
        return open_weights(repo, entry["hf_hub_filename"], pin, offline=access.offline, remote=access.remote)
    if not url:
        raise ModelNotFoundError(f"timm says nowhere where the weights of {name} are: pass --checkpoint FILE")
    if revision:
        raise UsageError(f"{name} is not on a hub but at {url}, which has no revisions: leave out @{revision}")
    from attnlens.checkpoints.download import fetch_url

    return open_checkpoint(fetch_url(url, offline=access.offline)), {"url": url}


def _open_hub(repo: str, checkpoint: Weights | None, name: str, access: Access, given: dict[str, Any]) -> OpenedModel:
    from attnlens.checkpoints.hub import fetch, open_weights

    repo, _, revision = repo.partition("@")
    config = fetch(repo, "config.json", revision or None, offline=access.offline)
    if config is None:
        raise ModelNotFoundError(f"{repo} has no config.json: pass its architecture as MODEL and --checkpoint FILE")
    if checkpoint is not None:
        return _configured(config, repo, _weights(checkpoint), {"model": name, "hub": repo}, given)
    weights, source = open_weights(repo, None, revision or None, offline=access.offline, remote=access.remote)
    return _configured(config, repo, weights, {"model": name, **source}, given)


def _open_folder(folder: Path, checkpoint: Weights | None, name: str, given: dict[str, Any]) -> OpenedModel:
    config = within(folder, folder / "config.json", CheckpointError)
    if not config.is_file():
        if (folder / "model_index.json").is_file():
            raise ModelNotFoundError(
                f"{folder} is a pipeline of diffusers: give one of its parts, as {folder / 'unet'}"
            )
        raise ModelNotFoundError(
            f"{folder} has no config.json: give a timm or transformers model folder, or MODEL with --checkpoint FILE"
        )
    weights = _weights(checkpoint if checkpoint is not None else _weights_in(folder))
    title = name if name == "embedded" else folder.resolve().name
    return _configured(config, title, weights, {"model": name}, given)


def _weights_in(folder: Path) -> Path:
    """Return the weight file, or the index of its shards, of a model folder."""
    from attnlens.checkpoints.hub import WEIGHT_FILES
    from attnlens.models.diffusers import WEIGHT_FILES as DIFFUSERS_FILES

    names = tuple(dict.fromkeys((*TRANSFORMERS_FILES, *WEIGHT_FILES, *DIFFUSERS_FILES)))
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ModelNotFoundError(f"{folder} holds no weights: one of {', '.join(names)} is expected")
    return within(folder, found, CheckpointError)


def _open_file(path: Path, given_as: str, given: dict[str, Any]) -> OpenedModel:
    """Open a file that says itself, in its metadata or a config.json beside it, what architecture it is for.

    A file that says nothing and holds depthwise filters, and no attention, is read by its tensors' shapes.
    """
    checkpoint = open_checkpoint(path)
    named = checkpoint.metadata.get("architecture")
    if named:
        model_args = {**_parse_json(checkpoint.metadata.get("model_args", "{}").encode(), path), **given}
        architecture = describe_architecture(named, model_args)
        return OpenedModel(path.stem, architecture, checkpoint, {"model": path.name}, timm_args=model_args)
    config = path.parent / "config.json"
    if config.is_file():
        config = within(path.parent, config, CheckpointError)
        return _configured(config, path.stem, checkpoint, {"model": path.name}, given)
    lens = _of_lens(checkpoint, path.stem, {"model": path.name})
    if lens is not None:
        return lens
    from attnlens.models.by_tensor_names import describe_filters

    filters = describe_filters(checkpoint)
    if filters is not None:
        source = {"model": path.name, "layout": "depthwise filters guessed from tensor shapes"}
        return OpenedModel(path.stem, filters, checkpoint, source)
    raise UsageError(
        f"{path} does not say which architecture it is for: name it, as in `attnlens inspect MODEL --checkpoint "
        f"{path}`, or give --num-heads to read it by its tensors' names ({given_as} was a file)"
    )


def _open_bare(model: Any, checkpoint: Weights | None, num_heads: int) -> OpenedModel:
    """Open a file, or the weights of a folder, by the names of its tensors alone."""
    given = checkpoint if model is None else model
    if isinstance(given, Mapping) and (model is None or checkpoint is None):
        return _by_names(_weights(given), num_heads, "state dict", {"model": "state dict"}, "the state dict")
    path = Path(given) if isinstance(given, str | os.PathLike) else None
    if path is None or (model is not None and checkpoint is not None) or not (path.is_dir() or _is_weight_name(path)):
        raise UsageError(
            "--num-heads goes with a weight file alone: a model that is named, a live module or the shipped ViT "
            "says itself how many heads it has"
        )
    weights = open_checkpoint(_weights_in(path) if path.is_dir() else path)
    return _by_names(weights, num_heads, path.stem, {"model": path.name}, str(path))


def _by_names(weights: Checkpoint, num_heads: int, title: str, source: dict[str, str], where: str) -> OpenedModel:
    """Open weights by their names: those of a network that is known, or names that attention usually has."""
    from attnlens.models.named import describe_named
    from attnlens.models.transformers import describe_names

    lens = _of_lens(weights, title, source, num_heads)
    if lens is not None:
        return lens
    named = describe_named(weights, num_heads)
    told = f"of {named.name}, told by tensor names" if named else "guessed from tensor names"
    architecture = named or describe_names(weights, num_heads, where)
    return OpenedModel(title, architecture, weights, {**source, "layout": f"{told}, {num_heads} heads"})


def _of_lens(
    weights: Checkpoint, title: str, source: dict[str, str], num_heads: int | None = None
) -> OpenedModel | None:
    """Open weights of TransformerLens, which hold a matrix for each head; None for any others."""
    from attnlens.models.named import HeadsOf, describe_lens, lens_layers

    paths = lens_layers(weights)
    if not paths:
        return None
    architecture = describe_lens(weights, paths)
    heads = architecture.specs[0].q.heads
    if num_heads not in (None, heads):
        raise UsageError(f"{title} stores {heads} heads in each layer, not {num_heads}: leave out --num-heads")
    return OpenedModel(title, architecture, HeadsOf(weights), {**source, "layout": "TransformerLens"})


def _configured(
    config: Path, title: str, weights: Checkpoint, source: dict[str, str], given: dict[str, Any]
) -> OpenedModel:
    """Open weights of the architecture a ``config.json`` names: timm's with its ``model_args``, or transformers'."""
    try:
        data = _parse_json(config.read_bytes(), config)
    except OSError as error:
        raise CheckpointError(f"cannot read {config}: {error.strerror}") from error
    name = data.get("architecture")
    if isinstance(name, str):
        model_args = {**check_model_args(data.get("model_args", {}), str(config)), **given}
        architecture = describe_architecture(name, model_args)
        return OpenedModel(title, architecture, weights, source, timm_args=model_args)
    if isinstance(data.get("_class_name"), str):
        from attnlens.models.diffusers import describe_diffusers

        return OpenedModel(title, describe_diffusers(data, data["_class_name"], weights, str(config)), weights, source)
    from attnlens.models.transformers import describe_transformers, told_model_type

    if "model_type" not in data:
        told = told_model_type(data, weights)
        data = {**data, "model_type": told}
        source = {**source, "layout": f"model_type {told}, told by the tensors' names"} if told else source
    if isinstance(data["model_type"], str):
        return OpenedModel(title, describe_transformers(data, weights, str(config)), weights, source)
    raise ModelNotFoundError(
        f"{config} names no architecture of timm and no model_type of transformers: pass MODEL and the file as "
        "--checkpoint"
    )


def _parse_json(text: bytes, where: Path) -> dict[str, Any]:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{where} holds broken JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} holds a JSON {type(data).__name__} where an object is expected")
    return data
