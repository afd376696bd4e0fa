"""Data order and augmentation as pure functions of (seed, epoch, purpose), drawn on the CPU, and their hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

PURPOSES = ("order", "augment", "split", "subset", "mix", "drop")
"""What is drawn; a new purpose goes to the end, or every seed changes its meaning."""


def generator(seed: int, epoch: int, purpose: str) -> np.random.Generator:
    """Return a fresh generator for one seed, epoch and purpose: nothing drawn elsewhere moves it."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch, PURPOSES.index(purpose)])))


def epoch_order(seed: int, epoch: int, count: int, batch_size: int) -> NDArray[np.int64]:
    """Return the images of an epoch in order, whole batches only: ``[count // batch_size * batch_size]``."""
    return generator(seed, epoch, "order").permutation(count)[: count // batch_size * batch_size]


def digest(order: NDArray[np.int64], draws: Mapping[str, NDArray[np.generic]]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of an epoch's order and augmentation draws."""
    hashed = hashlib.sha256(np.ascontiguousarray(order).data)
    for name in sorted(draws):
        hashed.update(name.encode())
        hashed.update(np.ascontiguousarray(draws[name]).data)
    return hashed.hexdigest()[:16]
