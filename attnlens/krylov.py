"""The largest singular value of a matrix, from products of it with vectors alone."""

from __future__ import annotations

import numpy as np

from attnlens.heads import Array

_RESIDUAL = 1e-7
_FEWEST = 8  # columns that a Krylov space needs
_EVERY = 4  # steps between two looks at the residual
_STEPS = 256


def largest_singular_value(M: Array) -> float:
    """Return s_1 of ``M`` ``[rows, cols]`` by Lanczos iteration on M^T M from a fixed start, reorthogonalised.

    The eigenvalue's error is the square of the residual asked for over the gap: a residual of 1e-7 of s_1^2 gives it
    to machine precision. Where `_STEPS` do not reach it, from all singular values. O(rows cols) a step.
    Source: Golub & Van Loan, Matrix Computations, chapter on Lanczos methods.
    """
    rows, cols = M.shape
    if min(rows, cols) < _FEWEST:
        return float(np.linalg.svd(M, compute_uv=False)[0])
    vector = (M @ np.random.default_rng(0).standard_normal(cols)) @ M
    size = float(np.linalg.norm(vector))
    if size == 0:
        return 0.0
    basis = np.empty((min(_STEPS, cols), cols))
    along, between = np.zeros(len(basis)), np.zeros(len(basis))
    for step in range(len(basis)):
        basis[step] = vector / size
        vector = (M @ basis[step]) @ M
        along[step] = vector @ basis[step]
        for _ in range(2):  # once leaves rounding of the size of the vector that is taken away
            vector -= basis[: step + 1].T @ (basis[: step + 1] @ vector)
        between[step] = size = float(np.linalg.norm(vector))
        if size == 0 or (step >= _FEWEST and step % _EVERY == 0):
            off = between[:step]
            values, vectors = np.linalg.eigh(np.diag(along[: step + 1]) + np.diag(off, 1) + np.diag(off, -1))
            if size * abs(vectors[-1, -1]) <= _RESIDUAL * values[-1]:
                return float(np.sqrt(values[-1]))
    return float(np.linalg.svd(M, compute_uv=False)[0])
