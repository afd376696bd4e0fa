"""The attention module that stands in for timm's, and the block around it with or without skips and MLP."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from attnlens.errors import UsageError
from attnlens.signal.variants import Mix


class MixedAttention(Attention):  # type: ignore[misc]  # timm is untyped
    """Attend with a head's own mix of the identity, softmax and a constant: see `Mix`.

        X -> sum_h (a_h I + b_h diag(D) softmax(Q_h K_h^T / sqrt(head_dim) + log P) - c_h P) X W_V[h] W_O[h]

    Takes over ``qkv`` and ``proj`` of the module it replaces. Parameters ``a``, ``b``, ``c`` ``[head, 1, 1]``, those of
    the mix; buffers ``log_P``, ``P`` ``[token, token]`` and ``D`` ``[token, 1]``, which are not in the state dict: they
    follow from the arguments. No value is looked at to decide anything, so `torch.func` maps it; off the fused path
    (``fused_attn``) on every device.
    """

    def __init__(self, like: Attention, mix: Mix, *, causal: bool) -> None:
        nn.Module.__init__(self)
        # beside its modules it holds numbers; which ones depends on timm's version
        self.__dict__.update({name: value for name, value in vars(like).items() if name not in vars(self)})
        for name, part in like.named_children():
            self.add_module(name, part)
        self.causal = causal
        self.train(like.training)
        weight = like.qkv.weight
        with np.errstate(divide="ignore"):  # log 0 = -inf is the causal mask
            log_P = np.log(mix.P)
        self._buffer("log_P", log_P, weight)
        self._buffer("D", None if mix.D is None else mix.D[:, None], weight)
        self._buffer("P", None if mix.c is None else mix.P, weight)
        for name, start in (("a", mix.a), ("b", mix.b), ("c", mix.c)):
            gains = None if start is None else nn.Parameter(weight.new_full((like.num_heads, 1, 1), start))
            self.register_parameter(name, gains)

    def _buffer(self, name: str, value: np.ndarray | None, like: Tensor) -> None:
        held = None if value is None else torch.from_numpy(np.asarray(value)).to(like)
        self.register_buffer(name, held, persistent=False)

    @property
    def attention_biases(self) -> Tensor | None:
        """``log P`` where it is not uniform: under this name `attnlens.inspect` tells of a term beside the product."""
        return None if self.D is None else self.log_P

    def forward(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:  # noqa: ARG002
        """Mix ``x [batch, token, embed_dim]``. Sequences may be shorter than P where attention is causal."""
        batch, tokens, _ = x.shape
        if attn_mask is not None or (tokens != len(self.log_P) and not self.causal):
            raise UsageError(f"this attention is made for {len(self.log_P)} tokens without a mask: rewire for others")
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        bias = self.log_P[:tokens, :tokens]
        if self.fused_attn:
            dropped = self.attn_drop.p if self.training else 0.0
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropped)
        else:
            mixed = self.attn_drop((q * self.scale @ k.mT + bias).softmax(-1)) @ v
        if self.D is not None:
            mixed = self.D[:tokens] * mixed
        if self.b is not None:
            mixed = self.b * mixed
        if self.a is not None:
            mixed = self.a * v + mixed
        if self.c is not None:
            mixed = mixed - self.c * (self.P[:tokens, :tokens] @ v)
        return self.proj_drop(self.proj(mixed.transpose(1, 2).flatten(2)))


class RewiredBlock(nn.Module):
    """A pre-norm block of timm's with its parts under their names, ``x <- [x +] branch(x)`` for attention and MLP.

    Without skips there is no LayerScale and no stochastic depth either. ``mlp=None`` leaves the MLP out.
    """

    mlp: nn.Module | None

    def __init__(self, block: Any, *, skips: bool, norms: bool, mlp: nn.Module | None) -> None:
        super().__init__()
        self.skips = skips
        self.norm1 = block.norm1 if norms else nn.Identity()
        self.attn = block.attn
        self.norm2 = block.norm2 if norms and mlp is not None else nn.Identity()
        self.register_module("mlp", mlp)
        self.ls1, self.drop_path1, self.ls2, self.drop_path2 = (
            getattr(block, name) if skips else nn.Identity() for name in ("ls1", "drop_path1", "ls2", "drop_path2")
        )
        self.train(block.training)

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        """Transform ``x [batch, token, embed_dim]``; ``masks`` are what this version of timm passes to its blocks."""
        branch = self.attn(self.norm1(x), **masks)
        x = self._joined(x, self.drop_path1(self.ls1(branch)))
        if self.mlp is not None:
            x = self._joined(x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))
        return x

    def _joined(self, x: Tensor, branch: Tensor) -> Tensor:
        return x + branch if self.skips else branch
