"""Conditioned initialisation: every projection with all singular values equal."""

from __future__ import annotations

import numpy as np

from attnlens.circuits import Fold
from attnlens.heads import Array
from attnlens.inits.plan import Layer, Network, Plan, Rule
from attnlens.inits.registry import choose, initialiser, number
from attnlens.inits.truncation import haar


@initialiser("conditioned")
def conditioned(_network: Network, *, gain: float = 1.0, fold: Fold = "raw") -> Rule:
    """Set W_Q and W_K of every head to random matrices with orthonormal columns, W_V to a block of the identity.

    ``W_Q[h]^T W_Q[h] = W_K[g]^T W_K[g] = gain^2 I_k``, drawn uniformly; ``W_V[g]`` = columns g w .. g w + w - 1 of
    ``gain I_d`` (counted modulo d), a rectangular identity up to the place of its rows. All condition numbers are 1.
    W_O and its bias stay as they are; the other biases are set to zero. Source: described second-hand for Saratchandran
    & Lucey, "Conditioned initialization for attention"; the paper's text was not at hand.
    """
    gain = number("gain", gain)

    def plan(layer: Layer) -> Plan:
        weights = layer.weights
        return Plan(
            W_Q=_semi_orthogonal(layer, "qk_left", weights.W_Q, gain),
            W_K=_semi_orthogonal(layer, "qk_right", weights.W_K, gain),
            W_V=gain * _identity_blocks(weights.W_V),
        )

    return Rule(plan, choose("fold", fold, ("raw", "effective")))


def _semi_orthogonal(layer: Layer, purpose: str, like: Array, gain: float) -> Array:
    """Return ``[head, d, k]`` with orthonormal columns, or rows where k exceeds d."""
    heads, d, k = like.shape
    drawn = []
    for head in range(heads):
        generator = layer.streams.generator(purpose, layer.index, head)
        drawn.append((haar(d, k, generator) if k <= d else haar(k, d, generator).mT).numpy() * gain)
    return np.stack(drawn)


def _identity_blocks(like: Array) -> Array:
    heads, d, width = like.shape
    blocks = np.zeros((heads, d, width))
    for head in range(heads):
        blocks[head, (head * width + np.arange(width)) % d, np.arange(width)] = 1
    return blocks
