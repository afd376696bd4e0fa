"""A verdict in words for every circuit: what its diagonal is, and the counts that say so."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri

from attnlens.heads import Array
from attnlens.statistics.diagonal import AlphaBeta, DiagonalFit
from attnlens.statistics.inference import Inference

LEVEL = 0.05
"""Corrected p-value below which the mean diagonal is not chance."""
MAJORITY = 0.5
"""Most: of the trace or squared norm in the bulk, and of the agreement in sign that a common diagonal would have.

Three of four channels, where noise changes no sign: the majority less the minority is then half of all channels.
"""
SLACK = 2.0
"""Binomial standard errors, 1/2 / sqrt(d), that an agreement may fall short of that by chance."""
SYMMETRIC_NOISE = 2.0
"""Largest variance of a noise diagonal over that of the entries around it: symmetric noise has twice."""
TIED = 1e-9
"""Distance of the factors' cosine from 1 that is rounding."""
_LEAST_P = 1e-307


class Verdict(StrEnum):
    """The words, worst case last."""

    IDENTITY = "identity"
    NEGATIVE_IDENTITY = "negative identity"
    IDENTITY_LOW_RANK = "identity + low rank"
    NEGATIVE_LOW_RANK = "negative identity + low rank"
    MIXED = "mixed diagonal"
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


@dataclass(frozen=True)
class _Findings:
    """What is known of one product."""

    p: float
    beta: float
    beta_low: float
    beta_high: float
    identity_z: float
    sign_agreement: float
    expected_agreement: float
    typical_ratio: float
    spread_ratio: float
    top_channel_share: float
    bulk_trace_share: float
    share_low_rank: float
    directions_above: float
    directions: float
    channels: float

    @property
    def chance(self) -> str:
        """The p-value in words: what is too small for a number is not nothing."""
        return f"p = {self.p:.2g}" if not self.p < _LEAST_P else f"p < {_LEAST_P:g}"

    @property
    def agreed(self) -> str:
        return f"{self.sign_agreement * self.channels:.0f} of {self.channels:.0f} channels have its sign"

    @property
    def agrees(self) -> bool:
        """Whether the channels' signs agree as those of a common diagonal under noise do, for the most part."""
        least = 0.5 + MAJORITY * (self.expected_agreement - 0.5) - SLACK * 0.5 / self.channels**0.5
        return self.sign_agreement >= least

    @property
    def is_mixed(self) -> bool:
        """Whether a typical channel has more of a diagonal than noise."""
        return self.typical_ratio > SYMMETRIC_NOISE

    @property
    def is_clear(self) -> bool:
        """Whether the interval of beta leaves 0 out, on the side the channels are on."""
        return self.beta_low > 0 < self.identity_z or self.beta_high < 0 > self.identity_z


def judge(fit: AlphaBeta | DiagonalFit, inference: Inference, p_corrected: Array) -> list[Judgement]:
    """Return the verdict of every product of a stack and why, in its order.

    ``p_corrected`` are the stack's p-values after `corrected` over the whole family. With "large" a typical_ratio above
    SYMMETRIC_NOISE, and agreement in sign short where sign_agreement is below 1/2 + MAJORITY (expected_agreement - 1/2)
    by more than SLACK standard errors, the first rule that applies:

    1. p >= LEVEL: mixed diagonal where it is large and agreement is short, not described where spread_ratio >
       SYMMETRIC_NOISE, else none;
    2. agreement short: mixed diagonal where it is large, not described otherwise;
    3. the interval of beta holds 0, or beta has not the sign of most channels: not described;
    4. bulk_trace_share < MAJORITY or share_low_rank > MAJORITY: (negative) identity + low rank where the trace of the
       bulk has the same sign and would be no chance by itself, not described otherwise;
    5. identity, or negative identity, by the sign of beta.

    Tied factors, A = B, are remarked upon: W W^T has a positive trace whatever W holds.
    Source: docs/verdicts.md.
    """
    names = [name for name in _Findings.__dataclass_fields__ if name not in ("p", "beta")]
    columns = [p_corrected, fit.beta, *(getattr(inference, name) for name in names)]
    tied = np.ravel((inference.factor_cosine >= 1 - TIED) & (inference.directions < inference.channels))
    judged = [_judge_one(_Findings(*values)) for values in zip(*(np.ravel(c).tolist() for c in columns), strict=True)]
    return [_remarked(one) if remark else one for one, remark in zip(judged, tied.tolist(), strict=True)]


def _remarked(judgement: Judgement) -> Judgement:
    remark = "both sides are tied (M = W W^T): its trace is positive whatever W holds"
    return Judgement(judgement.verdict, f"{judgement.reason}; {remark}")


def _judge_one(found: _Findings) -> Judgement:
    if np.isnan(found.p):
        return Judgement(Verdict.NOT_DESCRIBED, "the product has no diagonal to speak of")
    typical = f"a typical diagonal entry is {found.typical_ratio**0.5:.1f} times as large as noise"
    if found.p >= LEVEL:
        if found.is_mixed and not found.agrees:
            return Judgement(Verdict.MIXED, f"{typical}, but the mean is chance, {found.chance}: {found.agreed}")
        if found.spread_ratio > SYMMETRIC_NOISE:
            return Judgement(Verdict.NOT_DESCRIBED, _few_channels(found))
        return Judgement(Verdict.NONE, f"a mean diagonal like this is chance, {found.chance}")
    if not found.agrees:
        if found.is_mixed:
            return Judgement(Verdict.MIXED, f"{typical}, and {found.agreed} ({found.chance})")
        return Judgement(Verdict.NOT_DESCRIBED, f"{_few_channels(found)}; {found.agreed}")
    if not found.is_clear:
        return Judgement(
            Verdict.NOT_DESCRIBED,
            f"few large channels outweigh the others in beta, whose interval is {found.beta_low:.2g} to "
            f"{found.beta_high:.2g}: balanced, {found.agreed.replace('its sign', 'the sign of ' + _sign(found))}",
        )
    if found.bulk_trace_share < MAJORITY or found.share_low_rank > MAJORITY:
        return _with_low_rank(found)
    word = Verdict.IDENTITY if found.beta > 0 else Verdict.NEGATIVE_IDENTITY
    return Judgement(word, f"{found.chance}, {found.agreed}")


def _sign(found: _Findings) -> str:
    return "a positive diagonal" if found.identity_z > 0 else "a negative diagonal"


def _few_channels(found: _Findings) -> str:
    return (
        f"few channels hold the diagonal: its standard deviation is {found.spread_ratio**0.5:.1f} times that of noise, "
        f"a typical entry {found.typical_ratio**0.5:.1f} times as large as noise"
    )


def _with_low_rank(found: _Findings) -> Judgement:
    """Judge a product that is mostly few directions by what is left without them, against the noise of all of it."""
    few = (
        f"{found.directions_above:.0f} of {found.directions:.0f} directions hold {1 - found.bulk_trace_share:.2f} of "
        f"the trace and {found.share_low_rank:.2f} of the squared norm above noise"
    )
    if found.bulk_trace_share * abs(found.identity_z) < -ndtri(LEVEL / 2):
        return Judgement(Verdict.NOT_DESCRIBED, f"{few}: what is left of it is chance")
    word = Verdict.IDENTITY_LOW_RANK if found.beta > 0 else Verdict.NEGATIVE_LOW_RANK
    return Judgement(word, f"{found.chance}, {found.agreed}; {few}")
