"""From what a user typed (a name, a file, a folder, a module) to an architecture and its weights."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from attnlens.checkpoints import Checkpoint, ModuleWeights, open_checkpoint
from attnlens.checkpoints.base import INDEX_SUFFIX, NUMPY_SUFFIXES, SAFETENSORS_SUFFIXES, TORCH_SUFFIXES
from attnlens.checkpoints.shards import TRANSFORMERS_FILES
from attnlens.circuits import Fold
from attnlens.errors import CheckpointError, ModelNotFoundError, UnsupportedAttentionError, UsageError
from attnlens.heads import Array, HeadWeights
from attnlens.layouts import AttentionSpec, Refusal, read_heads
from attnlens.layouts.depthwise.read_write import read_filters
from attnlens.models.architecture import Architecture, check_model_args, describe_architecture, describe_module
from attnlens.strict_json import parse_json, within

if TYPE_CHECKING:
    from torch import nn

IndexedSpecs = tuple[tuple[int, AttentionSpec], ...]
StrPath = str | os.PathLike[str]

EMBEDDED = Path(__file__).parents[1] / "embedded"
"""Folder of the small pre-trained ViT shipped with the package."""


@dataclass(frozen=True)
class Access:
    """How weights on a hub are reached: ``offline`` from the local cache alone, ``remote`` only the tensors needed."""

    offline: bool = False
    remote: bool = False


@dataclass(frozen=True)
class OpenedModel:
    """An architecture with weights that fit it."""

    name: str
    architecture: Architecture
    checkpoint: Checkpoint
    source: dict[str, str]
    timm_args: dict[str, Any] | None = field(default=None, kw_only=True)
    """Arguments timm builds the architecture with; None where it is not timm's, or timm need not be asked."""
    _reading: Lock = field(default_factory=Lock, init=False, repr=False, compare=False)
    """A checkpoint serves one reader at a time."""

    def provenance(self) -> dict[str, Any]:
        """Return the architecture and where its weights are from: the name given and, for a file, size and hash."""
        return {"architecture": self.architecture.name, **self.source, **self.checkpoint.provenance()}

    def heads(self, layer: int) -> HeadWeights:
        """Read the weights of an attention layer, one thread at a time."""
        with self._reading:
            return read_heads(dict(self.architecture.indexed())[layer], self.checkpoint, layer)

    def filters(self, layer: int) -> Array:
        """Read a layer of depthwise filters ``[filter, height, width]``, one thread at a time."""
        with self._reading:
            return read_filters(self.architecture.filters[layer], self.checkpoint)

    def bytes_of(self, spec: AttentionSpec) -> int:
        """Return the bytes the tensors of an attention layer take in float64."""
        return 8 * sum(math.prod(self.architecture.shapes[name]) for name in spec.tensors())

    def not_asked_for(self, include: Sequence[str] = ()) -> dict[int, Refusal]:
        """Return the layers of a kind that is read on request only and is not in ``include``, each with why."""
        refusals = {
            layer: spec.opt_in_refusal() for layer, spec in self.architecture.indexed() if spec.kind not in include
        }
        return {layer: refusal for layer, refusal in refusals.items() if refusal is not None}

    def choose(
        self, layers: Sequence[int] | None, fold: Fold = "raw", include: Sequence[str] = (), *, or_filters: bool = False
    ) -> IndexedSpecs:
        """Return the attention layers, those of ``layers`` alone where given, that have products under ``fold``.

        ``include`` names kinds that are read on request only; ``or_filters``: ``layers`` may also name layers of
        depthwise filters. Raises `UsageError` for a layer that cannot be read, or where no norm in front is known.
        """
        unwanted = self.not_asked_for(include)
        specs = [pair for pair in self.architecture.indexed() if pair[0] not in unwanted]
        known = [pair for pair in specs if pair[1].has_fold(fold)]
        if specs and not known:
            raise UsageError(unknown_norms(self.name))
        readable = {layer for layer, _ in known} | set(range(len(self.architecture.filters)) if or_filters else ())
        wrong = [layer for layer in layers or () if layer not in readable]
        if wrong:
            raise UsageError(f"layer {wrong[0]} of {self.name} cannot be read: choose from {sorted(readable)}")
        return tuple(pair for pair in known if layers is None or pair[0] in layers)


def unknown_norms(name: str) -> str:
    """Say that a model has no product but the raw ones."""
    return f"the norms in front of the layers of {name} are not known: use --fold raw"


def open_model(
    model: StrPath | nn.Module | None,
    checkpoint: StrPath | None,
    num_heads: int | None = None,
    access: Access = Access(),
    *,
    filters: bool = False,
) -> OpenedModel:
    """Find the architecture and the weights for ``model`` and ``checkpoint``, and check that they fit each other.

    ``model`` is None (the shipped ViT), a live module, a checkpoint file, a folder or ``local-dir:`` name with a
    ``config.json`` of timm or transformers, an ``hf-hub:`` name, or a timm name with or without tag; ``checkpoint``
    overrides the weights. Weights timm did not write are converted where they do not fit as they are. With
    ``num_heads`` a file or folder is read by its tensors' names alone. ``name@revision`` pins a hub's branch, tag or
    commit. ``filters``: the caller reads depthwise filters too, and takes a model that has no attention beside them.
    Raises `ModelNotFoundError`, `CheckpointError`, `UnsupportedAttentionError` or `UsageError`.
    """
    if access.offline and access.remote:
        raise UsageError("--offline and --remote exclude each other: choose one")
    opened = _open(model, checkpoint, access) if num_heads is None else _open_bare(model, checkpoint, num_heads)
    architecture = opened.architecture
    if architecture.filters and not filters and not architecture.specs:
        raise UnsupportedAttentionError(
            f"{opened.name} has depthwise filters and no attention that can be read: `attnlens inspect` and `attnlens "
            "fit-params` take it"
        )
    if not architecture.specs and not architecture.filters:
        first = (*architecture.refused, *architecture.refused_filters)[0]
        raise UnsupportedAttentionError(
            f"no layer of {opened.name} can be read. {first.path} ({first.module_class}) {first.reason}"
        )
    opened = _fitting(opened)
    opened.checkpoint.expect(opened.architecture.shapes)
    return opened


def _open(model: Any, checkpoint: StrPath | None, access: Access) -> OpenedModel:
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
        return _open_hub(rest, checkpoint, name, access)
    path = Path(name)
    if path.is_dir():
        return _open_folder(path, checkpoint, f"local-dir:{name}")
    if _is_weight_name(path) and (path.is_file() or os.sep in name or path.suffix != ".pt"):  # timm has tags named pt
        if checkpoint is not None:
            raise UsageError(f"{name} and --checkpoint {checkpoint} are both files: MODEL must name the architecture")
        return _open_file(path, "MODEL")
    return _open_timm(name, checkpoint, access)


def _is_weight_name(path: Path) -> bool:
    suffixes = (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES, *NUMPY_SUFFIXES, INDEX_SUFFIX)
    return path.name.lower().endswith(suffixes)


def _open_timm(name: str, checkpoint: StrPath | None, access: Access) -> OpenedModel:
    pinned, _, revision = name.partition("@")
    base, _, tag = pinned.removeprefix("timm/").partition(".")
    architecture = describe_architecture(base)
    if tag and tag not in architecture.weights:
        tags = ", ".join(known for known in architecture.weights if known) or "none"
        raise ModelNotFoundError(f"{base} has no pretrained tag {tag!r}: timm knows {tags}")
    if checkpoint is not None:
        return OpenedModel(base, architecture, open_checkpoint(checkpoint), {"model": name}, timm_args={})
    if not architecture.weights:
        raise ModelNotFoundError(f"timm has no pretrained weights for {base}: pass --checkpoint FILE")
    tag = tag or next(iter(architecture.weights))
    full = f"{base}.{tag}" if tag else base
    weights, source = _pretrained(full, architecture.weights[tag], revision, access)
    return OpenedModel(full, architecture, weights, {"model": name, **source}, timm_args={})


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


def _open_hub(repo: str, checkpoint: StrPath | None, name: str, access: Access) -> OpenedModel:
    from attnlens.checkpoints.hub import fetch, open_weights

    repo, _, revision = repo.partition("@")
    config = fetch(repo, "config.json", revision or None, offline=access.offline)
    if config is None:
        raise ModelNotFoundError(f"{repo} has no config.json: pass its architecture as MODEL and --checkpoint FILE")
    if checkpoint is not None:
        return _configured(config, repo, open_checkpoint(checkpoint), {"model": name, "hub": repo})
    weights, source = open_weights(repo, None, revision or None, offline=access.offline, remote=access.remote)
    return _configured(config, repo, weights, {"model": name, **source})


def _open_folder(folder: Path, checkpoint: StrPath | None, name: str) -> OpenedModel:
    config = within(folder, folder / "config.json", CheckpointError)
    if not config.is_file():
        raise ModelNotFoundError(
            f"{folder} has no config.json: give a timm or transformers model folder, or MODEL with --checkpoint FILE"
        )
    weights = open_checkpoint(checkpoint if checkpoint is not None else _weights_in(folder))
    title = name if name == "embedded" else folder.resolve().name
    return _configured(config, title, weights, {"model": name})


def _weights_in(folder: Path) -> Path:
    """Return the weight file, or the index of its shards, of a model folder."""
    from attnlens.checkpoints.hub import WEIGHT_FILES

    names = tuple(dict.fromkeys((*TRANSFORMERS_FILES, *WEIGHT_FILES)))
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise ModelNotFoundError(f"{folder} holds no weights: one of {', '.join(names)} is expected")
    return within(folder, found, CheckpointError)


def _open_file(path: Path, given_as: str) -> OpenedModel:
    """Open a file that says itself, in its metadata or a config.json beside it, what architecture it is for.

    A file that says nothing and holds depthwise filters, and no attention, is read by its tensors' shapes.
    """
    checkpoint = open_checkpoint(path)
    named = checkpoint.metadata.get("architecture")
    if named:
        model_args = _parse_json(checkpoint.metadata.get("model_args", "{}").encode(), path)
        architecture = describe_architecture(named, model_args)
        return OpenedModel(path.stem, architecture, checkpoint, {"model": path.name}, timm_args=model_args)
    config = path.parent / "config.json"
    if config.is_file():
        config = within(path.parent, config, CheckpointError)
        return _configured(config, path.stem, checkpoint, {"model": path.name})
    from attnlens.models.by_tensor_names import describe_filters

    filters = describe_filters(checkpoint)
    if filters is not None:
        source = {"model": path.name, "layout": "depthwise filters guessed from tensor shapes"}
        return OpenedModel(path.stem, filters, checkpoint, source)
    raise UsageError(
        f"{path} does not say which architecture it is for: name it, as in `attnlens inspect MODEL --checkpoint "
        f"{path}`, or give --num-heads to read it by its tensors' names ({given_as} was a file)"
    )


def _open_bare(model: Any, checkpoint: StrPath | None, num_heads: int) -> OpenedModel:
    """Open a file, or the weights of a folder, by the names of its tensors alone."""
    given = checkpoint if model is None else model
    path = Path(given) if isinstance(given, str | os.PathLike) else None
    if num_heads < 1:
        raise UsageError(f"--num-heads {num_heads} is not a number of heads: give 1 or more")
    if path is None or (model is not None and checkpoint is not None) or not (path.is_dir() or _is_weight_name(path)):
        raise UsageError(
            "--num-heads goes with a weight file alone: a model that is named, a live module or the shipped ViT "
            "says itself how many heads it has"
        )
    from attnlens.models.transformers import describe_names

    weights = open_checkpoint(_weights_in(path) if path.is_dir() else path)
    source = {"model": path.name, "layout": f"guessed from tensor names, {num_heads} heads"}
    return OpenedModel(path.stem, describe_names(weights, num_heads, str(path)), weights, source)


def _configured(config: Path, title: str, weights: Checkpoint, source: dict[str, str]) -> OpenedModel:
    """Open weights of the architecture a ``config.json`` names: timm's with its ``model_args``, or transformers'."""
    try:
        data = _parse_json(config.read_bytes(), config)
    except OSError as error:
        raise CheckpointError(f"cannot read {config}: {error.strerror}") from error
    name = data.get("architecture")
    if isinstance(name, str):
        model_args = check_model_args(data.get("model_args", {}), str(config))
        architecture = describe_architecture(name, model_args)
        return OpenedModel(title, architecture, weights, source, timm_args=model_args)
    if isinstance(data.get("model_type"), str):
        from attnlens.models.transformers import describe_transformers

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


def _fitting(opened: OpenedModel) -> OpenedModel:
    """Return the model with weights that fit: as they are, converted by timm, or below a prefix. Refuse others by name.

    Raises `CheckpointError` naming the first tensors that are missing or of another shape.
    """
    problems = _misfits(opened.architecture, opened.checkpoint)
    if not problems:
        return opened
    from attnlens.checkpoints.converted import below_prefix, convert

    told = []
    if opened.timm_args is not None:
        try:
            converted = convert(opened.architecture.name, opened.timm_args, opened.checkpoint)
        except CheckpointError as error:
            told.append(str(error))
        else:
            if not _misfits(opened.architecture, converted):
                return replace(opened, checkpoint=converted)
    below = below_prefix(opened.checkpoint, opened.architecture.shapes)
    if below is not None and not _misfits(opened.architecture, below):
        return replace(opened, checkpoint=below)
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    raise CheckpointError(
        f"the weights are not of {opened.architecture.name}: {'; '.join(problems[:3])}{more}. "
        + ". ".join([*told, "Name the architecture they were made for as MODEL"])
    )


def _misfits(architecture: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Name the tensors that are missing or of another shape."""
    problems = []
    for name, wanted in architecture.shapes.items():
        if name not in checkpoint:
            problems.append(f"{name} is missing")
        elif list(checkpoint.shape(name)) != wanted:
            problems.append(f"{name} is {checkpoint.shape(name)}, not {tuple(wanted)}")
    return problems
