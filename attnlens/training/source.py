"""What the networks of a comparison start from: a pre-trained model, or a named network without weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from attnlens.errors import UnsupportedAttentionError
from attnlens.layouts import read_heads
from attnlens.training.networks.base import Network
from attnlens.training.networks.registry import network_named
from attnlens.training.networks.vit import ViT

if TYPE_CHECKING:
    from torch import nn

    from attnlens.fit.params import InitParams
    from attnlens.models.open import OpenedModel


class Source(Protocol):
    """What a run starts from. `Pretrained` and `Scratch` are all there are."""

    @property
    def name(self) -> str:
        """Name of the model, as reports call it."""
        ...

    @property
    def network(self) -> type[Network]:
        """The kind of network that is trained."""
        ...

    @property
    def sizes(self) -> Mapping[str, Any]:
        """The network's sizes that do not come from the data."""
        ...

    @property
    def params(self) -> InitParams | None:
        """What was fitted, None where nothing was."""
        ...

    @property
    def opened(self) -> OpenedModel | None:
        """The pre-trained weights, None where there are none."""
        ...

    @property
    def teacher(self) -> Mapping[str, Any]:
        """How `transfer-attention` is told of the pre-trained weights."""
        ...

    def record(self) -> dict[str, Any]:
        """Return what a configuration says about it."""
        ...

    def params_sha256(self, model: nn.Module) -> str:
        """Return the hash of what the fitted arm draws this network with; empty where there is nothing."""
        ...


@dataclass(frozen=True)
class Pretrained:
    """A pre-trained model: its sizes, what was fitted in it, and its weights."""

    teacher: Mapping[str, Any]
    """The model as the user named it, None for the shipped ViT, and the checkpoint."""
    opened: OpenedModel
    params: InitParams
    sizes: Mapping[str, Any]
    network: ClassVar[type[Network]] = ViT

    @classmethod
    def of(cls, model: str | None, checkpoint: Path | None = None, params: Path | None = None) -> Pretrained:
        """Open the model, read its sizes off its layers, and load or fit the parameters.

        Raises what `attnlens.inspect` raises, `ParamsError`, `UnsupportedAttentionError` where layers' widths differ.
        """
        from attnlens.fit.fit_params import fit_params
        from attnlens.fit.params import InitParams
        from attnlens.models.open import open_model

        opened = open_model(model, checkpoint)
        indexed = opened.architecture.indexed()
        widths = {(w.embed_dim, w.num_heads) for w in (read_heads(s, opened.checkpoint, i) for i, s in indexed)}
        if len(widths) > 1:
            raise UnsupportedAttentionError(
                f"{opened.name} has layers of different widths {sorted(widths)}: a plain ViT of its sizes does not "
                "exist. Name another --model"
            )
        ((embed_dim, num_heads),) = widths
        ratio = 4.0
        if "blocks.0.mlp.fc1.bias" in opened.checkpoint:
            ratio = opened.checkpoint.shape("blocks.0.mlp.fc1.bias")[0] / embed_dim
        depth = len(opened.architecture.order)
        sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads, "mlp_ratio": ratio}
        fitted = fit_params(model, checkpoint=checkpoint) if params is None else InitParams.load(params)
        return cls({"teacher": model, "checkpoint": checkpoint}, opened, fitted, sizes)

    @property
    def name(self) -> str:
        """See `Source`."""
        return self.opened.name

    def record(self) -> dict[str, Any]:
        """See `Source`."""
        return {"model": self.name, "sha256": self.opened.provenance().get("sha256")}

    def params_sha256(self, model: nn.Module) -> str:
        """Return the hash of the requests the fitted arm draws this network with."""
        digest = hashlib.sha256()
        for request in self.params.for_model(model):
            digest.update(np.ascontiguousarray(request.qk).data)
            digest.update(np.ascontiguousarray(request.ov).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Scratch:
    """A named network that is trained from drawn weights alone, and the parameters it may be drawn with."""

    name: str
    network: type[Network]
    sizes: Mapping[str, Any]
    params: InitParams | None = None
    params_file_sha256: str = ""
    opened: ClassVar[None] = None
    teacher: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def of(cls, name: str, params: Path | None = None) -> Scratch:
        """Look the sizes up and load the parameters. Raises `ModelNotFoundError`, `ParamsError`."""
        from attnlens.fit.params import InitParams

        network = network_named(name)
        assert network is not None
        sizes = network.sizes_of(name)
        if params is None:
            return cls(name, network, sizes)
        return cls(name, network, sizes, InitParams.load(params), hashlib.sha256(params.read_bytes()).hexdigest())

    def record(self) -> dict[str, Any]:
        """See `Source`."""
        return {"model": self.name, "sha256": None}

    def params_sha256(self, model: nn.Module) -> str:  # noqa: ARG002  # a file is the same for every network
        """Return the hash of the parameter file; empty where there is none."""
        return self.params_file_sha256
