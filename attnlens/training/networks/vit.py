"""The plain ViT: timm's module for one model, the same network for a stack of models at once, a source's weights in it.

Weights of a stack carry a leading axis of models, ``[model, ...]``, under the names timm gives them.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field

from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.training.networks.base import PLAIN, Forward, ImageNetwork, Moments, Weights, Wiring, register
from attnlens.words import counted

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from attnlens.models.opened import OpenedModel

ARCHITECTURE = "vit_tiny_patch16_224"
"""timm's name of the class and its defaults; every size is given explicitly."""
POSITIONS = "pos_embed"
EPSILON = 1e-6
"""timm's epsilon of a ViT's LayerNorms."""
_PLAIN = re.compile(
    r"(cls_token|reg_token|pos_embed|patch_embed\.proj\.(weight|bias)|(norm|fc_norm|head|head_dist)\.(weight|bias)|"
    r"blocks\.\d+\.(norm[12]\.(weight|bias)|attn\.(qkv|proj)\.(weight|bias)|ls[12]\.gamma|mlp\.fc[12]\.(weight|bias)))"
)


@register
class ViT(ImageNetwork):
    """Sizes of a plain ViT: average pooling, no class token, fixed 2-D sin-cos positions."""

    prefix: ClassVar[str] = ""
    module: ClassVar[str] = ARCHITECTURE
    default_arms: ClassVar[tuple[str, ...]] = (
        *("default", "mimetic", "fitted", "pretrained"),
        *("norm-matched", "norm-matched-mimetic"),
    )

    embed_dim: int = Field(ge=4)
    depth: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    mlp_ratio: float = Field(gt=0)

    @property
    def tokens(self) -> int:
        """Number of patches."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def training_flops(self) -> float:
        """Return the floating-point operations of one training image, forward and backward, matrix products only.

        ``depth T (3 (8 + 4 r) d^2 + 14 T d)``: linear layers three times, attention 3.5 times its forward pass, as a
        fused backward pass forms the scores again; r is the MLP's ratio, T the number of tokens.
        """
        d, linear = self.embed_dim, 3 * (8 + 4 * self.mlp_ratio)
        return self.depth * self.tokens * (linear * d**2 + 14 * self.tokens * d)

    @property
    def training_bytes(self) -> float:
        """Return the bytes of memory traffic of one training image in bfloat16, derived and not measured.

        106 reads or writes of a token's d channels in each layer: what lies behind the byte bound of 24,000 images/s
        at 3.0 TB/s for width 192, depth 12 and 256 tokens, when nothing but element-wise chains is fused.
        """
        return 106 * 2 * self.depth * self.tokens * self.embed_dim

    def check(self, dataset: str) -> None:
        """Refuse sizes that do not go together. Raises `UsageError`."""
        super().check(dataset)
        if self.embed_dim % self.num_heads or self.embed_dim % 4:
            raise UsageError(
                f"width {self.embed_dim} with {counted(self.num_heads, 'head')}: sin-cos positions need a "
                "multiple of 4, and heads must divide it. Name another --model"
            )

    def drop_rates(self, last: float) -> list[float]:
        """See `Network`: evenly spaced, as timm has them."""
        return [last * layer / max(1, self.depth - 1) for layer in range(self.depth)]

    def model_args(self) -> dict[str, Any]:
        """Return the arguments timm builds the network with."""
        return {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "in_chans": self.channels,
            "num_classes": self.classes,
            "embed_dim": self.embed_dim,
            "depth": self.depth,
            "num_heads": self.num_heads,
            "mlp_ratio": self.mlp_ratio,
            "class_token": False,
            "global_pool": "avg",
        }

    def draw(self) -> nn.Module:
        """Build timm's ViT as timm draws it, with fixed positions."""
        import timm
        from timm.layers import build_sincos2d_pos_embed

        model = timm.create_model(ARCHITECTURE, **self.model_args())
        positions = build_sincos2d_pos_embed(model.patch_embed.grid_size, dim=self.embed_dim)
        model.pos_embed.requires_grad_(False).copy_(positions)
        return model

    def forward(
        self, module: nn.Module, wiring: Wiring, moments: Moments, models: int, device: torch.device
    ) -> Forward:
        """Return the batched pass for the plain network, timm's own for a rewired one."""
        import torch

        if wiring != PLAIN:
            return super().forward(module, wiring, moments, models, device)
        mean, std = (torch.tensor(values, device=device) for values in moments)
        # on a CPU forming the scores is faster: 1034 against 811 images/s at 16 tokens, width 96, two threads
        return BatchedForward(self, mean, std, fused=device.type != "cpu")

    def pretrained(self, opened: OpenedModel, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `attnlens.training.networks.base.Network`."""
        return pretrained_weights(opened, like)

    def describe(self) -> str:
        """Say what the network is."""
        return (
            f"plain ViT, width {self.embed_dim}, depth {self.depth}, {counted(self.num_heads, 'head')}, patch "
            f"{self.patch_size} of {self.image_size} px, {self.tokens} tokens, average pooling, fixed 2-D sin-cos "
            "positions"
        )

    def exported(self) -> dict[str, str]:
        """Return timm's name of the class and its arguments: what `attnlens inspect` opens."""
        return {"architecture": ARCHITECTURE, "model_args": json.dumps(self.model_args())}


@dataclass(frozen=True)
class BatchedForward:
    """The plain ViT's forward pass over a stack, on patches cut once a set of images."""

    sizes: ViT
    mean: Tensor
    std: Tensor
    fused: bool

    def __call__(
        self,
        weights: Weights,
        inputs: Tensor,
        where: Tensor,
        *,
        training: bool,  # noqa: ARG002  # what differs is told by ``keep``
        keep: Tensor | None = None,
    ) -> Tensor:
        """See `attnlens.training.networks.base.Forward`; training and evaluation are the same."""
        patches = patches_of(inputs, self.mean, self.std, self.sizes.patch_size)[where]
        flat = {**weights, POSITIONS: weights[POSITIONS][:, 0]}
        return forward(flat, patches, self.sizes, fused=self.fused, keep=keep)


def forward(
    weights: Mapping[str, Tensor], patches: Tensor, sizes: ViT, *, fused: bool, keep: Tensor | None = None
) -> Tensor:
    """Return logits ``[model, image, class]`` of every model on its own patches ``[model, image * token, value]``.

    ``fused`` takes torch's fused attention on ``[model * image, head, token, head_dim]``; otherwise scores are formed.
    ``keep [model, image, branch]`` multiplies what each residual branch adds, attention before MLP in every layer.
    """
    import torch
    from torch.nn.functional import gelu, scaled_dot_product_attention

    models, tokens, heads = patches.shape[0], sizes.tokens, sizes.num_heads
    images = patches.shape[1] // tokens
    head_dim = sizes.embed_dim // heads

    def linear(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"].flatten(2)
        return torch.baddbmm(weights[f"{name}.bias"][:, None], x, weight.mT)

    def scaled(added: Tensor, branch: int) -> Tensor:
        if keep is None:
            return added
        factor = keep[..., branch].repeat_interleave(tokens, 1).to(added.dtype)
        return added * factor[..., None]

    x = linear(patches, "patch_embed.proj").view(models, images, tokens, -1)
    x = (x + weights[POSITIONS][:, None]).flatten(1, 2)
    for layer in range(sizes.depth):
        block = f"blocks.{layer}."
        qkv = linear(_normed(x, weights, f"{block}norm1"), f"{block}attn.qkv")
        # timm's order of the fused projection, as its own forward pass takes it apart
        q, k, v = qkv.view(models * images, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v) if fused else (q * head_dim**-0.5 @ k.mT).softmax(-1) @ v
        added = linear(mixed.transpose(1, 2).reshape(models, images * tokens, -1), f"{block}attn.proj")
        x = x + scaled(added, 2 * layer)
        hidden = gelu(linear(_normed(x, weights, f"{block}norm2"), f"{block}mlp.fc1"))
        x = x + scaled(linear(hidden, f"{block}mlp.fc2"), 2 * layer + 1)
    pooled = x.view(models, images, tokens, -1).mean(2)
    return linear(_normed(pooled, weights, "fc_norm"), "head")


def _normed(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    import torch
    from torch.nn.functional import layer_norm

    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    if len(weight) == 1:
        return layer_norm(x, x.shape[-1:], weight[0], bias[0], EPSILON)
    return torch.addcmul(bias[:, None], layer_norm(x, x.shape[-1:], eps=EPSILON), weight[:, None])


def patches_of(images: Tensor, mean: Tensor, std: Tensor, patch_size: int) -> Tensor:
    """Return normalised patches ``[set, image * token, channel * row * column]`` of ``[set, image, channel, y, x]``.

    A patch lists its values as the flattened kernel of timm's patch embedding does; tokens go row by row.
    """
    sets, count, channels, height, width = images.shape
    p = patch_size
    scaled = (images.to(mean.dtype) * (1 / 255) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    cut = scaled.view(sets, count, channels, height // p, p, width // p, p).permute(0, 1, 3, 5, 2, 4, 6)
    return cut.reshape(sets, count * (height // p) * (width // p), channels * p * p)


def pretrained_weights(opened: OpenedModel, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's weights as the plain ViT ``like`` holds them; its classifier and prefix tokens are left behind.

    Patch and position embeddings are resampled by timm's own functions, input channels adapted by timm's; LayerScale is
    folded into the projection before it, which changes nothing the network computes; the norm before the
    source's classifier goes behind the pooling. Raises `UnsupportedAttentionError` where the source is no plain ViT.
    """
    import torch
    from timm.layers import resample_abs_pos_embed, resample_patch_embed
    from timm.models._manipulate import adapt_input_conv

    checkpoint, title = opened.checkpoint, opened.name
    names = list(checkpoint)
    strange = [name for name in names if not _PLAIN.fullmatch(name)]
    if strange or POSITIONS not in names:
        odd = f"it holds {strange[0]}" if strange else "it has no pos_embed"
        raise UnsupportedAttentionError(
            f"{title} is no plain ViT ({odd}): leave the arm pretrained out, pretrained-attention may still do"
        )

    def stored(name: str) -> Tensor:
        value = checkpoint[name]
        if isinstance(value, torch.Tensor):
            return value.detach().cpu().float()
        return torch.from_numpy(np.array(value, dtype=np.float32))

    weights: dict[str, Tensor] = {}
    _, channels, *patch_size = like["patch_embed.proj.weight"].shape
    patch = adapt_input_conv(channels, stored("patch_embed.proj.weight"))
    weights["patch_embed.proj.weight"] = resample_patch_embed(patch, patch_size)
    weights["patch_embed.proj.bias"] = stored("patch_embed.proj.bias")
    positions = stored(POSITIONS)
    old, grid = (math.isqrt(tokens) for tokens in (positions.shape[1], like[POSITIONS].shape[1]))
    sizes = {"old_size": [old, old], "num_prefix_tokens": positions.shape[1] - old**2}
    resampled = resample_abs_pos_embed(positions, [grid, grid], **sizes)
    weights[POSITIONS] = resampled[:, sizes["num_prefix_tokens"] :]
    for leaf in ("weight", "bias"):
        weights[f"fc_norm.{leaf}"] = stored(f"fc_norm.{leaf}" if f"fc_norm.{leaf}" in names else f"norm.{leaf}")
    for layer in range(len(opened.architecture.order)):
        block = f"blocks.{layer}."
        for name in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            for leaf in ("weight", "bias"):
                full = f"{block}{name}.{leaf}"
                weights[full] = stored(full) if full in names else torch.zeros_like(like[full])
        for scale, name in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            if f"{block}{scale}.gamma" in names:
                gamma = stored(f"{block}{scale}.gamma")
                weights[f"{block}{name}.weight"] = weights[f"{block}{name}.weight"] * gamma[:, None]
                weights[f"{block}{name}.bias"] = weights[f"{block}{name}.bias"] * gamma
    for name, tensor in weights.items():
        if tensor.shape != like[name].shape:
            raise UnsupportedAttentionError(
                f"{title}: {name} is {tuple(tensor.shape)}, a plain ViT of its sizes has {tuple(like[name].shape)}: "
                "leave the arm pretrained out"
            )
    return weights
