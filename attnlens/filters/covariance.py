"""The covariance of a layer's filters, and how far a sample's lies from the one it was drawn with."""

from __future__ import annotations

import math

import numpy as np

from attnlens.heads import Array


def second_moment(filters: Array) -> Array:
    """Return S = F^T F / n ``[position, position]`` of n filters: their covariance, a mean of zero being assumed."""
    flat = filters.reshape(len(filters), -1)
    return flat.T @ flat / len(flat)


def covariance_error(sample: Array, covariance: Array, count: int) -> tuple[float, float]:
    """Return ||S - Sigma|| / ||Sigma||, Sigma scaled to the trace of S, and what it is for normal filters.

    The second is the root mean square over draws of ``count`` filters: E||S - Sigma||^2 = (tr(Sigma)^2 +
    tr(Sigma^2)) / n. A draw rescaled to a given trace stays a little below it.
    """
    wanted = covariance * (np.trace(sample) / np.trace(covariance))
    square = float((wanted**2).sum())
    expected = (float(np.trace(wanted)) ** 2 + square) / count
    return relative_distance(sample, wanted), math.sqrt(expected / square)


def relative_distance(have: Array, wanted: Array) -> float:
    """Return ||A - B|| / ||B|| in Frobenius norm."""
    return float(np.linalg.norm(have - wanted) / np.linalg.norm(wanted))
