"""Initialisation from another network's depthwise filters: as they are, or a part of what they are."""

from __future__ import annotations

import os
from typing import Any, Literal

import numpy as np

from attnlens.errors import UsageError
from attnlens.inits.plan import FilterLayer, FilterPlan, Network, Rule
from attnlens.inits.registry import choose, initialiser
from attnlens.inits.rules.filters import turned
from attnlens.layouts.read_write import widened
from attnlens.models.open import open_model
from attnlens.words import counted


@initialiser("transfer-filters")
def transfer_filters(
    network: Network,
    *,
    teacher: Any,
    checkpoint: str | os.PathLike[str] | None = None,
    keep: Literal["weights", "layers", "norms"] = "weights",
) -> Rule:
    """Copy the depthwise filters of a pre-trained network with the same layers of filters, or a part of what they are.

    ``keep`` says what of them is copied: ``weights`` everything, biases too; ``layers`` every filter with its bias, to
    another channel of its layer (one random permutation a layer); ``norms`` the norm of every filter, its direction
    uniform on the sphere, biases zero. ``teacher`` and ``checkpoint``: as `attnlens.inspect` takes them.
    """
    keep = choose("keep", keep, ("weights", "layers", "norms"))
    opened = open_model(teacher, checkpoint, filters=True)
    mine, theirs = network.architecture.filters, opened.architecture.filters
    if len(mine) != len(theirs):
        layers = counted(len(theirs), "layer")
        raise UsageError(f"the teacher {opened.name} has {layers} of filters, the network {len(mine)}")

    def plan(layer: FilterLayer) -> FilterPlan:
        import torch

        filters, spec = opened.filters(layer.index), theirs[layer.index]
        if filters.shape != layer.filters.shape:
            raise UsageError(
                f"layer {layer.index}: the teacher {opened.name} has filters {filters.shape} [filter, height, width], "
                f"the network {layer.filters.shape}"
            )
        if keep == "norms":
            return FilterPlan(turned(layer, filters), np.eye(layer.spec.positions))
        bias = widened(opened.checkpoint[spec.bias], spec.bias) if spec.bias else np.zeros(len(filters))
        if keep == "layers":
            generator = layer.streams.generator("directions", layer.index)
            order = torch.randperm(len(filters), generator=generator).numpy()
            filters, bias = filters[order], bias[order]
        return FilterPlan(filters, bias=bias)

    return Rule(filters=plan, random=keep != "weights")
