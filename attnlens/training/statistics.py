"""What paired runs allow to say: intervals, sign-flip and Holm p-values, gap closed, epochs to a target.

Runs are paired by seed: two arms of a seed saw the same data in the same order and the same augmentation, and start
from the same weights outside what their arms set. Values here are those of the comparison's metric: accuracies as
shares, 0 to 1, or bits per byte. Differences are arm minus other arm, whichever way is better.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, nan, sqrt

import numpy as np
from scipy import stats

from attnlens.heads import Array
from attnlens.statistics.verdicts import corrected
from attnlens.training.metrics import ACCURACY, Metric

LEVEL = 0.95
SCREENING_BELOW = 6
"""With fewer seeds the sign-flip p-value cannot go under .05, and a result is called screening."""
LEAST_GAP = 0.01
"""Pre-trained over default by less than a point is no gap to speak of a share of."""

Values = Mapping[str, Mapping[int, float]]
"""The metric's final value by arm and seed, of the runs that finished."""


@dataclass(frozen=True)
class Mean:
    """A mean with its t interval; bounds are infinite with one value."""

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
    """Return every declared contrast; Holm's correction runs over all of them, for either kind of p-value."""
    every = [_contrast(values, arm, other) for arm, other in declared]
    t_holm = corrected(np.array([one.t_p for one in every]))
    flip_holm = corrected(np.array([one.sign_flip_p for one in every]))
    return [
        Contrast(**{**vars(one), "t_holm": float(t), "sign_flip_holm": float(flip)})
        for one, t, flip in zip(every, t_holm, flip_holm, strict=True)
    ]


def _contrast(values: Values, arm: str, other: str) -> Contrast:
    mine, theirs = values.get(arm, {}), values.get(other, {})
    seeds = tuple(sorted(mine.keys() & theirs.keys()))
    paired = [mine[seed] - theirs[seed] for seed in seeds]
    return Contrast(arm, other, seeds, tuple(paired), Mean.of(paired), paired_t(paired), sign_flip(paired))


def paired_t(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the paired t test; NaN with fewer than two pairs, 0 or 1 without any spread."""
    if len(differences) < 2:
        return nan
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of the mean over all 2^n sign patterns, exact up to 16 pairs.

    p = share of patterns with |sum s_i d_i| >= |sum d_i|; beyond 16 pairs 2^16 random patterns stand for all.
    """
    n = len(differences)
    if n < 2:
        return nan
    values = np.asarray(differences, dtype=np.float64)
    if n <= 16:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = 1 - 2 * np.random.default_rng(0).integers(0, 2, (2**16, n))
        signs[0] = 1  # the pattern observed is one of them
    sums, observed = np.abs(signs @ values), abs(values.sum())
    return float((sums >= observed - 1e-12 * max(observed, np.abs(values).sum())).mean())


@dataclass(frozen=True)
class GapClosed:
    """(arm - default) / (pre-trained - default) with a bootstrap interval; not clipped. ``refused`` says why not."""

    arm: str
    share: float
    low: float
    high: float
    n: int
    refused: str = ""


def gap_closed(
    values: Values, arm: str, *, baseline: str, pretrained: str, seed: int = 0, resamples: int = 9999
) -> GapClosed:
    """Return the share of the gap an arm closes, seeds resampled whole (percentile interval).

    Refused where the gap's own t interval holds 0, where it is under a point, or with fewer than three seeds.
    """
    columns = [values.get(name, {}) for name in (arm, baseline, pretrained)]
    seeds = sorted(set.intersection(*(set(column) for column in columns)))
    n = len(seeds)
    if n < 3:
        return GapClosed(arm, nan, nan, nan, n, f"{n} seeds are too few")
    mine, base, best = (np.array([column[s] for s in seeds]) for column in columns)
    gap = Mean.of((best - base).tolist())
    if gap.low <= 0 <= gap.high:
        return GapClosed(arm, nan, nan, nan, n, "the interval of pretrained - default holds 0")
    if abs(gap.mean) < LEAST_GAP:
        return GapClosed(arm, nan, nan, nan, n, "pretrained - default is under a point")

    def share(mine: Array, base: Array, best: Array, axis: int = -1) -> Array:
        return (mine - base).mean(axis) / (best - base).mean(axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        bootstrap = stats.bootstrap(
            (mine, base, best),
            share,
            paired=True,
            vectorized=True,
            n_resamples=resamples,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
    interval = bootstrap.confidence_interval
    return GapClosed(arm, float(share(mine, base, best)), float(interval.low), float(interval.high), n)


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
