"""The QK and OV circuits of a layer, and what stands around the layer folded into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from attnlens.circuits.factored import FactoredProduct, exponent_of
from attnlens.circuits.whole import WholeProduct
from attnlens.errors import UnsupportedAttentionError
from attnlens.heads import Array, HeadWeights, Role, expand_groups
from attnlens.vocabulary import FOLD, FOLD_CHOICE

_FORMED = -900  # exponent of 2 of a sum's entries, below which float64 would not hold all of them

Kind = Literal["qk", "ov"]
Fold = Literal["raw", "effective", "centred", "balanced"]
FOLDS: tuple[Fold, ...] = ("raw", "effective", "centred", "balanced")


def fold_qk(product: FactoredProduct, weights: HeadWeights, fold: Fold) -> FactoredProduct:
    """Fold into a raw QK product what stands in front of the layer, as `qk_circuit` says."""
    fold = FOLD(fold)
    if fold == "raw":
        return product
    product = product.scaled(_gain(weights, "q", product.shape[-2]), _gain(weights, "k", product.shape[-1]))
    if fold == "balanced":
        return product.balanced()
    return product.centred(*(weights.input_norm(role).centres for role in ("q", "k"))) if fold == "centred" else product


def fold_ov(product: FactoredProduct, weights: HeadWeights, fold: Fold) -> FactoredProduct:
    """Fold into a raw OV product, of a head or summed, what stands around the layer, as `ov_circuit` says."""
    fold = FOLD(fold)
    if fold == "raw":
        return product
    product = product.scaled(_gain(weights, "v", product.shape[-2]), _gain(weights, "o", product.shape[-1]))
    if fold == "balanced":
        return product.balanced()
    return product.centred(weights.input_norm("v").centres, False) if fold == "centred" else product


def _gain(weights: HeadWeights, role: Role, size: int) -> Array | None:
    gain = weights.gain(role)
    if gain is not None and gain.ndim and gain.shape[-1] not in (1, size):
        place = "LayerScale behind o" if role == "o" else f"norm in front of {role}"
        raise UnsupportedAttentionError(
            f"{weights.name}: the {place} has {gain.shape[-1]} gains, the projection {size} channels: they do not "
            "belong together, and only the raw products can be formed (fold raw)"
        )
    return gain


def qk_circuit(weights: HeadWeights, fold: Fold = "raw") -> FactoredProduct:
    """Return W_QK = W_Q @ W_K.T of every head, a stack of ``num_heads`` products.

    ``effective`` gives diag(g_q) W_QK diag(g_k) with g the gain of the norm that q and k read (one norm in most
    networks). ``centred`` also projects out the all-ones direction where that norm is a LayerNorm: C diag(g) W_QK
    diag(g) C with C = I - 11^T/d (an RMSNorm does not centre: there it equals ``effective``). ``balanced`` divides one
    positive gain a row and one a column out of the effective product, so that its off-diagonal entries are equal in
    scale: see `balance`. The logit scale and the bias terms are left out.
    """
    return fold_qk(FactoredProduct(weights.W_Q, expand_groups(weights.W_K, weights.num_heads)), weights, fold)


def ov_circuit(weights: HeadWeights, fold: Fold = "raw") -> FactoredProduct:
    """Return W_OV = W_V @ W_O of every value head.

    ``effective`` gives diag(g) W_OV diag(s), g the gain of the norm that v reads and s the LayerScale behind.
    ``centred`` projects the all-ones direction out of the input side, the side a LayerNorm stands on:
    C diag(g) W_OV diag(s). ``balanced`` balances the effective product. Raises `UnsupportedAttentionError` for a layer
    without W_O.
    """
    if weights.W_O is None:
        raise UnsupportedAttentionError(f"{weights.name} has no output projection: there is no OV circuit to form")
    values = expand_groups(weights.W_V, weights.num_value_heads)
    return fold_ov(FactoredProduct(values, np.swapaxes(weights.W_O, -1, -2)), weights, fold)


CIRCUITS: dict[Kind, Callable[[HeadWeights, Fold], FactoredProduct]] = {"qk": qk_circuit, "ov": ov_circuit}


def layer_ov(weights: HeadWeights, fold: Fold = "raw") -> FactoredProduct:
    """Return the layer's value-projection product sum_h W_V[h] @ W_O[h], of rank at most num_heads * value_dim.

    One product [W_V[0] .. W_V[H-1]] @ [W_O[0]; ..; W_O[H-1]]; kept as its two factors only where they are narrower
    than the matrix, or its entries would leave float64. Folds as `ov_circuit`. Source: Trockman & Kolter, ICML 2023
    (arXiv 2305.09828), where W_V W_proj is the object of the recipe.
    """
    heads = ov_circuit(weights)
    inner = heads.A.shape[0] * heads.A.shape[2]
    A, B = side_by_side(heads.A), side_by_side(heads.B)
    apart = inner < min(A.shape[0], B.shape[0]) or exponent_of(A) + exponent_of(B) < _FORMED
    total = FactoredProduct(A, B) if apart else WholeProduct.of(A @ B.T, inner)
    return fold_ov(replace(total, parts=heads), weights, fold)


def sum_of(heads: FactoredProduct, weights: HeadWeights, fold: Fold) -> FactoredProduct:
    """Return a layer's summed OV product for its diagonal and corners alone, given those of its heads under ``fold``.

    The heads' factors side by side where the fold is linear in the product; a balanced sum is no sum of balanced heads.
    """
    if fold == "balanced":
        return layer_ov(weights, fold)
    return FactoredProduct(side_by_side(heads.A), side_by_side(heads.B))


def side_by_side(factors: Array) -> Array:
    """Return ``[rows, head * rank]`` from ``[head, rows, rank]``: two such factors make the sum over heads."""
    heads, rows, rank = factors.shape
    return np.ascontiguousarray(np.swapaxes(factors, 0, 1)).reshape(rows, heads * rank)


def parse_folds(fold: str) -> tuple[Fold, ...]:
    """Return the folds that one's name, ``both`` (raw and effective) or ``all`` asks for."""
    chosen = FOLD_CHOICE(fold)
    several: dict[str, tuple[Fold, ...]] = {"both": FOLDS[:2], "all": FOLDS}
    return several.get(chosen, (chosen,))
