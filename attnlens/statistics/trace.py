"""How far tr(A B^T) strays where A and B have nothing to do with each other, from the factors alone."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import ndtr

from attnlens.circuits import FactoredProduct
from attnlens.heads import Array


def null_variance(product: FactoredProduct) -> Array:
    """Return the variance of tr(A B^T) where nothing links A with B: ||B^T A||^2 ||A B^T||^2 / (||A||^2 ||B||^2).

    It is unbiased for independent A and B of matrix-normal law, cov(A) = S x D and cov(B) = S' x D', whatever the
    covariance of channels (S) and of units (D): var tr(M) = tr(S S') tr(D D') and each of the four norms estimates its
    part. Where D or D' is a multiple of the identity it is the exact variance under random rotation of the units,
    ||B^T A||^2 / k. A sum of products has the sum of its parts' variances. O(d k^2).
    Source: derived in docs/verdicts.md.
    """
    parts, core = _parts(product)
    return _summed(product, _alignment(parts) * _squares(core) / core.shape[-1])


def sampling_variance(product: FactoredProduct) -> Array:
    """Return the variance of tr(M) that an interval rests on: `null_variance` of the core without its mean diagonal.

    With C = B^T A - (tr(M) / k) I, the larger of ||C||^2 / (k - 1) and 2 ||(C + C^T) / 2||^2 / k, which is right where
    what strays is symmetric, times k <A^T A, B^T B> / (||A||^2 ||B||^2).
    """
    parts, core = _parts(product)
    k = core.shape[-1]
    rest = core - np.trace(core, axis1=-2, axis2=-1)[..., None, None] / k * np.eye(k) if k > 1 else core
    symmetric = (rest + np.swapaxes(rest, -1, -2)) / 2
    variance = np.maximum(_squares(rest) / max(k - 1, 1), 2 * _squares(symmetric) / k)
    return _summed(product, _alignment(parts) * variance)


def trace_p_value(product: FactoredProduct) -> tuple[Array, Array]:
    """Return z = t / sd and its two-sided normal p-value, t the trace of C M C with C = I - 11^T/d, sd by its null.

    Centring takes away what all rows have in common and what all columns have in common: equal entries are no diagonal.
    """
    centred = product.centred(True, True)
    trace, variance = centred.diagonal().sum(-1), null_variance(centred)
    least = _ROUNDING * np.sqrt(product.squared_norm())
    deviation = np.sqrt(variance)
    z = np.divide(trace, deviation, out=np.zeros_like(trace), where=(np.abs(trace) > least) & (deviation > 0))
    return z, np.asarray(2 * ndtr(-np.abs(z)))


_ROUNDING = 1e-12


def _parts(product: FactoredProduct) -> tuple[FactoredProduct, Array]:
    parts = product if product.parts is None else product.parts
    return parts, parts.core


def _summed(product: FactoredProduct, variance: Array) -> Array:
    return variance if product.parts is None else np.asarray(variance.sum(-1))


def _squares(matrix: Array) -> Array:
    return np.asarray(np.einsum("...rs,...rs->...", matrix, matrix))


def _alignment(product: FactoredProduct) -> Array:
    """Return k <A^T A, B^T B> / (||A||^2 ||B||^2): 1 where the columns of one factor are alike, up to k."""
    sizes = math.prod(product.squared_sizes())
    product_squares = product.core.shape[-1] * product.squared_norm()
    return np.divide(product_squares, sizes, out=np.zeros_like(sizes), where=sizes > 0)
