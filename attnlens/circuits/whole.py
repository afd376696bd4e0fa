"""A product kept whole, where its factors would be as large as itself: a layer's summed OV."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attnlens.circuits.factored import (
    RIDGE,
    SAFE_EXPONENT,
    FactoredProduct,
    exponent_of,
    gram_of,
    scaled_down,
    squares_of,
)
from attnlens.heads import Array
from attnlens.krylov import largest_singular_value

if TYPE_CHECKING:  # checked at every call while tests run
    from jaxtyping import Float

_BLOCK = 64


@dataclass(frozen=True, repr=False)
class WholeProduct(FactoredProduct):
    """A product whose inner width is no smaller than the matrix itself: A is M, B the identity, nothing is factored.

    A layer's summed OV is one: its factors are as large as M, so that M is the cheapest form of it.
    """

    inner: int
    """Width the product was formed over, its rank bound with rows and columns."""

    @classmethod
    def of(cls, M: Array, inner: int) -> WholeProduct:
        """Wrap a formed matrix ``[rows, cols]``."""
        return cls(M, _identity(M.shape[-1]), inner)

    @cached_property
    def _scaled_down(self) -> tuple[FactoredProduct, NDArray[np.int_]] | None:
        """As of any product, of M alone: B stays the identity."""
        exponent = exponent_of(self.A)
        if np.abs(exponent).max(initial=0) <= SAFE_EXPONENT:
            return None
        parts = self.parts and scaled_down(self.parts, exponent)
        return replace(self, A=np.ldexp(self.A, -exponent[..., None, None]), parts=parts), exponent

    @property
    def rank_bound(self) -> int:
        """Largest rank the product can have."""
        return min(self.inner, *self.shape[-2:])

    def diagonal(self) -> Float[Array, "*stack rows"]:
        """Return diag(M)."""
        return np.diagonal(self.A, axis1=-2, axis2=-1)

    def total(self) -> Float[Array, "*stack"]:
        """Return the sum of all entries."""
        return np.asarray(self.A.sum((-2, -1)))

    def squared_norm(self) -> Float[Array, "*stack"]:
        """Return ||M||_F^2."""
        return squares_of(self.A)

    def squared_trace(self) -> Float[Array, "*stack"]:
        """Return tr(M @ M)."""
        starts = range(0, self.A.shape[-2], _BLOCK)
        parts = [slice(start, start + _BLOCK) for start in starts]  # of rows: columns in cache
        return np.asarray(
            sum(np.einsum("...ij,...ji->...", self.A[..., part, :], self.A[..., :, part]) for part in parts)
        )

    def squared_margins(self) -> tuple[Float[Array, "*stack rows"], Float[Array, "*stack cols"]]:
        """Return the sum of squares of every row, and of every column."""
        return np.einsum("...ij,...ij->...i", self.A, self.A), np.einsum("...ij,...ij->...j", self.A, self.A)

    def squared_sizes(self) -> tuple[Float[Array, "*stack"], Float[Array, "*stack"]]:
        """Return ||M||_F^2 and that of the identity."""
        return squares_of(self.A), np.full(self.A.shape[:-2], float(self.A.shape[-1]))

    def entries(self, rows: NDArray[np.int_], cols: NDArray[np.int_]) -> Float[Array, "block tall wide"]:
        """Return blocks of the product's entries, as they stand in M."""
        return self.A[rows[:, :, None], cols[:, None, :]]

    def spectral_form(self) -> tuple[Array, Callable[[int | tuple[int, ...], Array], Array]]:
        """Return H = M^T M, with the ridge of any product, of eigenvectors v: s^3 <u, v> = s^2 v^T M v."""

        def overlaps(index: int | tuple[int, ...], v: Array) -> Array:
            u = self.A[index] @ v
            return np.einsum("rm,rm->m", u, u) * np.einsum("rm,rm->m", v, u)

        gram = gram_of(self.A)
        trace = np.trace(gram, axis1=-2, axis2=-1)
        return gram + RIDGE * trace[..., None, None] * np.eye(gram.shape[-1]), overlaps

    @cached_property
    def core(self) -> Float[Array, "*stack inner inner"]:
        """M itself."""
        return self.A

    def singular_values(self) -> Float[Array, "*stack rank"]:
        """Return the singular values of M, largest first."""
        unit, exponent = self.unit
        values = np.linalg.svd(unit.A, compute_uv=False)[..., : self.rank_bound]
        return np.asarray(np.ldexp(values, exponent[..., None]))

    def spectral_norm(self) -> Float[Array, "*stack"]:
        """Return the largest singular value, by `largest_singular_value`."""
        unit, exponent = self.unit
        return np.asarray(np.ldexp(largest_singular_value(unit.A), exponent))

    def dense(self, size: int | None = None) -> Float[Array, "*stack corner_rows corner_cols"]:
        """Return the top-left ``size x size`` corner of M (the whole of M when size is None)."""
        return self.A[..., :size, :size]

    @property
    def T(self) -> WholeProduct:
        """The transposed product."""
        return WholeProduct.of(np.swapaxes(self.A, -1, -2), self.inner)

    def head(self, index: int | tuple[int, ...] | NDArray[np.bool_]) -> WholeProduct:
        """Return one product of a stack, or those a mask chooses."""
        return WholeProduct(self.A[index], self.B, self.inner)

    def stacked(self) -> WholeProduct:
        """Return the products in a stack of one dimension, ``[n, rows, cols]``."""
        return WholeProduct(self.A.reshape(-1, *self.A.shape[-2:]), self.B, self.inner)

    def offdiagonal_squares(self, weights: Float[Array, "*stack cols"]) -> Float[Array, "*stack rows"]:
        """Return sum_{j != i} M_ij^2 w_j for every row i, ``[..., rows]``, from the entries themselves."""
        return np.matmul(self._offdiagonal, weights[..., None])[..., 0]

    @cached_property
    def _offdiagonal(self) -> Array:
        squares = self.A**2
        if self.is_square:
            index = np.arange(squares.shape[-1])
            squares[..., index, index] = 0.0
        return squares

    def scaled(self, rows: Array | None, cols: Array | None) -> WholeProduct:
        """Return diag(rows) @ M @ diag(cols); None leaves that side alone."""
        M = self.A if rows is None else self.A * rows[..., None]
        parts = self.parts and self.parts.scaled(rows, cols)
        return WholeProduct(M if cols is None else M * cols[..., None, :], self.B, self.inner, parts=parts)

    def centred(self, rows: bool, cols: bool) -> WholeProduct:
        """Project the all-ones direction out of rows and/or columns: C M C with C = I - 11^T/d."""
        M = self.A - self.A.mean(-2, keepdims=True) if rows else self.A
        parts = self.parts and self.parts.centred(rows, cols)
        return WholeProduct(M - M.mean(-1, keepdims=True) if cols else M, self.B, self.inner, parts=parts)


def _identity(size: int) -> Array:
    """Return the identity ``[size, size]`` as a view of zeros about a one: a row begins one before the last."""
    row = np.zeros(2 * size - 1)
    row[size - 1] = 1.0
    step = row.itemsize
    return np.lib.stride_tricks.as_strided(row[size - 1 :], (size, size), (-step, step), writeable=False)
