"""How far the fit M ~ alpha * Z + beta * I can be trusted: intervals, p-values, and what two parameters leave out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.linalg import eigh
from scipy.special import ndtr, stdtrit

from attnlens.circuits import FactoredProduct
from attnlens.heads import Array
from attnlens.statistics.nulls import (
    own_diagonal,
    pairing_draws,
    pairing_p_value,
    rotation_draws,
    rotation_p_value,
    sign_flip_draws,
    sign_flip_p_value,
)
from attnlens.statistics.pairs import pair_moments
from attnlens.statistics.trace import null_variance, sampling_variance, trace_p_value
from attnlens.vocabulary import coverage

TOP_CHANNELS = 0.01
"""Share of the diagonal's entries that counts as few channels."""

_FEWEST_CHANNELS = 5  # of which Student's law is taken: with fewer its quantile says more of the law than of alpha
_NORMAL_MEDIAN = 0.6744897501960817  # of |x| for a standard normal x


@dataclass(frozen=True)
class Inference:
    """Statistics beside the fit of a stack of products M ``[..., d, d]``; every field has the shape of the stack.

    NaN where M is not square or d < 3. Intervals say where alpha and beta lie over other factors with the channel
    gains of these, p-values how often factors that nothing links have such a diagonal: docs/verdicts.md has both, with
    coverage and limits. Intervals are of M, p-values and what judges the diagonal of M balanced.
    """

    alpha_stderr: Array
    """standard error of alpha: sums over pairs of entries that share a channel, channels being as dependent as found"""
    alpha_low: Array
    """lower end of the interval of alpha, symmetric in log(alpha)"""
    alpha_high: Array
    """upper end of the interval of alpha"""
    beta_stderr: Array
    """standard error of beta, from the factors: `sampling_variance`"""
    beta_low: Array
    """lower end of the interval of beta, Student t with d - 1 degrees of freedom"""
    beta_high: Array
    """upper end of the interval of beta"""
    null_sd: Array
    """standard deviation of the mean diagonal where nothing links the factors: `null_variance`"""
    identity_z: Array
    """mean diagonal of M balanced and centred over its standard deviation under the null"""
    p_value: Array
    """two-sided p-value of that, for one product: correct it with `corrected`"""
    sign_p_value: Array
    """the same against coin-flip signs of channels; too small where channels depend on each other"""
    pairing_p_value: Array
    """the same against random pairing of the rows of A and B; too small where A and B share large channels"""
    rotation_p_value: Array
    """the same against random rotation of the factors' columns; too small where a few columns are large"""
    share_identity: Array
    """d beta^2 / ||M||_F^2"""
    share_diagonal_spread: Array
    """sum_i (M_ii - beta)^2 / ||M||_F^2; about 1/d of the noise under the model, 2/d for symmetric noise"""
    share_low_rank: Array
    """sum of (s^2 - edge^2) over singular values s above the noise's edge / ||M||_F^2"""
    bulk_trace_share: Array
    """share of tr(M) that is left without the singular directions above the edge"""
    directions_above: Array
    """number of these singular directions"""
    spread_ratio: Array
    """variance of the balanced diagonal over the mean square of the balanced off-diagonal; 1 under the model"""
    typical_ratio: Array
    """the same about 0, from the median of |diagonal| where that gives less: what a typical channel has"""
    sign_agreement: Array
    """share of the channels whose diagonal has the sign of the balanced mean diagonal"""
    expected_agreement: Array
    """that share if every channel had the sign, given the sizes of mean, typical channel and noise of M balanced"""
    factor_cosine: Array
    """tr(M) / (||A|| ||B||): 1 where both factors are one, as with tied query and key weights"""
    channels: Array
    """d"""
    directions: Array
    """number of singular directions M can have"""
    offdiagonal_kurtosis: Array
    """excess kurtosis of the off-diagonal entries, from 2^16 of them and the largest channels; 0 if Gaussian"""
    diagonal_median: Array
    """median of diag(M)"""
    top_channel_share: Array
    """share of sum_i |M_ii| that the largest 1% of the entries hold"""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the statistics' names in table order."""
        return tuple(f.name for f in fields(cls))


def infer(
    product: FactoredProduct,
    *,
    level: float = 0.95,
    permutations: int = 0,
    seed: int = 0,
    of_balanced: Mapping[str, Array] | None = None,
) -> Inference:
    """Return intervals, p-values and the shares of M for every product M = A @ B.T of a stack.

    With d = embed_dim, S_i = sum_{j != i} (M_ij^2 + M_ji^2) from A_i (B^T B) A_i^T, h_ij = (M_ij^2 + M_ji^2) / 2:

    - beta: mean(M_ii) +- t_{d-1} sqrt(`sampling_variance`) / d;
    - alpha^2 = d U, U = mean of h over pairs, var(U) = (4 sum_i e_i^2 - 2 sum_{i != j} e_ij^2) / (d (d-1))^2 with
      e = h - U and e_i its row sums, at least 2 sum e_ij^2 / (d (d-1))^2: delete-one jackknife over channels, less
      the variance of single pairs, which it counts twice; times `sampling_variance` / (d sd(M_ii)^2) where that is
      above 1: d channels that depend on each other are worth n < d; alpha * exp(+- t_{n-1} sd(U) / (2 U));
    - p-values: `trace_p_value` of M balanced decides; beside it `sign_flip_p_value` of `own_diagonal`,
      `pairing_p_value`, `rotation_p_value`, with ``permutations`` > 0 by that many seeded Monte Carlo draws;
      ``of_balanced`` is `judge_balanced` of the product where that is at hand.

    O(d k^2) time a product beside 2^16 sampled entries, float64. Raises `UsageError` for a level outside (0, 1).
    Source: derived in docs/verdicts.md; pairs that share a member as in Aronow, Samii & Assenova (arXiv 1312.3398).
    """
    level = coverage(level)
    d = product.shape[-1]
    if not product.is_square or d < 3:
        return Inference(*(np.full(product.shape[:-2], np.nan) for _ in fields(Inference)))
    product, exponent = product.unit
    margins = product.squared_margins()
    squared_norm = margins[0].sum(-1)
    diagonal = product.diagonal()
    own = own_diagonal(product, margins)
    flipped = sign_flip_draws(own, permutations, seed) if permutations else sign_flip_p_value(own)
    paired = pairing_draws(product, permutations, seed) if permutations else pairing_p_value(product, squared_norm)
    rotated = rotation_draws(product, permutations, seed) if permutations else rotation_p_value(product)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = Inference(
            **_intervals(product, diagonal, margins, (1 + level) / 2, seed),
            null_sd=np.sqrt(null_variance(product)) / d,
            sign_p_value=flipped,
            pairing_p_value=paired,
            rotation_p_value=rotated,
            **_shares(product, diagonal, margins),
            **(judge_balanced(product) if of_balanced is None else of_balanced),
            factor_cosine=diagonal.sum(-1) / np.sqrt(math.prod(product.squared_sizes())),
            diagonal_median=np.median(diagonal, axis=-1),
            top_channel_share=_top_share(np.abs(diagonal)),
        )
    return replace(found, **{name: np.ldexp(getattr(found, name), exponent) for name in _IN_UNITS_OF_M})


_IN_UNITS_OF_M = (
    "alpha_stderr",
    "alpha_low",
    "alpha_high",
    "beta_stderr",
    "beta_low",
    "beta_high",
    "null_sd",
    "diagonal_median",
)


def judge_balanced(product: FactoredProduct) -> dict[str, Array]:
    """Return what `infer` says of the products balanced: p-value and likeness of the diagonal, free of scale."""
    unit, _ = product.unit
    balanced, _ = (unit if unit.gains is not None else unit.balanced()).unit
    d = balanced.shape[-1]
    z, p_value = trace_p_value(balanced)
    diagonal = balanced.diagonal()
    noise = np.sqrt(np.maximum(balanced.squared_norm() - (diagonal**2).sum(-1), 0.0) / (d * (d - 1)))
    mean = diagonal.mean(-1)
    median = np.median(np.abs(diagonal), axis=-1)
    beyond = np.sqrt(np.maximum(median**2 - (_NORMAL_MEDIAN * noise) ** 2, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "identity_z": z,
            "p_value": p_value,
            "spread_ratio": diagonal.var(-1, ddof=1) / noise**2,
            "typical_ratio": np.minimum((median / _NORMAL_MEDIAN) ** 2, (diagonal**2).mean(-1)) / noise**2,
            "sign_agreement": (diagonal * np.sign(mean)[..., None] > 0).mean(-1),
            "expected_agreement": ndtr(np.maximum(np.abs(mean), beyond) / noise),
            "channels": np.full_like(mean, d),
        }


def _intervals(
    product: FactoredProduct, diagonal: Array, margins: tuple[Array, Array], probability: float, seed: int
) -> dict[str, Array]:
    d = product.shape[-1]
    pairs = d * (d - 1)
    fourth, kurtosis = pair_moments(product, margins, seed)
    sums = margins[0] + margins[1] - 2 * diagonal**2
    mean = np.maximum(sums.sum(-1), 0.0) / (2 * pairs)
    row_squares = ((sums / 2 - (d - 1) * mean[..., None]) ** 2).sum(-1)
    pair_squares = pairs * np.maximum(fourth - mean**2, 0.0)
    variance = np.maximum(4 * row_squares - 2 * pair_squares, 2 * pair_squares) / pairs**2
    alpha, beta = np.sqrt(d * mean), diagonal.mean(-1)
    relative = np.divide(np.sqrt(variance), 2 * mean, out=np.zeros_like(mean), where=mean > 0)
    error = np.sqrt(sampling_variance(product)) / d
    alone = diagonal.std(-1, ddof=1) / math.sqrt(d)
    dependence = np.divide(error, alone, out=np.ones_like(error), where=alone > 0)
    dependence = np.clip(dependence, 1.0, math.sqrt(d))  # d channels are worth no more than d and no less than one
    relative *= dependence
    quantile = stdtrit(d - 1, probability)
    alpha_quantile = stdtrit(np.maximum(d / dependence**2, min(_FEWEST_CHANNELS, d)) - 1, probability)
    return {
        "alpha_stderr": alpha * relative,
        "alpha_low": alpha * np.exp(-alpha_quantile * relative),
        "alpha_high": alpha * np.exp(alpha_quantile * relative),
        "beta_stderr": error,
        "beta_low": beta - quantile * error,
        "beta_high": beta + quantile * error,
        "offdiagonal_kurtosis": kurtosis,
    }


def _shares(product: FactoredProduct, diagonal: Array, margins: tuple[Array, Array]) -> dict[str, Array]:
    d = product.shape[-1]
    beta = diagonal.mean(-1)
    energy = margins[0].sum(-1)
    excess, trace, count = _above_the_edge(product, energy)
    return {
        "share_identity": d * beta**2 / energy,
        "share_diagonal_spread": ((diagonal - beta[..., None]) ** 2).sum(-1) / energy,
        "share_low_rank": excess / energy,
        "bulk_trace_share": 1 - trace / diagonal.sum(-1),
        "directions_above": count,
        "directions": np.full_like(count, product.rank_bound),
    }


def noise_edge(rank: int, embed_dim: int) -> float:
    """Return edge^2 * rank / ||M||_F^2: the largest squared singular value of noise in units of the mean one.

    For M = A @ B.T with i.i.d. factors ``[embed_dim, rank]`` and c = rank / embed_dim, at leading order in embed_dim:
    (1 + z) (1 + c z)^2 / z at z = (sqrt(c^2 + 8 c) - c) / (4 c). It is 27/4 at c = 1, above the 4 of an i.i.d. matrix,
    and tends to 1 as c -> 0. Source: derived in docs/verdicts.md.

    >>> noise_edge(64, 64)
    6.75
    """
    c = rank / embed_dim
    z = (math.sqrt(c * c + 8 * c) - c) / (4 * c)
    return (1 + z) * (1 + c * z) ** 2 / z


def _above_the_edge(product: FactoredProduct, energy: Array) -> tuple[Array, Array, Array]:
    """Return sum (s^2 - edge^2), sum s <u, v> and their number over the singular triplets (s, u, v) with s > edge."""
    rank = product.rank_bound
    edges = noise_edge(rank, product.shape[-1]) * energy / rank
    form, overlaps = product.spectral_form()
    excess, trace, count = (np.zeros(edges.shape) for _ in range(3))
    for index in np.ndindex(edges.shape):
        edge = edges[index]
        if not (np.isfinite(edge) and edge > 0):
            continue
        squares, vectors = eigh(form[index], subset_by_value=(edge, np.inf))  # few: all of them cost twice as much
        excess[index] = (squares - edge).sum()
        trace[index] = (overlaps(index, vectors) / squares).sum()
        count[index] = len(squares)
    return excess, trace, count


def _top_share(sizes: Array) -> Array:
    count = math.ceil(TOP_CHANNELS * sizes.shape[-1])
    return np.partition(sizes, -count, axis=-1)[..., -count:].sum(-1) / sizes.sum(-1)
