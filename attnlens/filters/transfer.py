"""How a covariance carries over: to another kernel size, to another depth; positive semi-definite by construction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attnlens.heads import Array
from attnlens.layouts.depthwise.spec import Kernel


def resampling(old: int, new: int) -> Array:
    """Return the matrix ``[new, old]`` that resamples a line linearly, both lines covering the same length.

    New position i lies at ``(i + 1/2) old / new - 1/2`` of the old line; beyond its ends the end counts. The identity
    where both are of one size.
    """
    places = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(old)[None, :]))


def resampled(covariance: Array, old: Kernel, new: Kernel) -> Array:
    """Return a covariance for another kernel size, with trace 1; positive semi-definite as ``covariance`` is.

    Its isotropic floor stays isotropic, with its share w = p lambda_min / tr(Sigma) of the trace, p the number of
    positions; what stands on the floor becomes ``A (Sigma - lambda_min I) A^T``, A resampling rows and columns. Were
    all of Sigma resampled, filters without structure would get one: A makes neighbours alike.
    """
    unit = covariance / np.trace(covariance)
    if old == new:
        return unit
    A = np.kron(resampling(old[0], new[0]), resampling(old[1], new[1]))
    floor = min(max(float(np.linalg.eigvalsh(unit)[0]) * len(unit), 0.0), 1.0)
    rest = A @ (unit - floor / len(unit) * np.eye(len(unit))) @ A.T
    trace = float(np.trace(rest))
    share = (1 - floor) / trace if trace > 0 else 0.0
    found = share * rest + floor / len(A) * np.eye(len(A))
    return found / np.trace(found)


def alike(one: Kernel, other: Kernel) -> bool:
    """Whether filters can stand for each other: both extend along the same axes."""
    return tuple(size > 1 for size in one) == tuple(size > 1 for size in other)


def interpolated(depths: Sequence[float], covariances: Sequence[Array], depth: float) -> Array:
    """Return the covariance at a relative depth: linear between the two nearest, the first or last beyond them.

    A sum of positive semi-definite matrices with weights that are not negative is one too; traces of 1 stay 1.
    ``depths`` are increasing.
    """
    after = int(np.searchsorted(depths, depth))
    if after == 0 or after == len(depths):
        return covariances[min(after, len(depths) - 1)]
    before = after - 1
    share = (depth - depths[before]) / (depths[after] - depths[before])
    return (1 - share) * covariances[before] + share * covariances[after]


def square_root(covariance: Array) -> Array:
    """Return the symmetric square root; eigenvalues below zero, which only rounding makes, count as zero.

    Unlike a Cholesky factor it exists for singular matrices, and it does not depend on signs of eigenvectors.
    """
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
