"""Moments over pairs of off-diagonal entries M_ij, M_ji: all of them, or a seeded sample with the largest channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from attnlens.circuits import FactoredProduct
from attnlens.circuits.factored import exponent_of
from attnlens.heads import Array

_PAIRS = 1 << 15  # pairs of entries M_ij, M_ji looked at one by one: all of them where there are no more
_DECIMALS = 8  # of a size over the mean size: sizes that differ by less, as balanced ones do, are the same size
_BLOCK = 32  # also the number of largest channels of which every pair is looked at


def offdiagonal_kurtosis(product: FactoredProduct, seed: int = 0) -> Array:
    """Return the excess kurtosis of the off-diagonal entries of every product of a stack, NaN where there are none."""
    if product.shape[-1] < 2:
        return np.full(product.shape[:-2], np.nan)
    product, _ = product.unit
    ones = np.ones(product.shape[:-1])
    sizes = tuple(side.offdiagonal_squares(ones) for side in (product, product.T))
    return pair_moments(product, sizes, seed)[1]


def pair_moments(product: FactoredProduct, margins: tuple[Array, ...], seed: int) -> tuple[Array, Array]:
    """Return the mean of h_ij^2 over pairs, h_ij = (M_ij^2 + M_ji^2) / 2, and the off-diagonal's excess kurtosis."""
    fourth, kurtosis = (np.empty(product.shape[:-2]) for _ in range(2))
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes = np.maximum(*(margin / margin.sum(-1, keepdims=True) for margin in margins))
    for index in np.ndindex(fourth.shape):
        fourth[index], kurtosis[index] = _moments(_pairs(product.head(index), sizes[index], seed))
    return fourth, kurtosis


@dataclass(frozen=True)
class _Pairs:
    """Entries M_ij, i != j, over their mirror images M_ji, ``[2, n]``, the first ``counted`` of weight 1."""

    entries: Array
    counted: int
    weight: float
    """Weight of each of the others."""

    def mean(self, values: Array) -> float:
        """Return the weighted mean of values ``[..., n]`` over the last axis, and over the others without weights."""
        rows = math.prod(values.shape[:-1])
        total = values[..., : self.counted].sum() + self.weight * values[..., self.counted :].sum()
        return float(total) / (rows * (self.counted + self.weight * (values.shape[-1] - self.counted)))


def _moments(pairs: _Pairs) -> tuple[float, float]:
    exponent = int(exponent_of(pairs.entries))
    entries = np.ldexp(pairs.entries, -exponent)  # whose fourth powers are numbers
    mean = pairs.mean(entries)
    squares = np.square(entries)
    sums = squares[0] + squares[1]
    fourth = math.ldexp(pairs.mean(np.square(sums, out=sums)) / 4, 4 * exponent)
    squares = np.square(np.subtract(entries, mean, out=entries), out=squares)
    variance = pairs.mean(squares)
    return fourth, pairs.mean(np.square(squares, out=squares)) / variance**2 - 3 if variance > 0 else math.nan


def _pairs(product: FactoredProduct, sizes: Array, seed: int) -> _Pairs:
    """Return all pairs of one product, or a part of them that stands for all.

    The part is every pair of the channels of largest ``sizes``, where rare large entries sit, and a seeded sample of
    the others: in a random order, from each row the same number of columns after its block.
    """
    d = len(sizes)
    width = _PAIRS // d // _BLOCK * _BLOCK
    if d * (d - 1) <= 2 * _PAIRS or width == 0:
        dense, upper = product.dense(), np.triu_indices(d, 1)
        return _Pairs(np.stack([dense[upper], dense.T[upper]]), len(upper[0]), 0.0)
    order = np.argsort(-np.round(sizes * (d / sizes.sum()), _DECIMALS), kind="stable")
    rest = np.random.default_rng(seed).permutation(order[_BLOCK:])
    order = np.concatenate([order[:_BLOCK], rest, rest[: width + _BLOCK]])
    starts = np.arange(_BLOCK, d, _BLOCK)
    rows, cols = (starts[:, None] + np.arange(size) for size in (_BLOCK, _BLOCK + width))
    whole = len(starts) if d % _BLOCK == 0 else len(starts) - 1
    blocks = [(order[None, :_BLOCK], order[None, _BLOCK:d]), (order[rows[:whole]], order[cols[:whole, _BLOCK:]])]
    if whole < len(starts):  # the last rows are no whole block
        blocks.append((order[rows[whole:, : d % _BLOCK]], order[cols[whole:, _BLOCK:]]))
    upper = np.triu_indices(_BLOCK, 1)
    largest = product.entries(order[None, :_BLOCK], order[None, :_BLOCK])[0]
    found = [np.stack([largest[upper], largest.T[upper]])]
    mirrored = product.T
    found += [np.stack([side.entries(*block).ravel() for side in (product, mirrored)]) for block in blocks]
    entries = np.concatenate(found, axis=1)
    counted = found[0].shape[1] + found[1].shape[1]
    sampled = entries.shape[1] - counted
    return _Pairs(entries, counted, (d - _BLOCK) * (d - _BLOCK - 1) / 2 / sampled)
