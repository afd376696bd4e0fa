"""What is measured: the sizes, and random heads of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class Case:
    """One layer's query and key matrices."""

    name: str
    title: str
    embed_dim: int
    head_dim: int
    num_heads: int
    condition: float
    """Largest over smallest singular value of each head's matrix."""
    tasks: tuple[str, ...]

    def draw(self) -> tuple[Weights, Weights]:
        """Return W_Q and W_K, each ``[head, embed_dim, head_dim]`` in float32: random directions, set singular values.

        Each head's singular values fall geometrically from 1 to 1 / `condition`.
        """
        rng = np.random.default_rng(0)
        lengths = np.geomspace(1, 1 / self.condition, self.head_dim)

        def role() -> Weights:
            shape = (self.num_heads, self.embed_dim, self.head_dim)
            left = np.linalg.qr(rng.standard_normal(shape))[0]
            right = np.linalg.qr(rng.standard_normal((self.num_heads, self.head_dim, self.head_dim)))[0]
            return np.asarray((left * lengths) @ right, np.float32)

        return role(), role()


TASKS = ("spectra", "eigenvalues", "whole")
TINY = Case("tiny", "tiny", 32, 8, 2, 10.0, TASKS)
"""For loading libraries before anything is timed."""
CASES = (
    Case("vit_s", "ViT-S layer: 6 heads, 384 x 64", 384, 64, 6, 10.0, TASKS),
    Case("vit_s_ill", "the same, condition 1e6", 384, 64, 6, 1e6, ("spectra",)),
    Case("vit_b", "ViT-B layer: 12 heads, 768 x 64", 768, 64, 12, 10.0, TASKS),
    Case("wide", "one head, 4096 x 128", 4096, 128, 1, 10.0, ("whole", "spectra")),
)
"""Dense eigenvalues of a 4096 x 4096 matrix take minutes: the last has no task ``eigenvalues``."""


def by_name(name: str) -> Case:
    """Return a case by its name."""
    return next(case for case in (TINY, *CASES) if case.name == name)
