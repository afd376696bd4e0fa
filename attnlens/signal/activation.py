"""Leaky ReLU, its slope tailored to a depth: how similar MLPs make two tokens, and how to bound it."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn.functional import leaky_relu

from attnlens.errors import UsageError
from attnlens.heads import Array
from attnlens.words import counted


class TailoredLeakyReLU(nn.Module):
    """phi(x) = sqrt(2 / (1 + alpha^2)) max(x, alpha x): keeps the mean square of a standard normal x.

    Source: Zhang, Botev & Martens, ICLR 2022 (arXiv 2203.08120); derived again here, see `similarity`.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """Apply phi to every entry."""
        return math.sqrt(2 / (1 + self.alpha**2)) * leaky_relu(x, self.alpha)

    def extra_repr(self) -> str:
        """Show the slope."""
        return f"alpha={self.alpha:.6g}"


def similarity(alpha: float, cosine: Array | float) -> Array:
    """Return the cosine of two inputs behind a wide random layer and `TailoredLeakyReLU`, given theirs before it.

        C(c) = c + (1 - alpha)^2 / (pi (1 + alpha^2)) (sqrt(1 - c^2) - c arccos c)

    From E[relu(u) relu(v)] of standard normals with correlation c (Cho & Saul, NeurIPS 2009) and max(x, alpha x) =
    alpha x + (1 - alpha) relu(x). C(c) >= c, with equality at c = 1 and, for every c, at alpha = 1.
    """
    c = np.clip(np.asarray(cosine, dtype=np.float64), -1, 1)
    bend = (1 - alpha) ** 2 / (math.pi * (1 + alpha**2))
    return np.asarray(c + bend * (np.sqrt(1 - c**2) - c * np.arccos(c)))


def tailored_slope(eta: float, depth: int) -> float:
    """Return alpha in [0, 1) at which ``depth`` applications of `similarity` take cosine 0 to ``eta``.

    Raises `UsageError` for an ``eta`` that is not between 0 and what ReLU, alpha = 0, reaches.
    """

    def reached(alpha: float) -> float:
        cosine = np.zeros(())
        for _ in range(depth):
            cosine = similarity(alpha, cosine)
        return float(cosine)

    most = reached(0.0)
    if not 0 < eta <= most:
        raise UsageError(
            f"eta = {eta!r} is not accepted: {counted(depth, 'layer allows', 'layers allow')} numbers above 0 and up "
            f"to {most:.3f}, that of ReLU"
        )
    return float(brentq(lambda alpha: reached(alpha) - eta, 0.0, 1.0, xtol=1e-14))


def scaled_orthogonal(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Draw W ``[rows, cols]`` (x @ W) with orthonormal rows or columns, times sqrt(cols / rows) where cols > rows.

    Keeps the mean square of a random row vector's entries, and all cosines exactly where cols >= rows.
    """
    from attnlens.inits.truncation import haar

    if cols > rows:
        return haar(cols, rows, generator).mT * math.sqrt(cols / rows)
    return haar(rows, cols, generator)
