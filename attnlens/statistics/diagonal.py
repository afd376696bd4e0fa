"""The fit M ~ alpha * Z + beta * I of a circuit, and the statistics that stand beside it, all from the factors."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnlens.circuits import FactoredProduct
from attnlens.heads import Array


class AlphaBeta(NamedTuple):
    """The two parameters of the fit of a stack of products."""

    alpha: Array
    beta: Array


@dataclass(frozen=True)
class DiagonalFit:
    """Statistics of a stack of products M ``[..., d, d]``; every field has the shape of the stack.

    M ~ alpha * Z + beta * I with Z i.i.d. of mean 0 and variance 1/d. NaN where a statistic is not defined: the
    diagonal's ones for a product that is not square, ratios for a product that is zero.
    """

    alpha: Array
    """sqrt(d) * rms(off-diagonal)"""
    beta: Array
    """tr(M) / d"""
    beta_stderr: Array
    """sd(diag(M)) / sqrt(d), with d - 1 in the variance"""
    identity_cosine: Array
    """tr(M) / (||M||_F sqrt(d)): cosine between M and the identity"""
    identity_cosine_bound: Array
    """sqrt(k / d): the largest identity cosine a product of rank k can have"""
    sign_agreement: Array
    """share of the channels whose M_ii has beta's sign"""
    diagonal_prominence: Array
    """mean(diag(M)) / sd(off-diagonal): how far the mean diagonal stands out of one entry's spread; no t statistic"""
    frobenius_norm: Array
    """||M||_F"""
    spectral_norm: Array
    """largest singular value of M"""
    stable_rank: Array
    """||M||_F^2 / spectral_norm^2"""
    copying_score: Array
    """sum Re(lambda) / sum |lambda| over the eigenvalues of M, in [-1, 1]"""
    symmetric_share: Array
    """||(M + M^T) / 2||_F^2 / ||M||_F^2, in [0, 1]; 1/2 for a matrix without symmetry"""
    effective_rank: Array
    """exp(entropy of s / sum(s)), s the singular values (Roy & Vetterli 2007)"""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the statistics' names in table order."""
        return tuple(f.name for f in fields(cls))

    def times(self, exponent: NDArray[np.int_]) -> DiagonalFit:
        """Return the fit of 2^exponent M."""
        return replace(self, **{name: np.ldexp(getattr(self, name), exponent) for name in _IN_UNITS_OF_M})


def fit_diagonal(product: FactoredProduct, singular: Array | None) -> DiagonalFit:
    """Fit alpha and beta of every product in a stack, with the statistics beside them.

    ``beta = tr(M)/d`` and ``alpha = sqrt(d) * sqrt((||M||_F^2 - sum_i M_ii^2) / (d (d-1)))`` from
    ``tr(M) = sum(A*B)``, ``M_ii = <A_i, B_i>`` and ``||M||_F^2 = <A^T A, B^T B>``: O(d k^2) time, no d x d matrix.
    The difference under the root is exact to rounding: an alpha under 1e-8 of beta is zero to this precision.

    ``singular`` holds the product's singular values. None leaves out what needs all singular values or eigenvalues
    (``effective_rank``, ``copying_score``: NaN), an O(k^3) cost that matters for a layer's sum, whose k is embed_dim.
    Source: equations derived in docs/measurements.md.
    """
    product, exponent = product.unit
    if singular is not None:
        singular = np.ldexp(singular, -exponent[..., None])
    rows, cols = product.shape[-2:]
    squared_norm = product.squared_norm()
    norm = np.sqrt(squared_norm)
    undefined = np.full_like(norm, np.nan)
    spectral_norm = product.spectral_norm() if singular is None else singular[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        stable_rank = squared_norm / spectral_norm**2
    diagonal = dict.fromkeys(
        (
            "alpha",
            "beta",
            "beta_stderr",
            "identity_cosine",
            "sign_agreement",
            "diagonal_prominence",
            "symmetric_share",
        ),
        undefined,
    )
    if product.is_square and rows > 1:
        diagonal = _diagonal_statistics(product, squared_norm)
    return DiagonalFit(
        **diagonal,
        identity_cosine_bound=np.full_like(norm, np.sqrt(product.rank_bound / rows)) if rows == cols else undefined,
        frobenius_norm=norm,
        spectral_norm=spectral_norm,
        stable_rank=stable_rank,
        copying_score=undefined if singular is None or rows != cols else _copying_score(product.eigenvalues()),
        effective_rank=undefined if singular is None else _effective_rank(singular),
    ).times(exponent)


_IN_UNITS_OF_M = ("alpha", "beta", "beta_stderr", "frobenius_norm", "spectral_norm")


def fit_alpha_beta(product: FactoredProduct) -> AlphaBeta:
    """Return alpha and beta of every product of a stack, as `fit_diagonal` has them, without the other statistics.

    NaN where a product has no diagonal. O(d k^2), no singular values.
    """
    if not product.is_square or product.shape[-1] < 2:
        return AlphaBeta(*(np.full(product.shape[:-2], np.nan) for _ in AlphaBeta._fields))
    product, exponent = product.unit
    return AlphaBeta(*(np.ldexp(each, exponent) for each in alpha_beta(product.diagonal(), product.squared_norm())))


def off_diagonal_squares(diagonal: Array, squared_norm: Array) -> Array:
    """Return the sum of M_ij^2 over i != j from diag(M) ``[..., d]`` and ||M||_F^2."""
    return np.maximum(squared_norm - (diagonal**2).sum(-1), 0.0)


def alpha_beta(diagonal: Array, squared_norm: Array) -> AlphaBeta:
    """Return alpha and beta of M from diag(M) ``[..., d]`` and ||M||_F^2, as `fit_diagonal` defines them."""
    d = diagonal.shape[-1]
    squares = off_diagonal_squares(diagonal, squared_norm)
    return AlphaBeta(np.sqrt(d * squares / (d * max(d - 1, 1))), diagonal.mean(-1))


def _diagonal_statistics(product: FactoredProduct, squared_norm: Array) -> dict[str, Array]:
    d = product.shape[-1]
    diag = product.diagonal()
    alpha, beta = alpha_beta(diag, squared_norm)
    off_count = d * (d - 1)
    off_squares = off_diagonal_squares(diag, squared_norm)
    off_mean = (product.total() - diag.sum(-1)) / off_count
    off_variance = np.maximum(off_squares / off_count - off_mean**2, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "alpha": alpha,
            "beta": beta,
            "beta_stderr": diag.std(-1, ddof=1) / np.sqrt(d),
            "identity_cosine": diag.sum(-1) / np.sqrt(squared_norm * d),
            "sign_agreement": (diag * np.sign(beta)[..., None] > 0).mean(-1),
            "diagonal_prominence": beta / np.sqrt(off_variance),
            "symmetric_share": (squared_norm + product.squared_trace()) / (2 * squared_norm),
        }


def _copying_score(eigenvalues: NDArray[np.complex128]) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(eigenvalues.real.sum(-1) / np.abs(eigenvalues).sum(-1))


def _effective_rank(singular: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        share = singular / singular.sum(-1, keepdims=True)
        return np.asarray(np.exp(-np.where(share > 0, share * np.log(share), 0.0).sum(-1)))
