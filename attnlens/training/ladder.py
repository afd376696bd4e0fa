"""The ladder: starts that each keep more of a pre-trained source, or other things, and what every step is worth.

Steps are contrasts between arms of one seed. Where a rung keeps other things than the one below it, and not more, its
step is the difference between two summaries of the source and no part of a sum that could be put in another order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from attnlens.training.statistics import Contrast, Mean, Values

LADDER = "ladder"
"""Word of ``--arms`` for every rung a network has."""


class Rung(NamedTuple):
    """One arm of a ladder."""

    arm: str
    keeps: str
    """What of the source it keeps."""
    nested: bool = True
    """Whether it keeps all that the rung below it does."""


ATTENTION = (
    Rung("default", "nothing"),
    Rung("scale", "the Frobenius norm of every head's QK and every layer's OV; random directions, flat spectrum"),
    Rung("spectrum", "all singular values of every head's QK and every layer's OV; random directions"),
    Rung("fitted", "alpha and beta of every head's QK and every layer's OV", nested=False),
    Rung(
        "fitted-gains",
        "alpha and beta of every balanced QK and OV, the gains of its rows and columns channel by channel, kurtosis",
        nested=False,
    ),
    Rung(
        "permuted",
        "attention with one random permutation of the channels a layer on both sides: everything inside a layer, "
        "nothing between layers",
        nested=False,
    ),
    Rung("pretrained-attention", "attention as it is"),
    Rung("pretrained", "every weight but the classifier"),
)
"""Of a network with attention."""
FILTERS = (
    Rung("default", "nothing"),
    Rung("scale", "the norm of every depthwise filter; random directions"),
    Rung("fitted", "the covariance of every layer's filters, at the default's scale", nested=False),
    Rung(
        "permuted",
        "filters with one random permutation of the channels a layer: everything inside a layer, nothing between "
        "layers",
    ),
    Rung("pretrained-filters", "filters as they are"),
    Rung("pretrained", "every weight but the classifier"),
)
"""Of a network with depthwise filters."""


def steps(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Return each arm against the one before it, then each against the first, without repeats."""
    pairs = [*zip(arms[1:], arms[:-1], strict=True), *((arm, arms[0]) for arm in arms[1:])]
    return list(dict.fromkeys(pairs))


@dataclass(frozen=True)
class Step:
    """What one rung is worth: against the rung below, against the first, and what it leaves to the last.

    Values are of the metric, arm minus other arm, paired by seed.
    """

    arm: str
    below: str
    keeps: str
    nested: bool
    mean: Mean
    step: Contrast
    from_start: Contrast
    left: Mean
    """The last rung minus this one."""


def ladder_of(rungs: Sequence[Rung], values: Values, declared: Sequence[Contrast]) -> list[Step]:
    """Return every rung above the first; empty where the arms or contrasts of the ladder are not all there."""
    known: Mapping[tuple[str, str], Contrast] = {(one.arm, one.other): one for one in declared}
    arms = [rung.arm for rung in rungs]
    if not all(pair in known for pair in steps(arms)):
        return []
    top = values.get(arms[-1], {})
    found = []
    for below, rung in zip(arms[:-1], rungs[1:], strict=True):
        mine = values.get(rung.arm, {})
        left = Mean.of([top[seed] - mine[seed] for seed in sorted(top.keys() & mine.keys())])
        mean = Mean.of(list(mine.values()))
        contrasts = known[rung.arm, below], known[rung.arm, arms[0]]
        found.append(Step(rung.arm, below, rung.keeps, rung.nested, mean, *contrasts, left))
    return found
