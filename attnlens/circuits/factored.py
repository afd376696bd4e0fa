"""Products kept as their two factors, M = A @ B.T: exact linear algebra on the factors alone.

Nothing here ever forms a product, of rank at most head_dim, except `FactoredProduct.dense`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from attnlens.balance import Gains, balance
from attnlens.heads import Array

if TYPE_CHECKING:  # checked at every call while tests run
    from jaxtyping import Complex, Float

# CholeskyQR loses eps * condition^2 of a factor; above this ratio of pivots the slower Householder QR is used.
_CHOLESKY_PIVOT_RATIO = 1e-4
_ROUNDING = 8 * np.finfo(np.float64).eps
RIDGE = 1e-12  # of a Gram matrix's trace: makes it positive definite, far below any singular value of interest
SAFE_EXPONENT = 60  # fourth powers of products of factors within 2^+-60 are far from overflow and underflow


@dataclass(frozen=True, repr=False)
class FactoredProduct:
    """A stack of products M = A @ B.T kept apart: A ``[..., rows, rank]``, B ``[..., cols, rank]``, float64."""

    A: Float[Array, "*stack rows inner"]
    B: Float[Array, "... cols inner"]
    gains: Gains | None = field(default=None, kw_only=True, repr=False)
    """What was divided out of the rows and columns of a balanced product"""
    parts: FactoredProduct | None = field(default=None, kw_only=True, repr=False)
    """Stack of the products that this one is the sum of, each with factors of its own"""

    def __repr__(self) -> str:
        """Say the shape and the rank; entries are what `dense` returns."""
        return f"<{type(self).__name__} of shape {list(self.shape)}, rank at most {self.rank_bound}>"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the stack of products, ``[..., rows, cols]``."""
        return (*self.A.shape[:-1], self.B.shape[-2])

    @property
    def rank_bound(self) -> int:
        """Largest rank the product can have: the inner width, capped by rows and columns."""
        return int(min(self.A.shape[-1], self.A.shape[-2], self.B.shape[-2]))

    @property
    def is_square(self) -> bool:
        """Whether M has as many rows as columns, so that a diagonal and a trace mean something."""
        return self.A.shape[-2] == self.B.shape[-2]

    @property
    def unit(self) -> tuple[FactoredProduct, NDArray[np.int_]]:
        """The products at a scale at which no power of their entries is lost, and the exponents of 2 taken out.

        M = 2^exponent * unit, exactly; the product itself, and zeros, where it is at such a scale already.
        """
        return self._scaled_down or (self, np.zeros(self.A.shape[:-2], dtype=np.int_))

    @cached_property
    def _scaled_down(self) -> tuple[FactoredProduct, NDArray[np.int_]] | None:
        """`unit` where it is another product: one that held itself would stay in memory until cycles are collected."""
        exponents = exponent_of(self.A), exponent_of(self.B)
        if max(np.abs(exponent).max(initial=0) for exponent in exponents) <= SAFE_EXPONENT:
            return None
        A, B = (np.ldexp(f, -e[..., None, None]) for f, e in zip((self.A, self.B), exponents, strict=True))
        exponent = exponents[0] + exponents[1]
        return replace(self, A=A, B=B, parts=self.parts and scaled_down(self.parts, np.asarray(exponent))), exponent

    def diagonal(self) -> Float[Array, "*stack rows"]:
        """Return diag(M)_i = <A_i, B_i>, shape ``[..., rows]``."""
        return np.einsum("...ir,...ir->...i", self.A, self.B)

    def total(self) -> Float[Array, "*stack"]:
        """Return the sum of all entries, <1^T A, 1^T B>."""
        return np.asarray(np.einsum("...r,...r->...", self.A.sum(-2), self.B.sum(-2)))

    def squared_norm(self) -> Float[Array, "*stack"]:
        """Return ||M||_F^2 = <A^T A, B^T B>, 0 where rounding alone would leave less."""
        return np.asarray(np.maximum((self.grams[0] * self.grams[1]).sum((-2, -1)), 0.0))

    def squared_trace(self) -> Float[Array, "*stack"]:
        """Return tr(M @ M) = tr((B^T A)^2)."""
        return np.asarray(np.einsum("...rs,...sr->...", self.core, self.core))

    def squared_margins(self) -> tuple[Float[Array, "*stack rows"], Float[Array, "*stack cols"]]:
        """Return sum_j M_ij^2 = A_i (B^T B) A_i^T for every row i, and the same for every column: O(d k^2)."""
        gram_a, gram_b = self.grams
        rows = np.einsum("...ir,...ir->...i", np.matmul(self.A, gram_b), self.A)
        cols = np.einsum("...ir,...ir->...i", np.matmul(self.B, gram_a), self.B)
        return np.maximum(rows, 0.0), np.maximum(cols, 0.0)

    def squared_sizes(self) -> tuple[Float[Array, "*stack"], Float[Array, "*stack"]]:
        """Return ||A||_F^2 and ||B||_F^2."""
        return squares_of(self.A), squares_of(self.B)

    def entries(self, rows: NDArray[np.int_], cols: NDArray[np.int_]) -> Float[Array, "block tall wide"]:
        """Return blocks of one product's entries: of rows ``[block, tall]`` and columns ``[block, wide]``."""
        return np.matmul(self.A[rows], np.swapaxes(self.B[cols], -1, -2))

    def spectral_form(self) -> tuple[Array, Callable[[int | tuple[int, ...], Array], Array]]:
        """Return H ``[..., n, n]``, whose eigenvalues are the s^2 of M's singular triplets (s, u, v), and a function.

        The function maps a product's place in the stack and eigenvectors w ``[n, m]`` to s^3 <u, v>, ``[m]``. With
        A^T A = L L^T, H = L^T (B^T B) L; y = L w, v = B y / s, u = M v / s = A (B^T B) y / s^2, hence
        s^3 <u, v> = <(B^T B) y, (A^T B) y>.
        """
        gram_a, gram_b = self.grams
        trace = np.trace(gram_a, axis1=-2, axis2=-1)
        ridge = np.where(trace > 0, RIDGE * trace, 1.0)[..., None, None]
        lower = np.linalg.cholesky(gram_a + ridge * np.eye(gram_a.shape[-1]))

        def overlaps(index: int | tuple[int, ...], vectors: Array) -> Array:
            y = lower[index] @ vectors
            return np.asarray(np.einsum("rm,rm->m", gram_b[index] @ y, self.core[index].T @ y))

        return np.matmul(np.swapaxes(lower, -1, -2), np.matmul(gram_b, lower)), overlaps

    @cached_property
    def grams(self) -> tuple[Float[Array, "*stack inner inner"], Float[Array, "*stack inner inner"]]:
        """A^T A and B^T B, each ``[..., rank, rank]``."""
        return gram_of(self.A), gram_of(self.B)

    @property
    def triangles(self) -> tuple[Array, Array]:
        """R_A and R_B of thin QRs of A and B: ||R_A X|| = ||A X|| for every X."""
        return _triangular_factor(self.A, self.grams[0]), _triangular_factor(self.B, self.grams[1])

    @property
    def T(self) -> FactoredProduct:
        """The transposed products, B @ A.T."""
        return FactoredProduct(self.B, self.A)

    @cached_property
    def core(self) -> Float[Array, "*stack inner inner"]:
        """B^T A, ``[..., rank, rank]``: its non-zero eigenvalues are those of M."""
        return np.matmul(np.swapaxes(self.B, -1, -2), self.A)

    def eigenvalues(self) -> Complex[NDArray[np.complex128], "*stack inner"]:
        """Return the rank eigenvalues of M that can be non-zero, those of B^T A.

        They are found at one size, between powers of 2: LAPACK rounds otherwise at another.
        """
        exponent = exponent_of(self.core)[..., None]
        unit = np.linalg.eigvals(np.ldexp(self.core, -exponent[..., None])).astype(np.complex128)
        return np.asarray(np.ldexp(unit.real, exponent) + 1j * np.ldexp(unit.imag, exponent))

    def singular_values(self) -> Float[Array, "*stack rank"]:
        """Return the singular values of M that can be non-zero, largest first: those of R_A @ R_B^T.

        R_A and R_B are the triangular factors of thin QRs of A and B. Source: ``s(A B^T) = s(R_A R_B^T)`` as the Q
        factors have orthonormal columns.
        """
        unit, exponent = self.unit
        R_A, R_B = unit.triangles
        values = np.linalg.svd(np.matmul(R_A, np.swapaxes(R_B, -1, -2)), compute_uv=False)
        return np.ldexp(values, exponent[..., None])

    def spectral_norm(self) -> Float[Array, "*stack"]:
        """Return the largest singular value of each product."""
        return np.asarray(self.singular_values()[..., 0])

    def dense(self, size: int | None = None) -> Float[Array, "*stack corner_rows corner_cols"]:
        """Form the top-left ``size x size`` corner of M (the whole of M when size is None)."""
        return np.matmul(self.A[..., :size, :], np.swapaxes(self.B[..., :size, :], -1, -2))

    def offdiagonal_squares(self, weights: Float[Array, "*stack cols"]) -> Float[Array, "*stack rows"]:
        """Return sum_{j != i} M_ij^2 w_j for every row i, over every j where M is not square, ``[..., rows]``.

        It is A_i (B^T diag(w) B) A_i^T - M_ii^2 w_i, O(d k^2), and zero where no more than rounding is left.
        """
        gram = gram_of(self.B * np.sqrt(weights)[..., None])
        sums = np.einsum("...ir,...ir->...i", np.matmul(self.A, gram), self.A)
        if self.is_square:
            sums -= self._squared_diagonal * weights
        noise = _ROUNDING * self._squared_rows * np.trace(gram, axis1=-2, axis2=-1)[..., None]
        return np.where(sums > noise, sums, 0.0)

    @cached_property
    def _squared_diagonal(self) -> Array:
        return self.diagonal() ** 2

    @cached_property
    def _squared_rows(self) -> Array:
        return np.einsum("...ir,...ir->...i", self.A, self.A)

    def scaled(self, rows: Array | None, cols: Array | None) -> FactoredProduct:
        """Return diag(rows) @ M @ diag(cols); None leaves that side alone."""
        return FactoredProduct(
            self.A if rows is None else self.A * rows[..., None],
            self.B if cols is None else self.B * cols[..., None],
            parts=self.parts and self.parts.scaled(rows, cols),
        )

    def balanced(self) -> FactoredProduct:
        """Return diag(r)^-1 @ M @ diag(c)^-1 with the `gains` r and c that `balance` finds; signs stay."""
        return self._balanced

    @cached_property
    def _balanced(self) -> FactoredProduct:
        gains = balance(self)
        return replace(self.scaled(1 / gains.rows, 1 / gains.cols), gains=gains)

    def centred(self, rows: bool, cols: bool) -> FactoredProduct:
        """Project the all-ones direction out of rows and/or columns: C M C with C = I - 11^T/d."""
        return FactoredProduct(
            self.A - self.A.mean(-2, keepdims=True) if rows else self.A,
            self.B - self.B.mean(-2, keepdims=True) if cols else self.B,
            parts=self.parts and self.parts.centred(rows, cols),
        )

    def head(self, index: int | tuple[int, ...] | NDArray[np.bool_]) -> FactoredProduct:
        """Return one product of a stack, or those a mask chooses."""
        return FactoredProduct(self.A[index], self.B[index], gains=self.gains and self.gains.head(index))

    def stacked(self) -> FactoredProduct:
        """Return the products in a stack of one dimension, ``[n, rows, cols]``."""
        rank = self.A.shape[-1]
        return FactoredProduct(*(factor.reshape(-1, factor.shape[-2], rank) for factor in (self.A, self.B)))


def exponent_of(factor: NDArray[np.floating]) -> NDArray[np.int_]:
    """Return the exponents of 2 of the largest entry of each factor."""
    largest = np.maximum(factor.max((-2, -1), initial=0.0), -factor.min((-2, -1), initial=0.0))
    return np.asarray(np.frexp(largest)[1], dtype=np.int_)


def scaled_down(parts: FactoredProduct, exponent: NDArray[np.int_]) -> FactoredProduct:
    """Return 2^-exponent M of all parts of a sum, the exponent shared out so that the largest entry of A is near 1."""
    of_A = exponent_of(parts.A.reshape(-1, parts.A.shape[-1]))
    return replace(parts, A=np.ldexp(parts.A, -of_A), B=np.ldexp(parts.B, of_A - exponent))


def squares_of(factor: Array) -> Array:
    """Return ||F||_F^2 of each factor."""
    return np.asarray(np.einsum("...ir,...ir->...", factor, factor))


def gram_of(factor: Array) -> Array:
    """Return F^T F of each factor ``[..., rows, rank]``."""
    return np.matmul(np.swapaxes(factor, -1, -2), factor)


def _triangular_factor(factor: Array, gram: Array) -> Array:
    """Return R of a thin QR of each ``[rows, rank]`` factor, through Cholesky of its Gram matrix where that is safe."""
    rows, rank = factor.shape[-2:]
    if rows >= rank:
        with contextlib.suppress(np.linalg.LinAlgError):
            lower = np.linalg.cholesky(gram)
            pivots = np.diagonal(lower, axis1=-2, axis2=-1)
            if np.all(pivots.min(-1) > _CHOLESKY_PIVOT_RATIO * pivots.max(-1)):
                return np.swapaxes(lower, -1, -2)
    return np.asarray(np.linalg.qr(factor, mode="r"))
