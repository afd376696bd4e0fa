"""Null distributions of the mean diagonal of M = A @ B.T: coin-flip signs (which decide), random pairing, rotation.

docs/verdicts.md says what each null assumes, why the first decides, and how uniform their p-values are.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from attnlens.circuits import FactoredProduct
from attnlens.heads import Array

_BISECTIONS = 60
_LOG_SADDLEPOINTS = (-20.0, 40.0)  # log of s in units of 1 / rms of the terms: brackets every saddlepoint
_NO_CORRECTION = 1e-3  # below this w the saddlepoint correction is smaller than its own rounding
_ROUNDING = 1e-12
_DRAWS_AT_ONCE = 256


def own_diagonal(product: FactoredProduct, margins: tuple[Array, Array]) -> Array:
    """Return the diagonal of M without what its rows have in common and its columns have in common, ``[..., d]``.

    diag of N = (I - r p^T) M (I - q c^T): from every row its scale r_i times the mean of the rows at unit scale
    (p = 1 / (d r)), likewise for columns. Equal scales make it double centring, sum_i N_ii = tr(M) - 1^T M 1 / d.
    r_i is the norm of row i of the doubly centred M, at least the median of these norms, so that a few large channels
    neither make the common row nor leave it behind. ``margins`` are the product's `squared_margins`; O(d k).
    """
    A, B = product.A, product.B
    ones = np.ones(A.shape[:-1])
    by_row, by_col = _apply(A, B, ones), _apply(B, A, ones)
    rows = _scales(margins[0], by_row, by_col, _apply(A, B, by_col))
    cols = _scales(margins[1], by_col, by_row, _apply(B, A, by_row))
    mean_row, mean_col = _mean_at_unit_scale(A, rows), _mean_at_unit_scale(B, cols)
    along = _vector(B, mean_row)
    across = _vector(A, mean_col) - rows * (mean_row * mean_col).sum(-1, keepdims=True)
    own = product.diagonal() - rows * along - cols * across
    return np.where(np.abs(own) <= _ROUNDING * (margins[0] * margins[1]) ** 0.25, 0.0, own)


def _scales(margin: Array, sums: Array, other_sums: Array, cross: Array) -> Array:
    """Return the norms of the rows of C M C from squared margins and sums, at least their median.

    ``sums`` is M 1, ``other_sums`` M^T 1, ``cross`` M M^T 1.
    """
    d = margin.shape[-1]
    common = (other_sums**2).sum(-1, keepdims=True) / d**2
    squares = margin - 2 * cross / d + common - (sums - sums.mean(-1, keepdims=True)) ** 2 / d
    norms = np.sqrt(np.maximum(squares, 0.0))
    least = np.maximum(np.median(norms, axis=-1, keepdims=True), _ROUNDING * np.sqrt(margin.max(-1, keepdims=True)))
    return np.maximum(norms, least)


def _mean_at_unit_scale(factor: Array, scales: Array) -> Array:
    weights = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales > 0)
    return np.einsum("...ir,...i->...r", factor, weights) / scales.shape[-1]


def _vector(factor: Array, x: Array) -> Array:
    return np.matmul(factor, x[..., None])[..., 0]


def _apply(A: Array, B: Array, x: Array) -> Array:
    """Return (A @ B.T) x."""
    return _vector(A, np.einsum("...ir,...i->...r", B, x))


def sign_flip_p_value(terms: Array) -> Array:
    """Return P(|sum_i e_i x_i| >= |sum_i x_i|), e_i = +-1 by coin flip: the p-value of a sum against random signs.

    ``terms`` x ``[..., n]`` gives ``[...]``. Saddlepoint approximation with K(s) = sum_i log cosh(s x_i) and
    K'(s) = |sum_i x_i|: w = sqrt(2 (s K'(s) - K(s))), u = s sqrt(K''(s)), p = 2 Phi(-(w + log(u / w) / w)), never
    below the exact minimum 2^(1 - m), m the number of non-zero terms. Accuracy: docs/verdicts.md. Source: justified
    for this test by Niu, Ray Choudhury & Katsevich (arXiv 2407.08911); the tail in the form that stays a probability.

    >>> float(sign_flip_p_value(np.ones(10)))
    0.001953125
    """
    size = np.abs(terms)
    scale = np.sqrt((size**2).mean(-1, keepdims=True))
    size = np.divide(size, scale, out=np.zeros_like(size), where=scale > 0)
    largest = size.sum(-1)
    target = np.minimum(np.abs(terms.sum(-1)) / np.where(scale > 0, scale, 1.0)[..., 0], largest)
    low, high = (np.full(target.shape, bound) for bound in _LOG_SADDLEPOINTS)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        short = (size * np.tanh(np.exp(middle)[..., None] * size)).sum(-1) < target
        low, high = np.where(short, middle, low), np.where(short, high, middle)
    s = np.exp((low + high) / 2)
    decay = np.exp(-2 * s[..., None] * size)
    cumulant = (s[..., None] * size + np.log1p(decay) - math.log(2)).sum(-1)
    curvature = (size**2 * 4 * decay / (1 + decay) ** 2).sum(-1)
    w = np.sqrt(np.maximum(2 * (s * target - cumulant), 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        corrected = w + np.log(s * np.sqrt(curvature) / w) / w
    corrected = np.where(w < _NO_CORRECTION, w, corrected)
    smallest = np.exp2(1.0 - np.maximum((size > 0).sum(-1), 1))
    p = np.where(largest - target <= _ROUNDING * largest, smallest, np.clip(2 * ndtr(-corrected), smallest, 1.0))
    return np.where(np.isfinite(terms).all(-1), np.where(largest > 0, p, 1.0), np.nan)


def sign_flip_draws(terms: Array, draws: int, seed: int = 0) -> Array:
    """Return the Monte Carlo counterpart of `sign_flip_p_value`, (1 + hits) / (1 + draws): valid for any number."""
    rng = np.random.default_rng(seed)
    observed = np.abs(terms.sum(-1)) * (1 - _ROUNDING)
    hits = np.zeros(observed.shape)
    for count in _batches(draws):
        signs = 1.0 - 2.0 * rng.integers(0, 2, (count, terms.shape[-1]))
        hits += (np.abs(np.matmul(terms, signs.T)) >= observed[..., None]).sum(-1)
    return (1 + hits) / (1 + draws)


def pairing_moments(product: FactoredProduct, squared_norm: Array) -> tuple[Array, Array]:
    """Return mean and standard deviation of (1/d) sum_i M[i, pi(i)] over all permutations pi, exactly.

    mean = 1^T M 1 / d^2, variance = ||C M C||_F^2 / (d^2 (d - 1)), C = I - 11^T/d: what a random pairing of the rows of
    A with those of B makes of the mean diagonal. ``squared_norm`` is ||M||_F^2. Source: Hoeffding, A combinatorial
    central limit theorem, Annals of Mathematical Statistics 22, 1951.
    """
    d = product.shape[-1]
    ones, mean = np.ones(product.A.shape[:-1]), product.total() / d
    by_row, by_col = _apply(product.A, product.B, ones), _apply(product.B, product.A, ones)
    centred = squared_norm - (by_row**2).sum(-1) / d - (by_col**2).sum(-1) / d + mean**2
    return mean / d, np.sqrt(np.maximum(centred, 0.0) / (d - 1)) / d


def pairing_p_value(product: FactoredProduct, squared_norm: Array) -> Array:
    """Return the two-sided p-value of the mean diagonal under random pairing, normal with `pairing_moments`."""
    mean, deviation = pairing_moments(product, squared_norm)
    distance = np.abs(product.diagonal().mean(-1) - mean)
    z = np.divide(distance, deviation, out=np.zeros_like(distance), where=deviation > 0)
    return np.asarray(2 * ndtr(-z))


def pairing_draws(product: FactoredProduct, draws: int, seed: int = 0) -> Array:
    """Return the Monte Carlo counterpart of `pairing_p_value`, (1 + hits) / (1 + draws): O(d k) a draw."""
    rng = np.random.default_rng(seed)
    centre = product.total() / product.shape[-1]
    observed = np.abs(product.diagonal().sum(-1) - centre) * (1 - _ROUNDING)
    hits = np.zeros(observed.shape)
    for _ in range(draws):
        order = rng.permutation(product.shape[-1])
        hits += np.abs(np.einsum("...ir,...ir->...", product.A, product.B[..., order, :]) - centre) >= observed
    return (1 + hits) / (1 + draws)


def rotation_p_value(product: FactoredProduct) -> Array:
    """Return the two-sided p-value of tr(M) against tr(A R B^T), R a random rotation of the factors' columns.

    For R Haar on the orthogonal k x k matrices and C = B^T A, tr(C R) has mean 0 and variance ||C||_F^2 / k exactly;
    its law is taken as normal, right as k grows. It depends on the factors, not on M alone: A G, B G^-T have another.
    """
    core = product.core
    trace = np.abs(np.trace(core, axis1=-2, axis2=-1))
    deviation = np.sqrt((core**2).sum((-2, -1)) / core.shape[-1])
    return np.asarray(2 * ndtr(-np.divide(trace, deviation, out=np.zeros_like(trace), where=deviation > 0)))


def rotation_draws(product: FactoredProduct, draws: int, seed: int = 0) -> Array:
    """Return the Monte Carlo counterpart of `rotation_p_value`, (1 + hits) / (1 + draws): O(k^3) a draw."""
    rng = np.random.default_rng(seed)
    core = product.core
    observed = np.abs(np.trace(core, axis1=-2, axis2=-1)) * (1 - _ROUNDING)
    hits = np.zeros(observed.shape)
    for _ in range(draws):
        basis, upper = np.linalg.qr(rng.standard_normal(core.shape[-2:]))
        rotation = basis * np.sign(np.diagonal(upper))
        hits += np.abs(np.einsum("...rs,sr->...", core, rotation)) >= observed
    return (1 + hits) / (1 + draws)


def _batches(draws: int) -> list[int]:
    return [min(_DRAWS_AT_ONCE, draws - start) for start in range(0, draws, _DRAWS_AT_ONCE)]
