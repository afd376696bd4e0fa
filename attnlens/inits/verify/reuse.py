"""Whether one noise was drawn for two products: in two layers, or in both circuits.

Compared are the signs of a sample of off-diagonal entries, the same places in every product. Signs do not change with
positive gains of rows and columns, with alpha, or with the split between factors; of independent draws they agree in
half the places, of one noise in more, also where its products were cut to their ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnlens.circuits import FactoredProduct
from attnlens.heads import Array

SAMPLE = 2**14
"""Off-diagonal places looked at, all where a product has fewer."""
_SPREADS = 8.0


class Signs(NamedTuple):
    """The signs of one product's off-diagonal entries at the places of `places`."""

    layer: int
    circuit: str
    head: int | str
    size: int
    values: Array
    """``[place]``, -1, 0 or 1"""


class Reuse(NamedTuple):
    """A product whose noise is that of an earlier one."""

    product: Signs
    of: Signs
    correlation: float
    """of their signs"""


def places(size: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return rows and columns of the off-diagonal places that are looked at in every product of a size."""
    count = size * (size - 1)
    chosen = np.random.default_rng(0).choice(count, min(count, SAMPLE), replace=False)
    rows, cols = np.divmod(chosen, size - 1)
    return rows, cols + (cols >= rows)


def signs_of(product: FactoredProduct, layer: int, circuit: str, head: int | str) -> list[Signs]:
    """Return the signs of one product; none where it is not square."""
    if not product.is_square:
        return []
    size = product.shape[-1]
    rows, cols = places(size)
    values = np.sign((product.A[rows] * product.B[cols]).sum(-1)).astype(np.float32)
    return [Signs(layer, circuit, head, size, values)]


def reused(products: Sequence[Signs]) -> Iterator[Reuse]:
    """Yield each product that has the noise of an earlier one, of another layer or circuit, with the nearest.

    Signs of independent noise have a correlation of standard deviation 1 / sqrt(places): eight of them are the limit.
    """
    for size in sorted({product.size for product in products}):
        group = [product for product in products if product.size == size]
        values = np.stack([product.values for product in group])
        counts = np.sqrt((values**2).sum(1))
        alive = counts > 0
        correlation = np.abs(values @ values.T) / np.outer(np.where(alive, counts, 1), np.where(alive, counts, 1))
        limit = _SPREADS / math.sqrt(values.shape[1])
        places_of = [(product.layer, product.circuit) for product in group]
        for later, product in enumerate(group):
            row = [0.0 if places_of[e] == places_of[later] else float(correlation[later, e]) for e in range(later)]
            earlier = int(np.argmax(row)) if row else 0
            if row and row[earlier] > limit:
                yield Reuse(product, group[earlier], row[earlier])
