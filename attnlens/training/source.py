"""A named network without pre-trained weights: its sizes, and the parameters it may be drawn with."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.errors import UnsupportedAttentionError
from attnlens.layouts import read_heads
from attnlens.training import convmixer, gpt
from attnlens.training.network import POSITIONS
from attnlens.training.shapes import Shape
from attnlens.training.starts import PRETRAINED

if TYPE_CHECKING:
    from torch import Tensor, nn

    from attnlens.fit.params import InitParams
    from attnlens.models.opened import OpenedModel

if TYPE_CHECKING:
    from torch import nn

    from attnlens.fit.params import InitParams

_PLAIN = re.compile(
    r"(cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm|fc_norm|head|head_dist)\.(weight|bias)|"
    r"blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|ls[12]\.gamma|mlp\.fc[12]\.(weight|bias)))"
)


@dataclass(frozen=True)
class Source:
    """The pre-trained model: its sizes, what was fitted in it, and its weights."""

    model: str | None
    """As the user named it; None is the shipped ViT."""
    checkpoint: Path | None
    opened: OpenedModel
    params: InitParams
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float

    @classmethod
    def of(cls, model: str | None, checkpoint: Path | None = None, params: Path | None = None) -> Source:
        """Open the model, read its sizes off its layers, and load or fit the parameters.

        Raises what `attnlens.inspect` raises, `ParamsError`, `UnsupportedAttentionError` where layers' widths differ.
        """
        from attnlens.fit.fit_params import fit_params
        from attnlens.fit.params import InitParams
        from attnlens.models.open import open_model

        opened = open_model(model, checkpoint)
        indexed = opened.architecture.indexed()
        found = {(w.embed_dim, w.num_heads) for w in (read_heads(s, opened.checkpoint, i) for i, s in indexed)}
        if len(found) > 1:
            raise UnsupportedAttentionError(
                f"{opened.name} has layers of different widths {sorted(found)}: a plain ViT of its sizes does not "
                "exist. Name another --model"
            )
        ((embed_dim, num_heads),) = found
        ratio = 4.0
        if "blocks.0.mlp.fc1.bias" in opened.checkpoint:
            ratio = opened.checkpoint.shape("blocks.0.mlp.fc1.bias")[0] / embed_dim
        found_params = fit_params(model, checkpoint=checkpoint) if params is None else InitParams.load(params)
        depth = len(opened.architecture.order)
        return cls(model, checkpoint, opened, found_params, embed_dim, depth, num_heads, ratio)

    @property
    def name(self) -> str:
        """Name of the model, as reports call it."""
        return self.opened.name

    def record(self) -> dict[str, Any]:
        """Return what a configuration says about it."""
        return {"model": self.name, "sha256": self.opened.provenance().get("sha256")}

    def fitted(self) -> tuple[str, dict[str, Any]]:
        """Return the initialiser, with its options, that draws what was fitted."""
        return "fitted", {"params": self.params}

    def scale(self) -> dict[str, Any]:
        """Return the options of `norm-matched`: whose scale the control keeps."""
        return {"of": "fitted", "params": self.params}

    def params_sha256(self, model: nn.Module) -> str:
        """Return the hash of the requests the fitted arm draws this network with."""
        found = hashlib.sha256()
        for request in self.params.for_model(model):
            found.update(np.ascontiguousarray(request.qk).data)
            found.update(np.ascontiguousarray(request.ov).data)
        return found.hexdigest()


def source_weights(source: Source, shape: Shape, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the source's weights as this network holds them; its classifier and prefix tokens are left behind.

    Patch and position embeddings are resampled by timm's own functions, input channels adapted by timm's; LayerScale is
    folded into the projection in front of it, which changes nothing the network computes; the norm in front of the
    source's classifier goes behind the pooling. Raises `UnsupportedAttentionError` where the source is no plain ViT.
    """
    import torch
    from timm.layers import resample_abs_pos_embed, resample_patch_embed
    from timm.models._manipulate import adapt_input_conv

    checkpoint, title = source.opened.checkpoint, source.opened.name
    names = list(checkpoint)
    strange = [name for name in names if not _PLAIN.fullmatch(name)]
    if strange or POSITIONS not in names:
        odd = f"it holds {strange[0]}" if strange else "it has no pos_embed"
        raise UnsupportedAttentionError(
            f"{title} is no plain ViT ({odd}): leave the arm {PRETRAINED} out, pretrained-attention may still do"
        )

    def stored(name: str) -> Tensor:
        value = checkpoint[name]
        if isinstance(value, torch.Tensor):
            return value.detach().cpu().float()
        return torch.from_numpy(np.array(value, dtype=np.float32))

    found: dict[str, Tensor] = {}
    patch = adapt_input_conv(shape.channels, stored("patch_embed.proj.weight"))
    found["patch_embed.proj.weight"] = resample_patch_embed(patch, [shape.patch_size] * 2)
    found["patch_embed.proj.bias"] = stored("patch_embed.proj.bias")
    positions = stored(POSITIONS)
    old = math.isqrt(positions.shape[1])
    grid = shape.image_size // shape.patch_size
    sizes = {"old_size": [old, old], "num_prefix_tokens": positions.shape[1] - old**2}
    resampled = resample_abs_pos_embed(positions, [grid, grid], **sizes)
    found[POSITIONS] = resampled[:, sizes["num_prefix_tokens"] :]
    for leaf in ("weight", "bias"):
        found[f"fc_norm.{leaf}"] = stored(f"fc_norm.{leaf}" if f"fc_norm.{leaf}" in names else f"norm.{leaf}")
    for layer in range(shape.depth):
        block = f"blocks.{layer}."
        for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            for leaf in ("weight", "bias"):
                full = f"{block}{name}.{leaf}"
                found[full] = stored(full) if full in names else torch.zeros_like(like[full])
        for scale, name in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            if f"{block}{scale}.gamma" in names:
                gamma = stored(f"{block}{scale}.gamma")
                found[f"{block}{name}.weight"] = found[f"{block}{name}.weight"] * gamma[:, None]
                found[f"{block}{name}.bias"] = found[f"{block}{name}.bias"] * gamma
    for name, tensor in found.items():
        if tensor.shape != like[name].shape:
            raise UnsupportedAttentionError(
                f"{title}: {name} is {tuple(tensor.shape)}, a plain ViT of its sizes has {tuple(like[name].shape)}: "
                f"leave the arm {PRETRAINED} out"
            )
    return found


def is_scratch(model: str | None) -> bool:
    """Whether ``--model`` names a network that is trained from drawn weights alone."""
    return model is not None and model.startswith((convmixer.PREFIX, gpt.PREFIX))


@dataclass(frozen=True)
class Scratch:
    """Stands where `arms.Source` stands for a pre-trained model."""

    name: str
    sizes: dict[str, Any]
    params: InitParams | None
    params_file_sha256: str = ""
    model: None = None
    checkpoint: None = None
    opened: None = None

    @classmethod
    def of(cls, name: str, params: Path | None = None) -> Scratch:
        """Look the sizes up and load the parameters. Raises `ModelNotFoundError`, `ParamsError`."""
        from attnlens.fit.params import InitParams

        sizes = gpt.sizes_of(name) if name.startswith(gpt.PREFIX) else convmixer.sizes_of(name)
        if params is None:
            return cls(name, sizes, None)
        return cls(name, sizes, InitParams.load(params), hashlib.sha256(params.read_bytes()).hexdigest())

    @property
    def reads_text(self) -> bool:
        """Whether it is trained on bytes, not on images."""
        return "context" in self.sizes

    def record(self) -> dict[str, Any]:
        """Return what a configuration says about it."""
        return {"model": self.name, "sha256": None}

    def fitted(self) -> tuple[str, dict[str, Any]]:
        """Return the initialiser, with its options, that draws from ``--params``."""
        return "fitted" if self.reads_text else "conv-covariance", {"params": self.params}

    def scale(self) -> dict[str, Any]:
        """Return the options of `norm-matched`: whose scale the control keeps."""
        if not self.reads_text:
            return {"of": "conv-covariance"}
        return {"of": "mimetic"} if self.params is None else {"of": "fitted", "params": self.params}

    def default_arms(self) -> tuple[str, ...]:
        """Return the arms that are trained when none are named."""
        if self.reads_text:
            return ("default", "mimetic", "mimetic-positive", "qk-only", "norm-matched")
        return ("default", "conv-covariance", "norm-matched")

    def params_sha256(self, _model: nn.Module) -> str:
        """Return the hash of the parameter file; empty where there is none."""
        return self.params_file_sha256
