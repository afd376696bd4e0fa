"""Impulse initialisation: attention that starts as a shift by one patch, solved for through the position embedding."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from math import isqrt
from typing import NamedTuple

import numpy as np

from attnlens.circuits import Fold
from attnlens.errors import UsageError
from attnlens.heads import Array
from attnlens.inits.plan import Layer, Network, Plan, Rule
from attnlens.inits.products import padded
from attnlens.inits.registry import choose, initialiser, number

_MOST_PREFIX_TOKENS = 8
_FLAT = 1e-6
"""Share of the largest singular value below which a direction of the position embedding counts as absent."""


@initialiser("impulse")
def impulse(
    network: Network,
    *,
    kernel: int = 3,
    margin: float = 5.0,
    position: str = "pos_embed",
    grid: tuple[int, int] | None = None,
    fold: Fold = "raw",
) -> Rule:
    """Let every head attend to one neighbour: softmax(scale P W_QK P^T) ~ a shift of the patch grid.

    P ``[patches, d]`` is the network's position embedding, each row brought to mean 0 and variance 1 as the norm in
    front does; T the shift by one place of the kernel x kernel neighbourhood, T[i, j] = 1 where j is i's neighbour
    there. With the k leading singular triplets P ~ U S V^T the pseudo-inverse is P^+ = V S^-1 U^T, and
    ``W_QK = c P^+ T (P^+)^T = c V (S^-1 U^T T U S^-1) V^T``, rank k, split in two through the SVD of its k x k core.
    c makes the neighbour's logit exceed the mean of the others by ``margin`` on average. Places are taken from the
    centre outwards, one a head, on through the layers. W_V and W_O stay as they are; biases of q and k are set to zero.
    The seed matters only where a head is wider than P has directions.
    Source: after arXiv 2404.01139 and 2505.19985 as publicly implemented; c and the order of places are ours.
    """
    if not isinstance(kernel, int) or kernel < 1 or kernel % 2 == 0:
        raise UsageError(f"kernel = {kernel!r} is not accepted: pass an odd number")
    margin = number("margin", margin, 0)
    places = _places(kernel)
    embedding, shape = _embedding(network, position, grid)
    layers = network.architecture.indexed()
    heads_before = accumulate((spec.q.heads for _, spec in layers), initial=0)
    first_head = {index: first for (index, _), first in zip(layers, heads_before, strict=False)}
    solve = cache(lambda count: _Positions.of(embedding, count))

    def plan(layer: Layer) -> Plan:
        weights = layer.weights
        if weights.embed_dim != embedding.shape[1] or weights.W_K.shape[1] != embedding.shape[1]:
            reason = f"reads {weights.embed_dim} coordinates, the position embedding has {embedding.shape[1]}"
            return Plan(skipped=(("qk", reason),))
        if layer.query_groups > 1:
            return Plan(skipped=(("qk", "query heads share a key head: one W_K cannot shift each of them elsewhere"),))
        positions = solve(min(weights.head_dim, *embedding.shape))
        queries, keys = [], []
        for head in range(first_head[layer.index], first_head[layer.index] + weights.num_heads):
            query, key = positions.factors(_shift(shape, places[head % len(places)]), weights.scale, margin)
            queries.append(padded(layer, query, weights.head_dim))
            keys.append(padded(layer, key, weights.head_dim))
        return Plan(W_Q=np.stack(queries), W_K=np.stack(keys))

    return Rule(plan, choose("fold", fold, ("raw", "effective")))


class _Positions(NamedTuple):
    """The k leading singular triplets of the normalised position embedding."""

    U: Array
    S: Array
    V: Array

    @classmethod
    def of(cls, embedding: Array, count: int) -> _Positions:
        U, S, Vh = np.linalg.svd(embedding, full_matrices=False)
        count = min(count, int(np.count_nonzero(S / S[0] > _FLAT)))
        return cls(U[:, :count], S[:count], Vh[:count].T)

    def factors(self, shift: Array, scale: float, margin: float) -> tuple[Array, Array]:
        """Return W_Q and W_K ``[d, count]`` for one shift of the grid."""
        seen = self.U.T @ shift @ self.U
        logits = self.U @ seen @ self.U.T  # of scale 1; T seen through the directions that are kept
        rows = shift.any(1)
        hit = logits[rows][shift[rows] > 0].mean()
        others = (logits[rows].sum() - hit * rows.sum()) / (rows.sum() * (len(shift) - 1))
        core = seen / self.S[:, None] / self.S[None, :] * (margin / (scale * (hit - others)))
        left, values, right = np.linalg.svd(core)
        return self.V @ left * np.sqrt(values), self.V @ right.T * np.sqrt(values)


def _embedding(network: Network, name: str, grid: tuple[int, int] | None) -> tuple[Array, tuple[int, int]]:
    """Return the patches' rows of a position embedding, normalised, and the shape of their grid."""
    try:
        stored = network.tensors[name]
    except KeyError:
        raise UsageError(
            f"{network.architecture.name} holds no {name!r}: the impulse initialisation needs a position embedding "
            "that is added to the tokens. Name it with position=..., or choose another initialisation"
        ) from None
    values = stored.detach().cpu().double().numpy() if hasattr(stored, "detach") else np.asarray(stored, np.float64)
    values = values.reshape(-1, values.shape[-1])
    if grid is None:
        sides = [(prefix, isqrt(len(values) - prefix)) for prefix in range(min(_MOST_PREFIX_TOKENS, len(values)))]
        square = next(((prefix, side) for prefix, side in sides if side**2 == len(values) - prefix), None)
        if square is None:
            raise UsageError(
                f"{name} has {len(values)} rows, no square grid behind class tokens: pass grid=(rows, cols)"
            )
        grid = (square[1], square[1])
    patches = grid[0] * grid[1]
    if patches > len(values):
        raise UsageError(f"grid = {grid} has {patches} patches, {name} has {len(values)} rows")
    rows = values[len(values) - patches :]
    centred = rows - rows.mean(1, keepdims=True)
    spread = np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)
    return centred / spread, (int(grid[0]), int(grid[1]))


def _places(kernel: int) -> list[tuple[int, int]]:
    """Return the places of a neighbourhood from the centre outwards."""
    reach = range(-(kernel // 2), kernel // 2 + 1)
    return sorted(((row, col) for row in reach for col in reach), key=lambda p: (p[0] ** 2 + p[1] ** 2, p))


def _shift(shape: tuple[int, int], place: tuple[int, int]) -> Array:
    """Return T ``[patches, patches]``, T[i, j] = 1 where j lies at ``place`` from i; empty rows at the border."""
    along = [np.eye(size, k=step) for size, step in zip(shape, place, strict=True)]
    return np.asarray(np.kron(along[0], along[1]), dtype=np.float64)
