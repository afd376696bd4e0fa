"""What is left of a teacher's attention when only a part of what it is is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from attnlens.heads import Array, expand_groups
from attnlens.inits.plan import Layer, Plan
from attnlens.inits.products import padded
from attnlens.inits.registry import choose
from attnlens.inits.rules.controls import with_random_directions
from attnlens.inits.truncation import haar

Keep = Literal["weights", "layers", "spectra", "norms"]


def keeping(what: Keep) -> Callable[[Layer, Plan], Plan]:
    """Return what turns a plan of everything into one of the part. Raises `UsageError` for a part that is none."""
    parts: dict[str, Callable[[Layer, Plan], Plan]] = {
        "weights": lambda _, plan: plan,
        "layers": _permuted,
        "spectra": lambda layer, plan: replace(with_random_directions(layer, plan), biases={}, notes=()),
        "norms": _flat,
    }
    return parts[choose("keep", what, tuple(parts))]


def _permuted(layer: Layer, plan: Plan) -> Plan:
    """Put one random permutation of the channels on both sides of every product: rows in, columns out."""
    import torch

    def moved(weight: Array, axis: int) -> Array:  # every side of one width is moved alike
        generator = layer.streams.generator("columns", layer.index)
        return weight.take(torch.randperm(weight.shape[axis], generator=generator).numpy(), axis)

    new = {f"W_{role.upper()}": moved(weight, 2 if role == "o" else 1) for role, weight in plan.weights().items()}
    biases = {role: moved(bias, 0) if role == "o" else bias for role, bias in plan.biases.items()}
    return replace(plan, **new, biases=biases)  # type: ignore[arg-type]


def _flat(layer: Layer, plan: Plan) -> Plan:
    """Give every W_QK, and the layer's summed W_OV, equal singular values of the same sum of squares.

    Query heads that share a key head share its directions; heads that share a value head hold equal parts of its
    product, the least-norm choice.
    """
    weights, given = layer.weights, plan.weights()
    keys = [_directions(layer, "qk_right", g, W.shape[0], weights.head_dim) for g, W in enumerate(given["k"])]
    norms = [_norm(W, K.T) for W, K in zip(given["q"], expand_groups(given["k"], weights.num_heads), strict=True)]
    scales = np.array(norms) / math.sqrt(min(weights.head_dim, given["k"].shape[1]))
    shared = np.sqrt(scales.reshape(len(keys), -1).mean(1))
    own = scales / np.repeat(np.where(shared > 0, shared, 1.0), layer.query_groups)
    queries = [_directions(layer, "qk_left", h, W.shape[0], weights.head_dim) for h, W in enumerate(given["q"])]
    new = {
        "W_Q": np.stack(queries) * own[:, None, None],
        "W_K": np.stack(keys) * shared[:, None, None],
    }
    if "o" in given:
        left = given["v"].transpose(1, 0, 2).reshape(given["v"].shape[1], -1)
        groups = given["o"].reshape(len(given["v"]), -1, *given["o"].shape[1:]).sum(1)
        right = groups.reshape(-1, weights.out_dim)
        rank = min(*left.shape, weights.out_dim)
        scale = math.sqrt(_norm(left, right) / math.sqrt(rank))
        values = _directions(layer, "ov_left", 0, len(left), layer.values_width, rank) * scale
        outputs = _directions(layer, "ov_right", 0, weights.out_dim, layer.values_width, rank) * scale
        heads = (len(given["v"]), weights.value_dim)
        new["W_V"] = values.reshape(-1, *heads).transpose(1, 0, 2)
        by_head = outputs.T.reshape(*heads, weights.out_dim) / layer.value_groups
        new["W_O"] = np.repeat(by_head, layer.value_groups, 0)
    return replace(plan, **new, biases={}, notes=())


def _directions(layer: Layer, purpose: str, head: int, rows: int, width: int, rank: int | None = None) -> Array:
    """Draw ``rank`` orthonormal columns ``[rows, width]``, turned into their width where that is larger."""
    count = min(rows, width) if rank is None else rank
    return padded(layer, haar(rows, count, layer.streams.generator(purpose, layer.index, head)).numpy(), width)


def _norm(left: Array, right: Array) -> float:
    """Return ||left @ right||_F from the factors' Gram matrices."""
    squares = ((left.T @ left) * (right @ right.T)).sum()
    return math.sqrt(max(0.0, float(squares)))
