"""A small causal transformer over bytes, built of timm's blocks under timm's names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attnlens.errors import ModelNotFoundError, UsageError
from attnlens.vocabulary import one_of

PRESETS: Mapping[str, Mapping[str, int]] = {
    "gpt-tiny": {"vocab_size": 256, "context": 128, "embed_dim": 96, "depth": 6, "num_heads": 3},
}
"""Sizes by name."""
POSITIONS = ("learned", "sincos")


class CausalAttention(Attention):  # type: ignore[misc]  # timm is untyped
    """timm's attention under a causal mask: a token attends to itself and those before it.

    ``fused_attn`` takes torch's fused attention; otherwise scores are formed, which `torch.func.vmap` can map anywhere.
    """

    def __init__(self, embed_dim: int, num_heads: int, context: int, fused: bool = True) -> None:
        super().__init__(embed_dim, num_heads, qkv_bias=True)
        self.fused_attn = fused
        above = torch.ones(context, context, dtype=torch.bool).triu(1)
        self.register_buffer("mask", torch.zeros(context, context).masked_fill(above, -math.inf), persistent=False)

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = True) -> Tensor:  # noqa: ARG002
        """Mix ``x [batch, token, embed_dim]``; the mask is always the causal one, whatever a block of timm's passes."""
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = (q * self.scale @ k.mT + self.mask[:tokens, :tokens]).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Pre-norm causal transformer: byte values ``[batch, token]`` to the next byte's logits ``[batch, token, vocab]``.

        x_0 = embed[ids] + pos_embed;  x <- x + attn(norm1(x));  x <- x + mlp(norm2(x));  logits = norm(x) @ head^T

    Blocks are timm's, with its parameter names (``blocks.N.norm1``, ``attn.qkv``, ``attn.proj``, ``norm2``,
    ``mlp.fc1``, ``mlp.fc2``), so that attention is read and initialised as in a ViT. ``positions`` is ``learned``, or
    ``sincos``: sines and cosines of wavelengths from 2 pi to 20000 pi, which are not trained. Sequences may be shorter
    than ``context``; ids may be of any integer type. ``fused`` as in `CausalAttention`. Raises `UsageError` for sizes
    that do not fit.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        context: int = 128,
        embed_dim: int = 96,
        depth: int = 6,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        positions: str = "learned",
        fused: bool = True,
    ) -> None:
        super().__init__()
        if min(vocab_size, context, embed_dim, depth, num_heads) < 1:
            raise UsageError("a GPT of size 0 cannot be built: give whole numbers of at least 1")
        if embed_dim % num_heads:
            raise UsageError(f"embed_dim = {embed_dim} is no multiple of num_heads = {num_heads}")
        positions = one_of("positions", positions, POSITIONS)
        if positions == "sincos" and embed_dim % 2:
            raise UsageError(f"positions = 'sincos' needs an even embed_dim, not {embed_dim}")
        self.vocab_size, self.context, self.embed_dim, self.positions = vocab_size, context, embed_dim, positions
        self.num_features = embed_dim
        # what attnlens reads a network's input from: here the tokens of one sequence
        self.pretrained_cfg = {"architecture": "gpt", "input_size": (context,)}
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.norm_pre = nn.Identity()
        self.embed = nn.Embedding(vocab_size, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, context, embed_dim), requires_grad=positions == "learned")
        self.blocks = nn.Sequential(
            *(Block(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm) for _ in range(depth))
        )
        for block in self.blocks:
            block.attn = CausalAttention(embed_dim, num_heads, context, fused)
        self.norm = norm(embed_dim)
        self.head = nn.Linear(embed_dim, vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw every weight anew from torch's global generator, as GPT-2 does.

        Normal with standard deviation .02, the projections into the residual stream .02 / sqrt(2 depth); biases zero.
        """
        depth = len(self.blocks)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                into_stream = name.endswith(("attn.proj", "mlp.fc2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * depth) if into_stream else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        with torch.no_grad():
            if self.positions == "learned":
                self.pos_embed.normal_(std=0.02)
            elif not self.pos_embed.is_meta:
                self.pos_embed.copy_(sincos_positions(self.context, self.embed_dim))

    def forward_features(self, ids: Tensor) -> Tensor:
        """Return the normed token representations ``[batch, token, embed_dim]`` behind the last block."""
        x = self.embed(ids.long()) + self.pos_embed[:, : ids.shape[1]]
        return self.norm(self.blocks(self.norm_pre(x)))

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits ``[batch, token, vocab]`` of the byte behind each token."""
        return self.head(self.forward_features(ids))


def sincos_positions(tokens: int, embed_dim: int) -> Tensor:
    """Return ``[token, embed_dim]``: sin(t w_i) in the first half, cos(t w_i) in the second, w_i = 10000^(-2i/d)."""
    half = embed_dim // 2
    angles = torch.arange(tokens)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def create_gpt(name: str = "gpt-tiny", seed: int = 0, **sizes: Any) -> GPT:
    """Build a preset under a seed, single sizes replaced by ``sizes``; torch's global generator is put back.

    Raises `ModelNotFoundError` for a name that is no preset, `UsageError` for sizes that do not fit.
    """
    from attnlens.inits.apply import seeded

    if name not in PRESETS:
        raise ModelNotFoundError(f"no language model is named {name!r}: choose from {', '.join(PRESETS)}")
    with seeded(seed):
        return GPT(**{**PRESETS[name], **sizes})
