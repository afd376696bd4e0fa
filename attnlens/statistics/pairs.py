"""Moments over pairs of off-diagonal entries M_ij, M_ji: all of them, or a seeded sample with the largest channels."""

from __future__ import annotations

import numpy as np

from attnlens.circuits import FactoredProduct
from attnlens.heads import Array

_PAIRS = 1 << 15  # pairs of entries M_ij, M_ji looked at one by one: all of them where there are no more
_BLOCK = 32  # also the number of largest channels of which every pair is looked at


def offdiagonal_kurtosis(product: FactoredProduct, seed: int = 0) -> Array:
    """Return the excess kurtosis of the off-diagonal entries of every product of a stack."""
    ones = np.ones(product.shape[:-1])
    sizes = tuple(side.offdiagonal_squares(ones) for side in (product, product.T))
    return pair_moments(product, sizes, seed)[1]


def pair_moments(product: FactoredProduct, margins: tuple[Array, ...], seed: int) -> tuple[Array, Array]:
    """Return the mean of h_ij^2 over pairs, h_ij = (M_ij^2 + M_ji^2) / 2, and the off-diagonal's excess kurtosis."""
    fourth, kurtosis = (np.empty(product.shape[:-2]) for _ in range(2))
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = np.maximum(*(margin / margin.sum(-1, keepdims=True) for margin in margins))
    for index in np.ndindex(fourth.shape):
        entries, weights = _pairs(product.A[index], product.B[index], sizes[index], seed)
        squares = np.square(entries)
        fourth[index] = np.square(squares.sum(0) / 2) @ weights
        squares = np.square(entries - entries.mean(0) @ weights)
        variance = squares.mean(0) @ weights
        kurtosis[index] = np.square(squares).mean(0) @ weights / variance**2 - 3 if variance > 0 else np.nan
    return fourth, kurtosis


def _pairs(A: Array, B: Array, sizes: Array, seed: int) -> tuple[Array, Array]:
    """Return entries M_ij, i != j, over their mirror images M_ji, ``[2, n]``, with weights ``[n]`` that sum to one.

    All pairs, or every pair of the channels of largest ``sizes``, where rare large entries sit, and a seeded sample of
    the others: in a random order, from each row the same number of columns after its block.
    """
    d = len(A)
    width = _PAIRS // d // _BLOCK * _BLOCK
    if d * (d - 1) <= 2 * _PAIRS or width == 0:
        dense, upper = A @ B.T, np.triu_indices(d, 1)
        return np.stack([dense[upper], dense.T[upper]]), np.full(len(upper[0]), 2 / (d * (d - 1)))
    order = np.argsort(-sizes)
    rest = np.random.default_rng(seed).permutation(order[_BLOCK:])
    order = np.concatenate([order[:_BLOCK], rest, rest[: width + _BLOCK]])
    A, B = A[order], B[order]
    blocks = [(slice(0, _BLOCK), slice(_BLOCK, d))]
    blocks += [
        (slice(start, min(start + _BLOCK, d)), slice(start + _BLOCK, start + _BLOCK + width))
        for start in range(_BLOCK, d, _BLOCK)
    ]
    upper = np.triu_indices(_BLOCK, 1)
    found = [np.stack([(A[:_BLOCK] @ B[:_BLOCK].T)[upper], (B[:_BLOCK] @ A[:_BLOCK].T)[upper]])]
    found += [np.stack([(A[rows] @ B[cols].T).ravel(), (B[rows] @ A[cols].T).ravel()]) for rows, cols in blocks]
    counted = found[0].shape[1] + found[1].shape[1]
    entries = np.concatenate(found, axis=1)
    sampled = entries.shape[1] - counted
    others = (d - _BLOCK) * (d - _BLOCK - 1) / 2
    weights = np.concatenate([np.ones(counted), np.full(sampled, others / sampled)])
    return entries, weights / weights.sum()
