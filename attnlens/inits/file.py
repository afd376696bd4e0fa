"""From an architecture's name to a weight file: build, initialise, write with provenance."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from attnlens.checkpoints.written import write_safetensors
from attnlens.errors import CheckpointError, ModelNotFoundError, ParamsError, UnsupportedAttentionError, UsageError
from attnlens.inits.apply import build_checked, init_
from attnlens.inits.pretrained_folder import build_pretrained, save_pretrained
from attnlens.inits.registry import find_initialiser
from attnlens.inits.report import InitReport, describe_option
from attnlens.models.architecture import check_model_args
from attnlens.models.described import describe_architecture
from attnlens.models.open import EMBEDDED
from attnlens.models.weights import config_in
from attnlens.outputs import Outputs
from attnlens.provenance import run_provenance
from attnlens.strict_json import there

if TYPE_CHECKING:
    from torch import nn

METADATA_KEY = "attnlens"
"""Entry of a safetensors file's metadata that says how `attnlens init` made it."""

READ_FROM = ("params", "teacher", "checkpoint")
"""Options of initialisers that name a file, or a model."""


class Built(NamedTuple):
    """A new network, and what timm needs to build it again."""

    module: nn.Module
    architecture: str
    """timm's name; empty for a network of transformers."""
    model_args: dict[str, Any]


def build(model: str | None, seed: int, model_args: Mapping[str, Any]) -> Built:
    """Build a network with its library's own draw under ``seed``: a timm name, a model folder, or the shipped ViT."""
    folder = EMBEDDED if model is None else Path(model.removeprefix("local-dir:"))
    if there(folder.is_dir) and of_transformers(folder):
        if model_args:
            raise UsageError(f"--model-arg goes to timm, and {folder} is a model of transformers: edit its config.json")
        return Built(build_pretrained(folder, seed), "", {})
    if there(folder.is_dir):
        architecture, whole, given = _folder_network(folder)
        resolved = {**given, **model_args}
        module = build_checked(f"local-dir:{folder}" if whole else architecture, seed, resolved)
        return Built(module, architecture.partition(".")[0], resolved)
    assert model is not None
    module = build_checked(model, seed, model_args)
    return Built(module, model.removeprefix("timm/").partition(".")[0], dict(model_args))


def of_transformers(folder: Path) -> bool:
    """Whether a folder's ``config.json`` is one of transformers."""
    try:
        data = config_in(folder)
    except CheckpointError:
        return False
    return isinstance(data.get("model_type"), str) and "architecture" not in data


def _folder_network(folder: Path) -> tuple[str, bool, dict[str, Any]]:
    """Return the architecture a folder's config names, whether timm reads it whole, and what arguments it adds.

    These are its model_args and the number of classes; a network of them may cost what it may where it is read.
    Without a ``pretrained_cfg`` timm takes all for one.
    """
    config = folder / "config.json"
    data = config_in(folder)
    if not isinstance(data.get("architecture"), str):
        raise CheckpointError(f"{config} names no architecture")
    if ":" in data["architecture"]:
        raise ModelNotFoundError(f"{config} names {data['architecture']!r}, a model elsewhere: name an architecture")
    classes = check_model_args({name: data[name] for name in ("num_classes",) if name in data}, str(config))
    given = {**classes, **check_model_args(data.get("model_args", {}), str(config))}
    with contextlib.suppress(UnsupportedAttentionError):  # it may be built all the same
        describe_architecture(data["architecture"], given)
    return data["architecture"], isinstance(data.get("pretrained_cfg"), dict), given


def init_file(
    model: str | None,
    output: str | os.PathLike[str],
    *,
    init: str = "mimetic",
    seed: int = 0,
    model_args: Mapping[str, Any] | None = None,
    command: str | None = None,
    force: bool = False,
    **options: Any,
) -> InitReport | None:
    """Write the weights of a new network with initialised attention as a safetensors file; None for ``default``.

    ``model``: a timm name, a folder with a ``config.json`` of timm or of transformers, or None for the architecture of
    the shipped ViT; ``model_args`` go to timm. Outside attention the weights are what timm draws under ``seed``, as
    `create_model` has them. The file loads strictly with ``timm.create_model(..., checkpoint_path=...)``; its metadata
    name architecture and arguments, initialiser, seed, options, the parameter file's hash, versions and ``command``.
    Of a model of transformers the weights have the names its ``from_pretrained`` reads, and ``config.json`` is written
    beside them. ``force`` writes over a file that attnlens did not write.
    """
    chosen = find_initialiser(init)
    described = [] if model is None else [Path(model.removeprefix("local-dir:"), "config.json")]
    Outputs.of(*options.values(), files=described, force=force).file(output, ".safetensors")
    built = build(model, seed, model_args or {})
    report, params = None, params_record(options.get("params"))
    if chosen.name != "default":
        report = init_(built.module, chosen.name, seed=seed, **options)
    elif options:
        raise UsageError("initialiser 'default' has no options")
    if params != params_record(options.get("params")):
        raise ParamsError(f"{options['params']} changed while it was read: run again when nothing writes it")
    record = {
        "init": chosen.name,
        "seed": seed,
        "options": {name: describe_option(value) for name, value in options.items()},
        "params": params,
        "worst_error": None if report is None else report.worst_error,
        "skipped": [] if report is None else [f"{s.name} {s.circuit}: {s.reason}" for s in report.skipped],
        **run_provenance(),
        "command": command,
    }
    metadata = {"format": "pt", METADATA_KEY: json.dumps(record)}
    if not built.architecture:
        save_pretrained(cast("Any", built.module), output, metadata)
        return report
    metadata |= {"architecture": built.architecture, "model_args": json.dumps(built.model_args)}
    save_weights(built.module, output, metadata)
    return report


def save_weights(module: nn.Module, output: str | os.PathLike[str], metadata: dict[str, str]) -> Path:
    """Write a network's state as safetensors, atomically; tensors that share memory are written each by themselves."""
    return write_safetensors(output, module.state_dict(), metadata)


def params_record(params: Any) -> dict[str, Any] | None:
    """Return name and hash of a parameter file; None where parameters came another way, or not at all."""
    if not isinstance(params, str | os.PathLike) or not os.fspath(params).endswith(".json"):
        return None
    path = Path(params)
    try:
        return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    except (OSError, ValueError) as error:
        raise ParamsError(f"cannot read {path}: {error}") from error
