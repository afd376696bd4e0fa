"""QK and OV circuits, `factored` products or a `whole` one, with what stands around a layer folded in (`folding`).

Orientation (row vectors): W_QK = W_Q @ W_K.T acts on x W_QK x^T, W_OV = W_V @ W_O maps x to x W_OV. Both are
``[embed_dim, embed_dim]`` of rank at most head_dim.
"""

from attnlens.circuits.factored import FactoredProduct
from attnlens.circuits.folding import (
    CIRCUITS,
    FOLDS,
    Fold,
    Kind,
    fold_ov,
    fold_qk,
    layer_ov,
    ov_circuit,
    parse_folds,
    qk_circuit,
    side_by_side,
    sum_of,
)
from attnlens.circuits.whole import WholeProduct

__all__ = [
    "CIRCUITS",
    "FOLDS",
    "FactoredProduct",
    "Fold",
    "Kind",
    "WholeProduct",
    "fold_ov",
    "fold_qk",
    "layer_ov",
    "ov_circuit",
    "parse_folds",
    "qk_circuit",
    "side_by_side",
    "sum_of",
]
