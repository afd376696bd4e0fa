"""A verdict in words for every circuit: identity, negative identity, none, or not described by two parameters."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import numpy as np

from attnlens.heads import Array
from attnlens.statistics.diagonal import DiagonalFit
from attnlens.statistics.inference import Inference

LEVEL = 0.05
"""Corrected p-value below which the mean diagonal is not chance."""
MAJORITY = 0.5
"""What beta describes must be most of it: of the mean for the median channel, of the trace for the bulk of M."""
SYMMETRIC_NOISE = 2.0
"""Largest variance of a noise diagonal over that of the entries around it: symmetric noise has twice."""


class Verdict(StrEnum):
    """The words, worst case last."""

    IDENTITY = "identity"
    NEGATIVE_IDENTITY = "negative identity"
    NONE = "none"
    NOT_DESCRIBED = "not described by this model"


class Judgement(NamedTuple):
    """A verdict and the finding that decided it."""

    verdict: Verdict
    reason: str


def corrected(p_values: Array) -> Array:
    """Return Holm's family-wise corrected p-values of a family of any shape, NaN staying NaN and not counted.

    p_(i) -> max_{j <= i} min(1, (m - j + 1) p_(j)), j the rank among the m p-values. Holds under any dependence, which
    heads of one layer have. The family is what is passed: all circuits of a model that one wants to speak about.
    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979.

    >>> corrected(np.array([0.01, 0.04, 0.03]))
    array([0.03, 0.06, 0.06])
    """
    family = np.asarray(p_values, dtype=np.float64)
    result = np.full(family.shape, np.nan)
    known = np.isfinite(family)
    order = np.argsort(family[known])
    factors = np.arange(order.size, 0, -1)
    stepped = np.minimum(np.maximum.accumulate(factors * family[known][order]), 1.0)
    in_order = np.empty(order.size)
    in_order[order] = stepped
    result[known] = in_order
    return result


def judge(fit: DiagonalFit, inference: Inference, p_corrected: Array) -> list[Judgement]:
    """Return the verdict of every product of a stack and why, in its order.

    ``p_corrected`` are the stack's p-values after `corrected` over the whole family. The first rule that applies:

    1. p >= LEVEL: not described if spread_ratio > SYMMETRIC_NOISE, else none;
    2. not described if the median channel has less than MAJORITY of beta, or the bulk of M less than MAJORITY of the
       trace, or beta not the sign of the channels' own diagonal, or share_low_rank > MAJORITY;
    3. identity, or negative identity, by the sign of beta.

    Source: docs/verdicts.md.
    """
    names = ("identity_z", "diagonal_median", "bulk_trace_share", "share_low_rank", "spread_ratio")
    columns = [p_corrected, fit.beta, *(getattr(inference, name) for name in names)]
    return [_judge_one(*values) for values in zip(*(np.ravel(column).tolist() for column in columns), strict=True)]


def _judge_one(
    p: float, beta: float, z: float, median: float, bulk: float, low_rank: float, spread: float
) -> Judgement:
    if np.isnan(p):
        return Judgement(Verdict.NOT_DESCRIBED, "the product has no diagonal to speak of")
    if p >= LEVEL:
        if spread > SYMMETRIC_NOISE:
            return Judgement(
                Verdict.NOT_DESCRIBED, f"the diagonal has no common sign but {spread:.1f} times the variance of noise"
            )
        return Judgement(Verdict.NONE, f"a mean diagonal like this is chance, p = {p:.2g}")
    if beta * z <= 0:
        return Judgement(Verdict.NOT_DESCRIBED, "the mean diagonal has the sign of what all rows and columns share")
    if median / beta < MAJORITY:
        return Judgement(
            Verdict.NOT_DESCRIBED, f"few channels carry the diagonal: its median is {median / beta:.2f} of its mean"
        )
    if bulk < MAJORITY:
        return Judgement(
            Verdict.NOT_DESCRIBED, f"few singular directions carry the trace: {bulk:.2f} of it is left without them"
        )
    if low_rank > MAJORITY:
        return Judgement(
            Verdict.NOT_DESCRIBED, f"few singular directions hold {low_rank:.2f} of the squared norm above noise"
        )
    word = Verdict.IDENTITY if beta > 0 else Verdict.NEGATIVE_IDENTITY
    return Judgement(word, f"p = {p:.2g}, the median channel has {median / beta:.2f} of the mean")
