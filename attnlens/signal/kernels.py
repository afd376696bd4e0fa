"""Kernels between tokens by depth, and the attention matrices that lead from one to the next.

Row vectors, one token a row: X_l = A_l X_{l-1} W with W orthogonal, so the kernel Sigma_l = X_l X_l^T / embed_dim obeys
Sigma_l = A_l Sigma_{l-1} A_l^T, and A = A_L ... A_1 takes Sigma_0 = I to Sigma_L = A A^T. Float64 throughout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from attnlens.errors import UsageError
from attnlens.heads import Array
from attnlens.vocabulary import one_of

NEGATIVE = 1e-12
"""An entry below minus this share of the largest is negative, and no rounding error."""
LEAST = 1e-15
"""Share of the largest entry that smaller ones are lifted to: float64 does not tell them from zero."""
DISTANCES = ("sequence", "grid")
LARGEST = 1e300
"""No number that is passed is as large: twice it is one of float64 still."""


class NegativeAttentionError(UsageError):
    """No softmax gives this attention matrix: it has negative entries."""


@dataclass(frozen=True)
class Tokens:
    """The tokens that meet in an attention layer: prefix tokens (class token, registers) first, then patches by row."""

    count: int
    causal: bool
    prefix: int = 0
    grid: tuple[int, int] | None = None

    def distances(self, how: str = "sequence") -> Array:
        """Return ``[token, token]``: |i - j|, or the steps between patches on the ``grid``, |dy| + |dx|.

        On the grid, prefix token p stands over its centre, one step away on an axis of its own.
        """
        how = one_of("distance", how, DISTANCES)
        if how == "sequence":
            places = np.arange(self.count, dtype=np.float64)[:, None]
        elif self.grid is None:
            raise UsageError("distance = 'grid' needs patches on a grid: pass distance = 'sequence'")
        else:
            rows, cols = self.grid
            places = np.zeros((self.count, 2 + self.prefix))
            places[self.prefix :, :2] = np.stack(np.divmod(np.arange(rows * cols), cols), 1)
            places[: self.prefix, :2] = (rows - 1) / 2, (cols - 1) / 2
            places[: self.prefix, 2:] = np.eye(self.prefix)
        return np.asarray(np.abs(places[:, None] - places[None]).sum(-1))


def is_number(value: object) -> bool:
    """Whether an option is a number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def schedule(last: float, depth: int) -> Array:
    """Return a_0 = 1, ..., a_L = last: a_l = last^(l / L). Each layer multiplies a by the same number."""
    return np.asarray(last ** (np.arange(depth + 1) / depth))


def exponential_kernels(depth: int, gamma: float, distances: Array) -> list[Array]:
    """Return Sigma_0 = I, ..., Sigma_L of E-SPA: Sigma_l[i, j] = exp(-g_l distance(i, j)).

    a_L = sqrt(1 - exp(-2 gamma)), a_l = a_L^(l / L), g_l = -1/2 log(1 - a_l^2), so g_L = gamma. Source: He et al.,
    ICLR 2023 (arXiv 2302.10322).
    """
    if not is_number(gamma) or not 0 < gamma < LARGEST:
        raise UsageError(f"gamma = {gamma!r} is not accepted: pass a number above 0, below {LARGEST:g}")
    shares = schedule(math.sqrt(-math.expm1(-2 * gamma)), depth)
    return [np.sqrt(1 - share**2) ** distances for share in shares]  # exp(-g) = sqrt(1 - a^2), and 0^0 = 1


def uniform_kernels(depth: int, rho: float, tokens: int) -> list[Array]:
    """Return Sigma_0 = I, ..., Sigma_L of U-SPA: Sigma_l = (1 - r_l) I + r_l 1 1^T, r_L = rho.

    The family of kernels is that of arXiv 2302.10322, as far as we know it; how r_l grows is this project's choice, the
    analogue of E-SPA's: sqrt(1 - r_l) = a_l = sqrt(1 - rho)^(l / L).
    """
    if not is_number(rho) or not 0 < rho < 1:
        raise UsageError(f"rho = {rho!r} is not accepted: pass a number between 0 and 1")
    shares = schedule(math.sqrt(1 - rho), depth)
    return [share**2 * np.eye(tokens) + (1 - share**2) for share in shares]


def root(kernel: Array, causal: bool) -> Array:
    """Return R with R R^T = kernel: the lower triangular Cholesky factor, or the symmetric square root."""
    values, vectors = np.linalg.eigh(kernel)
    if values[0] < 1e-12 * values[-1]:
        raise UsageError(
            f"the kernel of {len(kernel)} tokens is singular to rounding: choose less similar tokens (a larger gamma, "
            "a smaller rho)"
        )
    return np.asarray(np.linalg.cholesky(kernel) if causal else (vectors * np.sqrt(values)) @ vectors.T)


class Step(NamedTuple):
    """One layer's attention matrix, and its smallest entry (of those a token may attend to) before it was lifted."""

    A: Array
    least: float


def preserving_attention(kernels: Sequence[Array], causal: bool) -> list[Step]:
    """Return A_1, ..., A_L with A_l = R_l R_{l-1}^{-1}, R_l R_l^T = Sigma_l: then Sigma_l = A_l Sigma_{l-1} A_l^T.

    Causal: Cholesky factors, so that A_l is lower triangular. Bidirectional: symmetric square roots. A softmax gives
    positive numbers only. Entries under `LEAST` of the largest are lifted to it: float64 does not know them, and a zero
    would forbid two tokens to attend to each other for good. Raises `NegativeAttentionError` for entries that are
    negative; none is clipped.
    """
    allowed = np.tril(np.ones(kernels[0].shape, dtype=bool)) if causal else np.ones(kernels[0].shape, dtype=bool)
    steps = []
    before = root(kernels[0], causal)
    for layer, kernel in enumerate(kernels[1:]):
        now = root(kernel, causal)
        solve = solve_triangular if causal else np.linalg.solve
        A = solve(before.T, now.T).T  # A before = now
        before = now
        least, largest = float(A[allowed].min()), float(A.max())
        if least < -NEGATIVE * largest:
            raise NegativeAttentionError(
                f"layer {layer}: the attention matrix has entries down to {least:.2g} (largest {largest:.2g}), which "
                "no softmax gives. Known cases: distance = 'grid' with a class token or registers; pass distance = "
                "'sequence', or build the network without them"
            )
        steps.append(Step(np.where(allowed, np.maximum(A, LEAST * largest), 0.0), least))
    return steps


def split_rows(A: Array) -> tuple[Array, Array]:
    """Return D ``[token]`` and P ``[token, token]`` with A = diag(D) P and rows of P that sum to one.

    Then A = diag(D) softmax(log P), as a softmax goes over a row's entries.
    """
    sums = A.sum(1)
    return sums, A / sums[:, None]


def cosines(kernel: Array) -> Array:
    """Return Sigma[i, j] / sqrt(Sigma[i, i] Sigma[j, j])."""
    lengths = np.sqrt(np.diagonal(kernel))
    return np.asarray(kernel / np.outer(lengths, lengths))


def mean_cosine(kernel: Array) -> float:
    """Return the mean cosine of two different tokens."""
    cosine = cosines(kernel)
    tokens = len(cosine)
    return float((cosine.sum() - np.trace(cosine)) / (tokens * (tokens - 1)))
