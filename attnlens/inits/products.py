"""From requests to factors: A = alpha Z + beta I drawn, truncated to the rank the layer has, split between its weights.

- W_Q[h] @ W_K[g]^T ~ A_h: one draw per query head, g = h // (query heads per key head);
- sum_h W_V[g] @ W_O[h] ~ A: one draw per layer, or one per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import TYPE_CHECKING, Literal

import numpy as np

from attnlens.heads import Array
from attnlens.inits.gained import gained_heads
from attnlens.inits.plan import ALL_HEADS, Layer, Plan, Request
from attnlens.inits.truncation import Band, haar, split, unwanted_band

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from attnlens.fit.gains import LayerGains

Noise = Literal["normal", "uniform"]
Columns = Literal["svd", "shuffled"]
Pair = tuple[float, float]


def draw_matrix(pair: Pair, size: int, noise: Noise, generator: torch.Generator) -> Tensor:
    """Draw A = alpha Z + beta I, ``[size, size]`` float64 on the CPU.

    Z is i.i.d. with mean 0 and variance 1/size, Gaussian or uniform, drawn in float32 and widened.
    """
    import torch

    alpha, beta = pair
    drawn = torch.empty(size, size)
    if noise == "normal":
        drawn.normal_(generator=generator)
    else:
        drawn.uniform_(-sqrt(3), sqrt(3), generator=generator)
    A = drawn.double().mul_(alpha / sqrt(size))
    A.diagonal().add_(beta)
    return A


def plan_qk(layer: Layer, pairs: Sequence[Pair], noise: Noise, gains: LayerGains | None = None) -> Plan:
    """Plan W_Q and W_K from one request a query head.

    With a key head of its own, W_Q = U_k sqrt(S_k) and W_K = V_k sqrt(S_k) of the head's draw. Where r query heads
    share a key head no choice meets r draws: their stack [A_1; ..; A_r] ~ [W_Q1; ..; W_Qr] W_K^T is solved in the
    least-squares sense by its own truncated SVD, which keeps the heads different and shares the error among them.
    At alpha = 0 the k directions are drawn uniformly: the law of the truncation as alpha goes to 0. ``gains`` make it
    the balanced products that the requests are of: see `inits.gained`.
    """
    weights = layer.weights
    if weights.W_Q.shape[1] != weights.W_K.shape[1]:
        reason = f"q reads {weights.W_Q.shape[1]} coordinates and k {weights.W_K.shape[1]}: the product has no diagonal"
        return Plan(skipped=(("qk", reason),))
    draws = [
        _Draw(pair, weights.embed_dim, noise, layer.streams.generator("qk", layer.index, head))
        for head, pair in enumerate(pairs)
    ]
    queries, keys = _split_groups(layer, draws, layer.query_groups, weights.head_dim)
    notes = []
    if layer.query_groups > 1:
        notes.append(f"{layer.query_groups} query heads share a key head: QK is their joint best approximation")
    if weights.head_dim > weights.embed_dim:
        notes.append(f"head_dim {weights.head_dim} exceeds the input's {weights.embed_dim}: QK is met exactly")
    requests = tuple(Request("qk", head, *pair) for head, pair in enumerate(pairs))
    queries, keys, planned = gained_heads(layer, requests, (queries, keys), layer.query_groups, gains)
    return Plan(W_Q=queries, W_K=keys, requests=requests, gains=planned, notes=tuple(notes))


def plan_ov(layer: Layer, pair: Pair, noise: Noise, columns: Columns, gains: LayerGains | None = None) -> Plan:
    """Plan W_V and W_O from one request for the layer's summed product.

    A = U S V^T, W_V = U sqrt(S), W_O = sqrt(S) V^T, cut into heads: in order of the singular values (``svd``, the first
    head gets the largest) or in a random order (``shuffled``, equal heads). Heads narrower than the layer's input,
    H k < d, hold the H k largest directions; wider ones, H k > d, all of A, turned at random into their width. Where r
    heads of W_O share a value head each takes 1/r of the product, the least-norm choice.
    """
    reason = ov_reason(layer)
    if reason:
        return Plan(skipped=(("ov", reason),))
    weights, size = layer.weights, layer.weights.out_dim
    generator = layer.streams.generator("ov", layer.index)
    A = draw_matrix(pair, size, noise, generator).to(layer.device)
    width = layer.values_width
    count = min(width, size)
    halves = [part[0] for part in split(A[None], count)]
    if columns == "shuffled":
        import torch

        order = torch.randperm(count, generator=layer.streams.generator("columns", layer.index))
        halves = [part[:, order.to(part.device)] for part in halves]
    left, right = (padded(layer, part.cpu().numpy(), width) for part in halves)
    request = Request("ov", ALL_HEADS, *pair)
    (left,), (right,), planned = gained_heads(layer, (request,), (left[None], right[None]), 1, gains)
    notes = []
    if width < size:
        notes.append(f"the heads' values are {width} wide: OV keeps the {width} largest of {size} directions")
    if layer.value_groups > 1:
        notes.append(f"{layer.value_groups} heads share a value head: each holds an equal part of its OV product")
    return Plan(
        W_V=_by_head(left, weights.value_dim),
        W_O=np.repeat(_by_head(right, weights.value_dim) / layer.value_groups, layer.value_groups, 0).swapaxes(1, 2),
        total=A.cpu().numpy() if width >= size and gains is None else None,
        requests=(request,),
        gains=planned,
        notes=tuple(notes),
    )


def plan_ov_heads(layer: Layer, pairs: Sequence[Pair], noise: Noise, gains: LayerGains | None = None) -> Plan:
    """Plan W_V and W_O from one request a head: W_V[h] @ W_O[h] is its own draw, truncated to the head's width.

    Shared value heads: as shared key heads in `plan_qk`, with the roles of input and output exchanged.
    """
    reason = ov_reason(layer)
    if reason:
        return Plan(skipped=(("ov", reason),))
    draws = [
        _Draw(pair, layer.weights.out_dim, noise, layer.streams.generator("ov", layer.index, head + 1))
        for head, pair in enumerate(pairs)
    ]
    outputs, values = _split_groups(layer, draws, layer.value_groups, layer.weights.value_dim, transposed=True)
    requests = tuple(Request("ov", head, *pair) for head, pair in enumerate(pairs))
    values, outputs, planned = gained_heads(layer, requests, (values, outputs), layer.value_groups, gains)
    return Plan(W_V=values, W_O=outputs.swapaxes(1, 2), requests=requests, gains=planned)


def ov_reason(layer: Layer) -> str:
    """Say why a layer has no OV product with a diagonal; empty where it has one."""
    weights = layer.weights
    if weights.W_O is None:
        return "no matrix maps the heads' values to the output"
    rows, cols = int(weights.W_V.shape[1]), weights.out_dim
    return "" if rows == cols else f"OV is {rows} x {cols}, not square: it has no diagonal"


class _Draw:
    """A draw that is made when it is needed: one matrix at a time is in memory on a CPU."""

    def __init__(self, pair: Pair, size: int, noise: Noise, generator: torch.Generator) -> None:
        self.pair, self.size, self.noise, self.generator = pair, size, noise, generator

    def matrix(self, layer: Layer, transposed: bool) -> Tensor:
        A = draw_matrix(self.pair, self.size, self.noise, self.generator).to(layer.device)
        return A.mT if transposed else A

    def projection(self, count: int) -> tuple[Tensor, Tensor]:
        """Split beta I on ``count`` directions drawn uniformly."""
        basis = haar(self.size, count, self.generator) * sqrt(abs(self.pair[1]))
        return (-basis if self.pair[1] < 0 else basis), basis

    def band(self, count: int) -> Band | None:
        return unwanted_band(*self.pair, count, self.size)


def _split_groups(
    layer: Layer, draws: list[_Draw], group: int, width: int, transposed: bool = False
) -> tuple[Array, Array]:
    """Return own ``[head, size, width]`` and shared ``[group, size, width]`` factors, own[h] @ shared[g]^T ~ A_h."""
    import torch

    size = draws[0].size
    count = min(width, size)
    parts: list[tuple[Tensor, Tensor]] = []
    if group > 1:
        for start in range(0, len(draws), group):
            members = draws[start : start + group]
            stack = torch.cat([draw.matrix(layer, transposed) for draw in members])
            own, shared = split(stack[None], count)
            parts.append((own.reshape(group, size, count), shared))
    elif layer.batched and all(draw.pair == draws[0].pair and draw.pair[0] > 0 for draw in draws):
        stack = torch.stack([draw.matrix(layer, transposed) for draw in draws])
        parts.append(split(stack, count, draws[0].band(count)))
    else:
        for draw in draws:
            if draw.pair[0] == 0 and count < size:
                own, shared = draw.projection(count)
                parts.append((own[None].to(layer.device), shared[None].to(layer.device)))
            else:
                parts.append(split(draw.matrix(layer, transposed)[None], count, draw.band(count)))
    owned, keys = (torch.cat(side).cpu().numpy() for side in zip(*parts, strict=True))
    return padded(layer, owned, width), padded(layer, keys, width)


def padded(layer: Layer, factor: Array, width: int) -> Array:
    """Turn ``count`` columns into ``width`` >= count of them without changing any product: times R, R R^T = I.

    Both factors of a product get the same R. Zero columns in its place would be dead: no gradient reaches a unit that
    is zero on both sides.
    """
    count = factor.shape[-1]
    if count == width:
        return factor
    turn = haar(width, count, layer.streams.generator("padding", layer.index)).numpy()
    return np.asarray(factor @ turn.T)


def _by_head(factor: Array, width: int) -> Array:
    """Cut ``[rows, head * width]`` into ``[head, rows, width]``."""
    return factor.reshape(factor.shape[0], -1, width).transpose(1, 0, 2)
