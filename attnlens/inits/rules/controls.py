"""Controls: the scale of another initialisation without its structure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from attnlens.errors import UsageError
from attnlens.heads import Array
from attnlens.inits.plan import FilterLayer, FilterPlan, Layer, Network, Plan, Rule
from attnlens.inits.registry import find_initialiser, initialiser
from attnlens.inits.rules.filters import turned
from attnlens.inits.truncation import haar


@initialiser("norm-matched")
def norm_matched(network: Network, *, of: str = "mimetic", **options: Any) -> Rule:
    """Keep the singular values of every product of another initialisation and draw its singular vectors at random.

    Per head ``W_Q' = O_1 W_Q``, ``W_K' = O_2 W_K`` with O_1, O_2 independent and uniform among the orthogonal matrices,
    so W_QK' = O_1 W_QK O_2^T; per layer ``W_V' = O_3 W_V``, ``W_O' = W_O O_4``. The factors of ``of`` are those it
    has with the same seed: spectra, norms of weights, heads and units are equal to it exactly, and beta is zero up to
    sampling. Of depthwise filters each keeps its norm and gets a direction of its own, uniform on the sphere.
    ``of`` names the initialisation, further options are its own. Biases: as ``of``.
    """
    inner = find_initialiser(of)
    if of == "norm-matched":
        raise UsageError("norm-matched of itself: name the initialisation whose scale it is to keep")
    rule = inner.rule(network, options)

    def plan(layer: Layer) -> Plan:
        assert rule.plan is not None
        return with_random_directions(layer, rule.plan(layer))

    def filters(layer: FilterLayer) -> FilterPlan:
        assert rule.filters is not None
        drawn = rule.filters(layer)
        if drawn.filters is None:
            return drawn
        return replace(drawn, filters=turned(layer, drawn.filters), covariance=np.eye(layer.spec.positions))

    return Rule(rule.plan and plan, rule.fold, replays=rule.replays, filters=rule.filters and filters)


def with_random_directions(layer: Layer, drawn: Plan) -> Plan:
    """Return a plan whose products have the singular values of ``drawn`` and random singular vectors."""
    new = {name: getattr(drawn, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
    if drawn.W_Q is not None and drawn.W_K is not None:
        new["W_Q"] = np.stack([_turned(layer, "qk_left", h, weight) for h, weight in enumerate(drawn.W_Q)])
        new["W_K"] = np.stack([_turned(layer, "qk_right", g, weight) for g, weight in enumerate(drawn.W_K)])
    if drawn.W_V is not None and drawn.W_O is not None:
        new["W_V"] = _turned_together(layer, "ov_left", drawn.W_V)
        new["W_O"] = _turned_together(layer, "ov_right", drawn.W_O.swapaxes(1, 2)).swapaxes(1, 2)
    return replace(drawn, **new, total=None, requests=())


def _turned(layer: Layer, purpose: str, head: int, weight: Array) -> Array:
    """Multiply ``[rows, width]`` from the left by a random orthogonal matrix, drawn on the weight's own span alone.

    weight = Q R (thin): O Q is uniform among the matrices with orthonormal columns, so it is drawn in one piece.
    """
    import torch

    rows, width = weight.shape
    generator = layer.streams.generator(purpose, layer.index, head)
    if width >= rows:
        turn = haar(rows, rows, generator)
        return np.asarray(turn.numpy() @ weight)
    triangle = torch.linalg.qr(torch.from_numpy(np.ascontiguousarray(weight)))[1]
    return np.asarray((haar(rows, width, generator) @ triangle).numpy())


def _turned_together(layer: Layer, purpose: str, weights: Array) -> Array:
    """Turn the heads ``[head, rows, width]`` of one layer by the same matrix: their sum is one product."""
    heads, rows, width = weights.shape
    together = _turned(layer, purpose, 0, weights.transpose(1, 0, 2).reshape(rows, heads * width))
    return together.reshape(rows, heads, width).transpose(1, 0, 2)
