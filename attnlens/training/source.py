"""What the networks of a comparison start from: a pre-trained model, or a named network without weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.errors import UnsupportedAttentionError
from attnlens.layouts import read_heads
from attnlens.training.networks.base import Network
from attnlens.training.networks.registry import network_named
from attnlens.training.networks.vit import ViT

if TYPE_CHECKING:
    from torch import nn

    from attnlens.fit.params import InitParams
    from attnlens.models.opened import OpenedModel


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
            sha256 = "" if params is None else hashlib.sha256(params.read_bytes()).hexdigest()
            return cls(model, network, network.sizes_of(model), loaded, sha256)
        opened = open_model(model, checkpoint)
        sizes = _sizes_of(opened)
        fitted = fit_params(model, checkpoint=checkpoint) if loaded is None else loaded
        return cls(opened.name, ViT, sizes, fitted, "", opened, {"teacher": model, "checkpoint": checkpoint})

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
        return {"model": self.name, "sha256": self.opened.provenance().get("sha256") if self.opened else None}

    def params_sha256(self, model: nn.Module) -> str:
        """Return the hash of the requests the fitted arm draws this network with, else of the parameter file."""
        if self.opened is None or self.params is None:
            return self.params_file_sha256
        digest = hashlib.sha256()
        for request in self.params.for_model(model):
            digest.update(np.ascontiguousarray(request.qk).data)
            digest.update(np.ascontiguousarray(request.ov).data)
        return digest.hexdigest()


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
