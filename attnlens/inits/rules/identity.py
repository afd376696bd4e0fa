"""Identity blocks: what a diagonal alone does, without the recipe's truncated draw."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnlens.circuits import Fold
from attnlens.heads import Array
from attnlens.inits.plan import Layer, Network, Plan, Rule
from attnlens.inits.products import ov_reason
from attnlens.inits.registry import choose, initialiser, number


@initialiser("identity")
def identity(_network: Network, *, qk: float = 0.7, ov: float = -0.4, noise: float = 0.1, fold: Fold = "raw") -> Rule:
    """Set every head to a block of the identity plus noise.

    With E_h the columns h k .. h k + k - 1 of I_d (counted modulo d) and Z of variance 1/d, fresh for each weight:
    ``W_Q[h] = sqrt|qk| (E_h + noise Z)``, ``W_K`` likewise times the sign of ``qk``; ``W_V[h] = sqrt|ov| (E_h + noise
    Z)``, ``W_O[h] = sign(ov) sqrt|ov| (E_h + noise Z)^T``. Without noise W_QK is qk on its own block of k coordinates,
    beta = qk k / d, and the layer's OV is ov I where H k = d. Attention biases are set to zero.
    """
    qk, ov, noise = number("qk", qk), number("ov", ov), number("noise", noise, 0)

    def plan(layer: Layer) -> Plan:
        weights = layer.weights
        found: dict[str, Any] = {}
        skipped = []
        if weights.W_Q.shape[1] == weights.W_K.shape[1]:
            keys = np.arange(weights.num_kv_heads)
            found["W_Q"] = _blocks(layer, "qk_left", np.repeat(keys, layer.query_groups), weights.W_Q, qk, noise)
            found["W_K"] = _blocks(layer, "qk_right", keys, weights.W_K, qk, noise) * np.sign(qk)
        else:
            skipped.append(("qk", "q and k read inputs of different width: the product has no diagonal"))
        if ov_reason(layer):
            skipped.append(("ov", ov_reason(layer)))
        else:
            assert weights.W_O is not None
            values = np.arange(weights.W_V.shape[0])
            places = np.repeat(values, layer.value_groups)
            found["W_V"] = _blocks(layer, "ov_left", values, weights.W_V, ov, noise)
            outputs = _blocks(layer, "ov_right", places, weights.W_O.swapaxes(1, 2), ov, noise)
            found["W_O"] = outputs.swapaxes(1, 2) * (np.sign(ov) / layer.value_groups)
        return Plan(**found, skipped=tuple(skipped))

    return Rule(plan, choose("fold", fold, ("raw", "effective")))


def _blocks(layer: Layer, purpose: str, places: NDArray[np.intp], like: Array, size: float, noise: float) -> Array:
    """Return ``[head, d, k]`` blocks sqrt|size| (E + noise Z), E at the place of each head."""
    import torch

    _, d, k = like.shape
    blocks = []
    for head, place in enumerate(places):
        generator = layer.streams.generator(purpose, layer.index, head)
        block = torch.randn(d, k, generator=generator, dtype=torch.float64).numpy() * (noise / sqrt(d))
        block[(int(place) * k + np.arange(k)) % d, np.arange(k)] += 1
        blocks.append(block * sqrt(abs(size)))
    return np.stack(blocks)
