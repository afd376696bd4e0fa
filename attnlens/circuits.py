"""QK and OV circuits as factored products M = A @ B.T, with exact linear algebra on the factors alone.

Orientation (row vectors): W_QK = W_Q @ W_K.T acts on x W_QK x^T, W_OV = W_V @ W_O maps x to x W_OV. Both are
``[embed_dim, embed_dim]`` of rank at most head_dim; nothing here ever forms them except `FactoredProduct.dense`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from attnlens.balance import Gains, balance
from attnlens.errors import UnsupportedAttentionError
from attnlens.heads import Array, HeadWeights, expand_groups
from attnlens.krylov import largest_singular_value
from attnlens.vocabulary import FOLD, FOLD_CHOICE

if TYPE_CHECKING:  # checked at every call while tests run
    from jaxtyping import Complex, Float

Kind = Literal["qk", "ov"]
Fold = Literal["raw", "effective", "centred", "balanced"]
FOLDS: tuple[Fold, ...] = ("raw", "effective", "centred", "balanced")

# CholeskyQR loses eps * condition^2 of a factor; above this ratio of pivots the slower Householder QR is used.
_CHOLESKY_PIVOT_RATIO = 1e-4
_ROUNDING = 8 * np.finfo(np.float64).eps
_BLOCK = 64
_RIDGE = 1e-12  # of a Gram matrix's trace: makes it positive definite, far below any singular value of interest
_SAFE_EXPONENT = 60  # fourth powers of products of factors within 2^+-60 are far from overflow and underflow


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

    @cached_property
    def unit(self) -> tuple[FactoredProduct, NDArray[np.int_]]:
        """The products at a scale at which no power of their entries is lost, and the exponents of 2 taken out.

        M = 2^exponent * unit, exactly; the product itself, and zeros, where it is at such a scale already.
        """
        exponents = _exponent(self.A), _exponent(self.B)
        if max(np.abs(exponent).max(initial=0) for exponent in exponents) <= _SAFE_EXPONENT:
            return self, np.zeros_like(exponents[0])
        A, B = (np.ldexp(f, -e[..., None, None]) for f, e in zip((self.A, self.B), exponents, strict=True))
        exponent = exponents[0] + exponents[1]
        parts = self.parts and replace(self.parts, A=np.ldexp(self.parts.A, -exponent))
        return replace(self, A=A, B=B, parts=parts), exponent

    def diagonal(self) -> Float[Array, "*stack rows"]:
        """Return diag(M)_i = <A_i, B_i>, shape ``[..., rows]``."""
        return np.einsum("...ir,...ir->...i", self.A, self.B)

    def total(self) -> Float[Array, "*stack"]:
        """Return the sum of all entries, <1^T A, 1^T B>."""
        return np.asarray(np.einsum("...r,...r->...", self.A.sum(-2), self.B.sum(-2)))

    def squared_norm(self) -> Float[Array, "*stack"]:
        """Return ||M||_F^2 = <A^T A, B^T B>."""
        return np.asarray((self.grams[0] * self.grams[1]).sum((-2, -1)))

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
        return _squares(self.A), _squares(self.B)

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
        ridge = np.where(trace > 0, _RIDGE * trace, 1.0)[..., None, None]
        lower = np.linalg.cholesky(gram_a + ridge * np.eye(gram_a.shape[-1]))

        def overlaps(index: int | tuple[int, ...], vectors: Array) -> Array:
            y = lower[index] @ vectors
            return np.asarray(np.einsum("rm,rm->m", gram_b[index] @ y, self.core[index].T @ y))

        return np.matmul(np.swapaxes(lower, -1, -2), np.matmul(gram_b, lower)), overlaps

    @cached_property
    def grams(self) -> tuple[Float[Array, "*stack inner inner"], Float[Array, "*stack inner inner"]]:
        """A^T A and B^T B, each ``[..., rank, rank]``."""
        return _gram(self.A), _gram(self.B)

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
        """Return the rank eigenvalues of M that can be non-zero, those of B^T A."""
        return np.asarray(np.linalg.eigvals(self.core), dtype=np.complex128)

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
        gram = _gram(self.B * np.sqrt(weights)[..., None])
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
        return cls(M, np.eye(M.shape[-1]), inner)

    @cached_property
    def unit(self) -> tuple[FactoredProduct, NDArray[np.int_]]:
        """The product at a safe scale, as of any product: of M alone, B stays the identity."""
        exponent = _exponent(self.A)
        if np.abs(exponent).max(initial=0) <= _SAFE_EXPONENT:
            return self, np.zeros_like(exponent)
        parts = self.parts and replace(self.parts, A=np.ldexp(self.parts.A, -exponent))
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
        return np.asarray(np.vdot(self.A, self.A))

    def squared_trace(self) -> Float[Array, "*stack"]:
        """Return tr(M @ M)."""
        parts = [slice(start, start + _BLOCK) for start in range(0, len(self.A), _BLOCK)]  # of rows: columns in cache
        return np.asarray(sum(np.einsum("ij,ji->", self.A[part], self.A[:, part]) for part in parts))

    def squared_margins(self) -> tuple[Float[Array, "*stack rows"], Float[Array, "*stack cols"]]:
        """Return the sum of squares of every row, and of every column."""
        return np.einsum("...ij,...ij->...i", self.A, self.A), np.einsum("...ij,...ij->...j", self.A, self.A)

    def squared_sizes(self) -> tuple[Float[Array, "*stack"], Float[Array, "*stack"]]:
        """Return ||M||_F^2 and that of the identity."""
        return _squares(self.A), np.full(self.A.shape[:-2], float(self.A.shape[-1]))

    def entries(self, rows: NDArray[np.int_], cols: NDArray[np.int_]) -> Float[Array, "block tall wide"]:
        """Return blocks of the product's entries, as they stand in M."""
        return self.A[rows[:, :, None], cols[:, None, :]]

    def spectral_form(self) -> tuple[Array, Callable[[int | tuple[int, ...], Array], Array]]:
        """Return H = M^T M, with the ridge of any product, of eigenvectors v: s^3 <u, v> = s^2 v^T M v."""

        def overlaps(index: int | tuple[int, ...], v: Array) -> Array:
            u = self.A[index] @ v
            return np.einsum("rm,rm->m", u, u) * np.einsum("rm,rm->m", v, u)

        gram = _gram(self.A)
        trace = np.trace(gram, axis1=-2, axis2=-1)
        return gram + _RIDGE * trace[..., None, None] * np.eye(gram.shape[-1]), overlaps

    @cached_property
    def core(self) -> Float[Array, "*stack inner inner"]:
        """M itself."""
        return self.A

    def singular_values(self) -> Float[Array, "*stack rank"]:
        """Return the singular values of M, largest first."""
        return np.asarray(np.linalg.svd(self.A, compute_uv=False)[..., : self.rank_bound])

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
        squares = self.A**2
        if self.is_square:
            index = np.arange(squares.shape[-1])
            squares[..., index, index] = 0.0
        return np.matmul(squares, weights[..., None])[..., 0]

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


def _exponent(factor: Array) -> NDArray[np.int_]:
    return np.asarray(np.frexp(np.abs(factor).max((-2, -1), initial=0.0))[1], dtype=np.int_)


def _squares(factor: Array) -> Array:
    return np.asarray(np.einsum("...ir,...ir->...", factor, factor))


def _gram(factor: Array) -> Array:
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


def fold_qk(product: FactoredProduct, weights: HeadWeights, fold: Fold) -> FactoredProduct:
    """Fold into a raw QK product what stands in front of the layer, as `qk_circuit` says."""
    fold = FOLD(fold)
    if fold == "raw":
        return product
    product = product.scaled(weights.gain("q"), weights.gain("k"))
    if fold == "balanced":
        return product.balanced()
    return product.centred(*(weights.input_norm(role).centres for role in ("q", "k"))) if fold == "centred" else product


def fold_ov(product: FactoredProduct, weights: HeadWeights, fold: Fold) -> FactoredProduct:
    """Fold into a raw OV product, of a head or summed, what stands around the layer, as `ov_circuit` says."""
    fold = FOLD(fold)
    if fold == "raw":
        return product
    product = product.scaled(weights.gain("v"), weights.gain("o"))
    if fold == "balanced":
        return product.balanced()
    return product.centred(weights.input_norm("v").centres, False) if fold == "centred" else product


def qk_circuit(weights: HeadWeights, fold: Fold = "raw") -> FactoredProduct:
    """Return W_QK = W_Q @ W_K.T of every head, a stack of ``num_heads`` products.

    ``effective`` gives diag(g_q) W_QK diag(g_k) with g the gain of the norm that q and k read (one norm in most
    networks). ``centred`` also projects out the all-ones direction where that norm is a LayerNorm: C diag(g) W_QK
    diag(g) C with C = I - 11^T/d (an RMSNorm does not centre: there it equals ``effective``). ``balanced`` divides one
    positive gain a row and one a column out of the effective product, so that its off-diagonal entries are equal in
    scale: see `balance`. The logit scale and the bias terms are left out.
    """
    return fold_qk(FactoredProduct(weights.W_Q, expand_groups(weights.W_K, weights.num_heads)), weights, fold)


def ov_circuit(weights: HeadWeights, fold: Fold = "raw") -> FactoredProduct:
    """Return W_OV = W_V @ W_O of every value head.

    ``effective`` gives diag(g) W_OV diag(s), g the gain of the norm that v reads and s the LayerScale behind.
    ``centred`` projects the all-ones direction out of the input side, the side a LayerNorm stands on:
    C diag(g) W_OV diag(s). ``balanced`` balances the effective product. Raises `UnsupportedAttentionError` for a layer
    without W_O.
    """
    if weights.W_O is None:
        raise UnsupportedAttentionError(f"{weights.name} has no output projection: there is no OV circuit to form")
    values = expand_groups(weights.W_V, weights.num_value_heads)
    return fold_ov(FactoredProduct(values, np.swapaxes(weights.W_O, -1, -2)), weights, fold)


CIRCUITS: dict[Kind, Callable[[HeadWeights, Fold], FactoredProduct]] = {"qk": qk_circuit, "ov": ov_circuit}


def layer_ov(weights: HeadWeights, fold: Fold = "raw") -> FactoredProduct:
    """Return the layer's value-projection product sum_h W_V[h] @ W_O[h], of rank at most num_heads * value_dim.

    One product [W_V[0] .. W_V[H-1]] @ [W_O[0]; ..; W_O[H-1]]; kept as its two factors only where they are narrower
    than the matrix. Folds as `ov_circuit`. Source: Trockman & Kolter, ICML 2023 (arXiv 2305.09828), where W_V W_proj is
    the object of the recipe.
    """
    heads = ov_circuit(weights)
    inner = heads.A.shape[0] * heads.A.shape[2]
    A, B = side_by_side(heads.A), side_by_side(heads.B)
    narrow = inner < min(A.shape[0], B.shape[0])
    total = FactoredProduct(A, B) if narrow else WholeProduct.of(A @ B.T, inner)
    return fold_ov(replace(total, parts=heads), weights, fold)


def sum_of(heads: FactoredProduct, weights: HeadWeights, fold: Fold) -> FactoredProduct:
    """Return a layer's summed OV product for its diagonal and corners alone, given those of its heads under ``fold``.

    The heads' factors side by side where the fold is linear in the product; a balanced sum is no sum of balanced heads.
    """
    if fold == "balanced":
        return layer_ov(weights, fold)
    return FactoredProduct(side_by_side(heads.A), side_by_side(heads.B))


def side_by_side(factors: Array) -> Array:
    """Return ``[rows, head * rank]`` from ``[head, rows, rank]``: two such factors make the sum over heads."""
    heads, rows, rank = factors.shape
    return np.ascontiguousarray(np.swapaxes(factors, 0, 1)).reshape(rows, heads * rank)


def parse_folds(fold: str) -> tuple[Fold, ...]:
    """Return the folds that one's name, ``both`` (raw and effective) or ``all`` asks for."""
    chosen = FOLD_CHOICE(fold)
    several: dict[str, tuple[Fold, ...]] = {"both": FOLDS[:2], "all": FOLDS}
    return several.get(chosen, (chosen,))
