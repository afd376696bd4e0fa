"""What the networks of a comparison start from: a pre-trained model, or a named network without weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.checkpoints import Checkpoint, open_checkpoint
from attnlens.errors import CheckpointError, UnsupportedAttentionError, UsageError, first_line
from attnlens.layouts import read_heads
from attnlens.memory import in_words
from attnlens.models.architecture import modules_counted
from attnlens.models.open import EMBEDDED
from attnlens.models.weights import config_in, parse_object
from attnlens.strict_json import there
from attnlens.training.networks.base import Network
from attnlens.training.networks.registry import network_named
from attnlens.training.networks.vit import ViT
from attnlens.training.seen import METADATA_KEY, Seen, read

if TYPE_CHECKING:
    from torch import nn

    from attnlens.fit.params import InitParams
    from attnlens.models.opened import OpenedModel


_BESIDE = 1 << 28  # bytes that a network from a file may hold beyond its weights and as much again
TINY: Mapping[str, Any] = {"embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0}
"""Sizes of a ViT-Ti."""


@dataclass(frozen=True)
class Source:
    """What a run starts from: the network, its sizes, what was fitted, and weights where the model is pre-trained."""

    name: str
    """As reports call it."""
    network: type[Network]
    sizes: Mapping[str, Any]
    """Those of the network's sizes that do not come from the data."""
    params: InitParams | None
    params_file_sha256: str = ""
    opened: OpenedModel | None = None
    """None for a network that is trained from drawn weights alone."""
    teacher: Mapping[str, Any] = field(default_factory=dict)
    """How `transfer-attention` is told of the weights."""
    seen: tuple[Seen, ...] | None = None
    """What the weights were trained on; None where nothing says so."""
    sha256: str | None = None
    """Hash of the file of weights."""

    @classmethod
    def of(cls, model: str | None, checkpoint: Path | None = None, params: Path | None = None) -> Source:
        """Return the named network, else the pre-trained model; None is the shipped ViT.

        Raises `ModelNotFoundError`, `ParamsError`; for a pre-trained model also what `attnlens.inspect` raises, and
        `UnsupportedAttentionError` where layers' widths differ.
        """
        from attnlens.fit.fit_params import fit_params
        from attnlens.fit.params import InitParams
        from attnlens.models.open import open_model

        loaded = None if params is None else InitParams.load(params)
        network = network_named(model)
        if network is not None:
            assert model is not None
            told = "" if params is None else hashlib.sha256(params.read_bytes()).hexdigest()
            drawn = cls(model, network, network.sizes_of(model), loaded, told)
            return drawn if checkpoint is None else drawn.with_weights(checkpoint)
        opened = open_model(model, checkpoint)
        sizes = _sizes_of(opened)
        fitted = fit_params(model, checkpoint=checkpoint) if loaded is None else loaded
        teacher = {"teacher": model, "checkpoint": checkpoint}
        sha256 = opened.provenance().get("sha256")
        return cls(opened.name, ViT, sizes, fitted, "", opened, teacher, _seen(model, opened), sha256)

    def with_weights(self, path: Path) -> Source:
        """Return the named network with the weights that a comparison of such networks saved.

        Raises `CheckpointError` for a file that cannot be read, or whose weights are not of the sizes it states,
        `UsageError` for weights of another network.
        """
        import torch

        from attnlens.fit.fit_params import fit_params
        from attnlens.models.open import open_model

        stored = open_checkpoint(path)
        sizes = parse_object(stored.metadata.get("sizes", "{}").encode(), path)
        if stored.metadata.get("network") != self.network.module:
            raise UsageError(
                f"--checkpoint {path} holds no weights of {self.name} as `attnlens train-compare --save-weights` "
                "writes them: name the --model they are of"
            )
        module = _of_sizes(self.network, sizes, stored, path).build(0)
        module.load_state_dict({name: torch.as_tensor(np.array(stored[name])) for name in stored})
        opened = open_model(module, None, filters=True)
        fitted = fit_params(module) if self.params is None else self.params
        return replace(
            self,
            name=f"{path.stem} ({self.name})",
            params=fitted,
            opened=opened,
            teacher={"teacher": module},
            seen=read(stored.metadata.get(METADATA_KEY)),
            sha256=stored.provenance().get("sha256"),
        )

    @classmethod
    def drawn(cls, sizes: Mapping[str, Any], params: Path | None = None) -> Source:
        """Return a plain ViT of some sizes, else ViT-Ti's, that is trained from drawn weights alone.

        Raises `ParamsError`.
        """
        from attnlens.fit.params import InitParams

        loaded = None if params is None else InitParams.load(params)
        sha256 = "" if params is None else hashlib.sha256(params.read_bytes()).hexdigest()
        return cls("a plain ViT, drawn", ViT, {**TINY, **sizes}, loaded, sha256)

    def default_arms(self) -> list[str]:
        """Return the arms that are trained where none are named: of a drawn ViT those that need no source."""
        arms = list(self.network.default_arms)
        if self.network is not ViT or self.opened is not None:
            return arms
        fits = ("fitted", "norm-matched")
        return [arm for arm in arms if arm != "pretrained" and (arm not in fits or self.params is not None)]

    def record(self) -> dict[str, Any]:
        """Return what a configuration says about it."""
        if self.opened is None and self.network is ViT:
            return {"model": self.name, "sha256": None, "drawn": True}
        return {"model": self.name, "sha256": self.sha256}

    def params_sha256(self, model: nn.Module, arms: Sequence[str] = ()) -> str:
        """Return the hash of what the fitted arms draw this network with, else of the parameter file."""
        if self.opened is None or self.params is None or self.params_file_sha256:
            return self.params_file_sha256
        digest = hashlib.sha256()
        for filters in self.params.filters:
            digest.update(filters.model_dump_json().encode())
        for request in self.params.for_model(model):
            digest.update(np.ascontiguousarray(request.qk).data)
            digest.update(np.ascontiguousarray(request.ov).data)
        for request in self.params.for_model(model, "channels") if "fitted-gains" in arms else ():
            for drawn in (request.qk, request.ov, *(vars(gains) for gains in (request.qk_gains, request.ov_gains))):
                for values in drawn.values() if isinstance(drawn, dict) else (drawn,):
                    digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()


def on_meta(network: Network, what: str) -> nn.Module:
    """Return a network on the meta device, which takes no memory.

    Raises `ModelNotFoundError` where it would have more modules than any, and what building it raises.
    """
    import torch

    with torch.device("meta"), modules_counted(what):
        return network.build(0)


def _of_sizes(kind: type[Network], sizes: Any, stored: Checkpoint, path: Path) -> Network:
    """Return the network of the sizes that a file states, where the weights in it are those of such a network.

    What a network holds beside its weights, as a mask, may take no more memory than `_BESIDE` and the weights do.
    """
    try:
        network = kind.model_validate(sizes)
        module = on_meta(network, str(path))
    except Exception as error:  # any constructor, with any sizes a file may state
        raise CheckpointError(
            f"{path} states sizes that no {kind.__name__} has ({first_line(error)}): save the weights again"
        ) from error
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    held = {name: tuple(stored.shape(name)) for name in stored}
    wrong = next((name for name in {**shapes, **held} if shapes.get(name) != held.get(name)), None)
    if wrong is not None:
        raise CheckpointError(
            f"{path} does not hold the {kind.__name__} of the sizes it states: {wrong} is "
            f"{list(held[wrong]) if wrong in held else 'not there'}, not "
            f"{list(shapes[wrong]) if wrong in shapes else 'one of its tensors'}. Save the weights again"
        )
    weights = sum(tensor.nbytes for tensor in module.state_dict().values())
    beside = sum(buffer.nbytes for buffer in module.buffers())
    if beside > _BESIDE + weights:
        raise CheckpointError(
            f"{path} states sizes for which a {kind.__name__} holds {in_words(beside)} beside {in_words(weights)} of "
            "weights: a smaller context is read"
        )
    return network


def _seen(model: str | None, opened: OpenedModel) -> tuple[Seen, ...] | None:
    """Return what a file's metadata, or the config.json of a timm folder, states."""
    if METADATA_KEY in opened.checkpoint.metadata:
        return read(opened.checkpoint.metadata[METADATA_KEY])
    folder = EMBEDDED if model is None else Path(str(model).removeprefix("local-dir:"))
    return read(config_in(folder).get(METADATA_KEY)) if there((folder / "config.json").is_file) else None


def _sizes_of(opened: OpenedModel) -> dict[str, Any]:
    """Read the sizes of a plain ViT off a model's layers."""
    layers = (read_heads(spec, opened.checkpoint, index) for index, spec in opened.architecture.indexed())
    widths = {(weights.embed_dim, weights.num_heads) for weights in layers}
    if len(widths) > 1:
        raise UnsupportedAttentionError(
            f"{opened.name} has layers of different widths {sorted(widths)}: a plain ViT of its sizes does not "
            "exist. Name another --model"
        )
    ((embed_dim, num_heads),) = widths
    bias = "blocks.0.mlp.fc1.bias"
    ratio = opened.checkpoint.shape(bias)[0] / embed_dim if bias in opened.checkpoint else 4.0
    depth = len(opened.architecture.order)
    return {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": ratio}
