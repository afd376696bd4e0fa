"""What paired runs allow to say: intervals, sign-flip and Holm p-values, gap closed, epochs to a target.

Runs are paired by seed: two arms of a seed saw the same data in the same order and the same augmentation, and start
from the same weights outside what their arms set. Values here are those of the comparison's metric: accuracies as
shares, 0 to 1, or bits per byte. Differences are arm minus other arm, whichever way is better.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan, sqrt
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from attnlens.statistics.verdicts import corrected
from attnlens.training.metrics import ACCURACY, Metric
from attnlens.words import counted

LEVEL = 0.95
SCREENING_BELOW = 6
"""With fewer seeds the sign-flip p-value cannot go under .05, and a result is called screening."""
LEAST_GAP = 0.01
"""Pre-trained over default by less than a point is no gap to speak of a share of."""
ROUNDING = 1e-12
"""Differences of values of order one that differ by less than this are equal: they have no spread to estimate."""
_EXACT = 16
"""Pairs up to which all sign patterns are gone through; beyond, 2^16 random ones."""

Values = Mapping[str, Mapping[int, float]]
"""The metric's final value by arm and seed, of the runs that finished."""


@dataclass(frozen=True)
class Mean:
    """A mean with its t interval; bounds are infinite with one value, and where the values have no spread."""

    mean: float
    sd: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Return the mean with mean -+ t_{n-1} sd / sqrt(n)."""
        n = len(values)
        mean = float(np.mean(values)) if n else nan
        if n < 2:
            return cls(mean, nan, -inf, inf, n)
        if without_spread(values):
            return cls(mean, 0.0, -inf, inf, n)
        sd = float(np.std(values, ddof=1))
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * sd / sqrt(n)
        return cls(mean, sd, mean - half, mean + half, n)


@dataclass(frozen=True)
class Contrast:
    """Arm minus other arm, over the seeds both finished."""

    arm: str
    other: str
    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    difference: Mean
    t_p: float
    sign_flip_p: float
    t_holm: float = nan
    sign_flip_holm: float = nan


def contrasts(values: Values, declared: Sequence[tuple[str, str]]) -> list[Contrast]:
    """Return every declared contrast; Holm's correction runs over all of them, for either kind of p-value.

    Contrasts that have no p-value count too: how many were declared does not depend on what was found.
    """
    every = [_contrast(values, arm, other) for arm, other in declared]
    t_holm = _holm([one.t_p for one in every])
    flip_holm = _holm([one.sign_flip_p for one in every])
    return [replace(one, t_holm=t, sign_flip_holm=flip) for one, t, flip in zip(every, t_holm, flip_holm, strict=True)]


def _holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values over all of them, where NaN counts as 1 and stays NaN."""
    found = np.array(p_values)
    return np.where(np.isnan(found), nan, corrected(np.nan_to_num(found, nan=1.0))).tolist()


def _contrast(values: Values, arm: str, other: str) -> Contrast:
    mine, theirs = values.get(arm, {}), values.get(other, {})
    seeds = tuple(sorted(mine.keys() & theirs.keys()))
    paired = [mine[seed] - theirs[seed] for seed in seeds]
    flips = nan if without_spread(paired) else sign_flip(paired)
    return Contrast(arm, other, seeds, tuple(paired), Mean.of(paired), paired_t(paired), flips)


def without_spread(values: Sequence[float]) -> bool:
    """Whether all values are equal but for rounding: nothing can be estimated from how far they lie apart."""
    return len(values) > 0 and float(np.ptp(values)) <= ROUNDING


def paired_t(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired t test; NaN with fewer than two pairs, and without any spread."""
    if len(differences) < 2 or without_spread(differences):
        return nan
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the mean over all 2^n sign patterns, exact up to 16 pairs.

    p = share of patterns with |sum s_i d_i| >= |sum d_i|; beyond 16 pairs 2^16 random patterns stand for all.
    """
    n = len(differences)
    if n < 2:
        return nan
    values = np.asarray(differences, dtype=np.float64)
    if n <= _EXACT:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (2**16, n))
        signs[0] = 1  # the pattern observed is one of them
    sums, observed = np.abs(signs @ values), abs(values.sum())
    return float((sums >= observed - 1e-12 * max(observed, np.abs(values).sum())).mean())


def smallest_sign_flip(n: int, family: int = 1) -> float:
    """Return the smallest p-value that n sign flips can reach, after Holm's correction over a family of contrasts.

    min(1, family * 2 / 2^n): of all patterns, the one observed and its mirror image have the largest |sum|.
    """
    return min(1.0, family * 2.0 ** -min(n - 1, _EXACT)) if n else 1.0


class Shares(NamedTuple):
    """Every ratio that Fieller's test does not reject: ``between`` two bounds, ``outside`` them, or ``every`` one."""

    kind: Literal["between", "outside", "every"]
    low: float
    high: float


def fieller(numerator: Sequence[float], denominator: Sequence[float], level: float = LEVEL) -> Shares:
    """Return the confidence set of mean(numerator) / mean(denominator), of values that belong together in pairs.

    { r : |mean(y - r x)| <= t_{n-1} sd(y - r x) / sqrt(n) }, which is a r^2 - 2 b r + c <= 0 with h = t^2 / n and
    a = mean(x)^2 - h var(x), b = mean(x) mean(y) - h cov(x, y), c = mean(y)^2 - h var(y). It is an interval where the
    t interval of the denominator leaves 0 out (a > 0); otherwise it reaches to infinity, both ways. Its level is exact
    for pairs of normal values. Source: Fieller, Some problems in interval estimation, JRSS B 16, 1954.
    """
    y, x = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    n = len(y)
    h = float(stats.t.ppf((1 + level) / 2, n - 1)) ** 2 / n
    spread = np.cov(x, y)
    a = x.mean() ** 2 - h * spread[0, 0]
    b = x.mean() * y.mean() - h * spread[0, 1]
    c = y.mean() ** 2 - h * spread[1, 1]
    root = b**2 - a * c  # never under 0 where a is above it: the ratio of the means is in the set
    if a > 0:
        half = sqrt(max(root, 0.0))
        return Shares("between", float(b - half) / float(a), float(b + half) / float(a))
    if root <= 0 or a == 0:
        return Shares("every", -inf, inf)
    bounds = sorted(float(b + sign * sqrt(root)) / float(a) for sign in (1, -1))
    return Shares("outside", *bounds)


@dataclass(frozen=True)
class GapClosed:
    """(arm - default) / (pre-trained - default) with Fieller's interval; not clipped. ``refused`` says why not."""

    arm: str
    share: float
    low: float
    high: float
    n: int
    refused: str = ""


def gap_closed(values: Values, arm: str, *, baseline: str, pretrained: str, metric: Metric = ACCURACY) -> GapClosed:
    """Return the share of the gap that an arm closes, with its interval, over the seeds that all three arms finished.

    Refused with fewer than three seeds, where the pre-trained model is not shown to be better than the baseline (the
    gap's own t interval holds 0 or lies on the other side; what Fieller's set is then is said in words), where the gap
    is under a point, and where there is no spread to judge by.
    """
    columns = [values.get(name, {}) for name in (arm, baseline, pretrained)]
    seeds = sorted(set.intersection(*(set(column) for column in columns)))
    n = len(seeds)

    def refused(reason: str) -> GapClosed:
        return GapClosed(arm, nan, nan, nan, n, reason)

    if n < 3:
        return refused(f"{counted(n, 'seed is', 'seeds are')} too few")
    mine, base, best = (np.array([column[s] for s in seeds]) for column in columns)
    above, whole = (mine - base).tolist(), (best - base).tolist()
    gap = Mean.of(whole)
    if without_spread(whole) or without_spread(above):
        return refused("a difference was the same in every seed: without spread there is no interval")
    if gap.low <= 0 <= gap.high:
        shares = fieller(above, whole)
        said = "no share is left out" if shares.kind == "every" else f"{shares.low:.2f} to {shares.high:.2f} left out"
        return refused(f"the interval of pretrained - default holds 0 ({said})")
    if not metric.favours(gap.mean):
        return refused("pretrained was not better than default")
    if abs(gap.mean) < LEAST_GAP:
        return refused(f"pretrained - default is under {'a point' if metric.share else f'{LEAST_GAP} {metric.unit}'}")
    shares = fieller(above, whole)
    return GapClosed(arm, float(np.mean(above) / np.mean(whole)), shares.low, shares.high, n)


@dataclass(frozen=True)
class EpochsTo:
    """Epochs until the target was first measured, by seed; None is "not reached", a censored value and no number."""

    arm: str
    target: float
    by_seed: Mapping[int, float | None]

    @property
    def reached(self) -> int:
        """Number of seeds that reached it."""
        return sum(value is not None for value in self.by_seed.values())

    @property
    def median(self) -> float | None:
        """Return the median with "not reached" above every number; None where that is what the median is."""
        ordered = sorted(inf if value is None else value for value in self.by_seed.values())
        if not ordered:
            return None
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        return middle if middle < inf else None


def epochs_to(
    arm: str, target: float, curves: Mapping[int, Sequence[tuple[float, float]]], metric: Metric = ACCURACY
) -> EpochsTo:
    """Return when each seed's curve of (epoch, value) first reached ``target``, at the epochs that were measured."""
    return EpochsTo(
        arm,
        target,
        {
            seed: next((epoch for epoch, value in sorted(curve) if metric.reached(value, target)), None)
            for seed, curve in curves.items()
        },
    )
