"""Initialisation from another network's weights: its attention as it is, or an evenly spaced selection of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from attnlens.circuits import Fold
from attnlens.errors import UsageError
from attnlens.heads import Array, HeadWeights
from attnlens.inits.folding import folded
from attnlens.inits.plan import Layer, Network, Plan, Rule
from attnlens.inits.registry import choose, initialiser
from attnlens.inits.rules.reduced import Keep, keeping
from attnlens.models.open import open_model
from attnlens.models.opened import OpenedModel
from attnlens.words import counted

_NORM_BIAS = "the bias of the teacher's norm stays with the teacher: only its gain is folded in"
Select = Callable[[Array, tuple[int, ...]], Array]


@initialiser("transfer-attention")
def transfer_attention(
    network: Network,
    *,
    teacher: Any,
    checkpoint: str | os.PathLike[str] | None = None,
    fold: Fold = "effective",
    keep: Keep = "weights",
) -> Rule:
    """Copy the attention of a pre-trained network with the same layers, heads and widths, or a part of what it is.

    With ``fold="effective"`` the product is what is copied: the teacher's norm gain and LayerScale are folded in and
    the student's divided out, so that a student without them computes the same. ``fold="raw"`` copies the stored
    numbers. Biases are copied, that of W_O through LayerScale like W_O. ``teacher`` and ``checkpoint``: as
    `attnlens.inspect` takes them. ``keep`` says what of it is copied:

    - ``weights``: everything;
    - ``layers``: P W_QK P^T and P W_OV P^T, P one random permutation of the channels a layer. What a layer is by itself
      stays (diagonal, spectra, gains), what its channels have to do with those of other layers goes;
    - ``spectra``: the singular values of every W_QK and of the layer's summed W_OV, random singular vectors as in
      `norm-matched`, biases zero;
    - ``norms``: the Frobenius norms of these, spread evenly over random singular vectors, biases zero.
    """
    fold, keep = choose("fold", fold, ("raw", "effective")), choose("keep", keep, get_args(Keep))
    opened = open_model(teacher, checkpoint)
    pairs = _paired(network, opened, "same")
    cut = keeping(keep)

    def plan(layer: Layer) -> Plan:
        theirs = opened.heads(pairs[layer.index])
        for role, mine in _sizes(layer.weights).items():
            if _sizes(theirs)[role] != mine:
                raise UsageError(
                    f"layer {layer.index}: {role} of the teacher {opened.name} is {_sizes(theirs)[role]} "
                    f"[head, from, to], the network's {mine}. Use weight-selection for a larger teacher"
                )
        return cut(layer, _plan(layer, theirs, fold, lambda weight, _: weight))

    return Rule(plan, fold, random=keep != "weights")


@initialiser("weight-selection")
def weight_selection(
    network: Network,
    *,
    teacher: Any,
    checkpoint: str | os.PathLike[str] | None = None,
    layers: Literal["first", "spaced"] = "first",
    fold: Fold = "effective",
) -> Rule:
    """Select evenly spaced heads, units and coordinates of a larger teacher.

    Along every axis entry i of the student is entry floor(i T / S) of the teacher's T. Heads are selected as wholes and
    units inside them, so no head is a mixture; query heads within their key head's group. ``layers="first"`` takes the
    teacher's first layers as published, ``"spaced"`` evenly spaced ones. ``fold="effective"`` folds the teacher's norm
    gain and LayerScale in before selecting and divides the student's out. Biases are selected alike. Source: Xu et al.,
    ICLR 2024 (arXiv 2311.18823), whose code selects rows of the packed tensors and so interleaves heads.
    """
    fold = choose("fold", fold, ("raw", "effective"))
    opened = open_model(teacher, checkpoint)
    pairs = _paired(network, opened, choose("layers", layers, ("first", "spaced")))

    def plan(layer: Layer) -> Plan:
        theirs = opened.heads(pairs[layer.index])
        groups = (layer.query_groups, theirs.num_heads // theirs.num_kv_heads)
        if groups[0] > groups[1]:
            raise UsageError(
                f"layer {layer.index}: {groups[0]} query heads share a key head, in the teacher {groups[1]}: "
                "name a teacher with as many"
            )
        return _plan(layer, theirs, fold, lambda weight, size: _selected(weight, size, layer, opened.name))

    return Rule(plan, fold, random=False)


def evenly_spaced(teacher: int, student: int) -> NDArray[np.intp]:
    """Return floor(i * teacher / student) for i below ``student``."""
    return np.arange(student) * teacher // student


def _selected(weight: Array, size: tuple[int, ...], layer: Layer, teacher: str) -> Array:
    """Select along every axis of a weight ``[head, from, to]`` or bias."""
    if any(theirs < mine for theirs, mine in zip(weight.shape, size, strict=True)):
        raise UsageError(
            f"layer {layer.index}: the teacher {teacher} has {weight.shape}, less than the network's {size}: "
            "weight-selection needs a teacher at least as large along every axis"
        )
    return weight[np.ix_(*(evenly_spaced(theirs, mine) for theirs, mine in zip(weight.shape, size, strict=True)))]


def _plan(layer: Layer, theirs: HeadWeights, fold: Fold, select: Select) -> Plan:
    """Plan a layer as the teacher's weights and biases, in the coordinates of the fold, cut by ``select``."""
    mine = layer.weights
    new = folded(theirs, fold)
    sizes = _sizes(mine)
    if mine.W_O is not None and theirs.W_O is None:
        raise UsageError(f"layer {layer.index}: the teacher has no output projection")
    selected = {role: select(new[role], sizes[role]) for role in sizes}
    biases = {}
    for role in sizes:
        bias, present = getattr(theirs, f"b_{role.upper()}"), getattr(mine, f"b_{role.upper()}")
        if bias is None or present is None:
            continue  # a bias the teacher has and the student cannot hold is lost; one it lacks is zero
        if role == "o" and fold != "raw" and theirs.layer_scale is not None:
            bias = bias * theirs.layer_scale
        biases[role] = select(bias, present.shape)
    return Plan(
        W_Q=selected["q"],
        W_K=selected["k"],
        W_V=selected["v"],
        W_O=selected.get("o"),
        biases=biases,
        notes=(_NORM_BIAS,) if fold != "raw" and theirs.norm_gain is not None else (),
    )


def _sizes(weights: HeadWeights) -> dict[str, tuple[int, ...]]:
    return {role: weight.shape for role, weight in weights.by_role().items()}


def _paired(network: Network, opened: OpenedModel, how: str) -> dict[int, int]:
    """Pair each of the network's layers with one of the teacher's."""
    mine, theirs = network.architecture.indexed(), opened.architecture.indexed()
    if len(theirs) < len(mine) or (how == "same" and len(theirs) != len(mine)):
        layers = counted(len(theirs), "attention layer")
        raise UsageError(f"the teacher {opened.name} has {layers}, the network {len(mine)}")
    chosen = evenly_spaced(len(theirs), len(mine)) if how == "spaced" else np.arange(len(mine))
    return {index: theirs[int(place)][0] for (index, _), place in zip(mine, chosen, strict=True)}
