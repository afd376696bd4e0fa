"""The plain ViT every arm trains: timm's module for one model, and the same network for a stack of models at once.

Weights of a stack carry a leading axis of models, ``[model, ...]``, under the names timm gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING, Any

from attnlens.training.families import PLAIN, Forward, ModuleForward, Wiring, image_reader, random_images
from attnlens.training.shapes import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from attnlens.training.config import Config

ARCHITECTURE = "vit_tiny_patch16_224"
"""timm's name of the class and its defaults; every size is given explicitly."""
POSITIONS = "pos_embed"
DRAWING = RLock()
"""Held while a network draws from torch's global generator, which all threads share."""


def model_args(shape: Shape) -> dict[str, Any]:
    """Return the arguments timm builds the network with."""
    return {
        "img_size": shape.image_size,
        "patch_size": shape.patch_size,
        "in_chans": shape.channels,
        "num_classes": shape.classes,
        "embed_dim": shape.embed_dim,
        "depth": shape.depth,
        "num_heads": shape.num_heads,
        "mlp_ratio": shape.mlp_ratio,
        "class_token": False,
        "global_pool": "avg",
    }


def build_network(shape: Shape, seed: int) -> nn.Module:
    """Build timm's ViT, its default initialisation drawn under ``seed``, with fixed 2-D sin-cos positions.

    Average pooling and no class token. torch's global generator is put back as it was.
    """
    import timm
    from timm.layers import build_sincos2d_pos_embed

    from attnlens.inits.apply import seeded

    with DRAWING, seeded(seed):
        model = timm.create_model(ARCHITECTURE, **model_args(shape))
    positions = build_sincos2d_pos_embed(model.patch_embed.grid_size, dim=shape.embed_dim)
    model.pos_embed.requires_grad_(False).copy_(positions)
    return model


def forward(weights: Mapping[str, Tensor], patches: Tensor, shape: Shape, *, fused: bool) -> Tensor:
    """Return logits ``[model, image, class]`` of every model on its own patches ``[model, image * token, value]``.

    ``fused`` takes torch's fused attention on ``[model * image, head, token, head_dim]``; otherwise scores are formed.
    """
    import torch
    from torch.nn.functional import gelu, scaled_dot_product_attention

    models, tokens, heads = patches.shape[0], shape.tokens, shape.num_heads
    images = patches.shape[1] // tokens
    head_dim = shape.embed_dim // heads

    def linear(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"].flatten(2)
        return torch.baddbmm(weights[f"{name}.bias"][:, None], x, weight.mT)

    x = linear(patches, "patch_embed.proj").view(models, images, tokens, -1)
    x = (x + weights[POSITIONS][:, None]).flatten(1, 2)
    for layer in range(shape.depth):
        block = f"blocks.{layer}."
        qkv = linear(_normed(x, weights, f"{block}norm1"), f"{block}attn.qkv")
        # timm's order of the fused projection, as its own forward pass takes it apart
        q, k, v = qkv.view(models * images, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v) if fused else (q * head_dim**-0.5 @ k.mT).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).reshape(models, images * tokens, -1), f"{block}attn.proj")
        hidden = gelu(linear(_normed(x, weights, f"{block}norm2"), f"{block}mlp.fc1"))
        x = x + linear(hidden, f"{block}mlp.fc2")
    pooled = x.view(models, images, tokens, -1).mean(2)
    return linear(_normed(pooled, weights, "fc_norm"), "head")


def _normed(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    import torch
    from torch.nn.functional import layer_norm

    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    if len(weight) == 1:
        return layer_norm(x, x.shape[-1:], weight[0], bias[0], EPSILON)
    return torch.addcmul(bias[:, None], layer_norm(x, x.shape[-1:], eps=EPSILON), weight[:, None])


EPSILON = 1e-6
"""timm's epsilon of a ViT's LayerNorms."""


def patches_of(images: Tensor, mean: Tensor, std: Tensor, patch_size: int) -> Tensor:
    """Return normalised patches ``[set, image * token, channel * row * column]`` of ``[set, image, channel, y, x]``.

    A patch lists its values as the flattened kernel of timm's patch embedding does; tokens go row by row.
    """
    sets, count, channels, height, width = images.shape
    p = patch_size
    scaled = (images.to(mean.dtype) * (1 / 255) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    cut = scaled.view(sets, count, channels, height // p, p, width // p, p).permute(0, 1, 3, 5, 2, 4, 6)
    return cut.reshape(sets, count * (height // p) * (width // p), channels * p * p)


@dataclass(frozen=True)
class BatchedForward:
    """The plain ViT's forward pass over a stack, on patches cut once a set of images."""

    shape: Shape
    mean: Tensor
    std: Tensor
    fused: bool

    def __call__(self, weights: Mapping[str, Tensor], inputs: Tensor, where: Tensor, *, training: bool) -> Tensor:  # noqa: ARG002
        """See `attnlens.training.families.Forward`; training and evaluation are the same."""
        patches = patches_of(inputs, self.mean, self.std, self.shape.patch_size)[where]
        flat = {**weights, POSITIONS: weights[POSITIONS][:, 0]}
        return forward(flat, patches, self.shape, fused=self.fused)


@dataclass(frozen=True)
class ViTFamily:
    """See `attnlens.training.families.Family`: the batched pass for the plain network, timm's own for a rewired one."""

    shape: Shape

    def build(self, seed: int) -> nn.Module:
        """Build the network as timm draws it."""
        return build_network(self.shape, seed)

    def forward(
        self,
        module: nn.Module,
        wiring: Wiring,
        config: Config,
        models: int,
        device: torch.device,
    ) -> Forward:
        """Return the batched pass, unless the network was rewired."""
        import torch

        if wiring != PLAIN:
            return ModuleForward.of(module, models, device, image_reader(config, device))
        mean, std = torch.tensor(config.mean, device=device), torch.tensor(config.std, device=device)
        # on a CPU forming the scores is faster: 1034 against 811 images/s at 16 tokens, width 96, two threads
        return BatchedForward(self.shape, mean, std, fused=device.type != "cpu")

    def example(self, items: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return random images and labels."""
        return random_images(self.shape, items, generator)

    def describe(self) -> str:
        """Say what the network is."""
        shape = self.shape
        return (
            f"plain ViT, width {shape.embed_dim}, depth {shape.depth}, {shape.num_heads} heads, patch "
            f"{shape.patch_size} of {shape.image_size} px, {shape.tokens} tokens, average pooling, fixed 2-D sin-cos "
            "positions"
        )

    def exported(self) -> dict[str, str]:
        """Return timm's name of the class and its arguments: what `attnlens inspect` opens."""
        return {"architecture": ARCHITECTURE, "model_args": json.dumps(model_args(self.shape))}
