"""Whether a product has the gains it was drawn with, and the tails that they and their places give its entries."""

from __future__ import annotations

import math

import numpy as np

from attnlens.balance import Gains
from attnlens.circuits import FactoredProduct
from attnlens.fit.gains import correlation, normal_scores
from attnlens.heads import Array, HeadWeights
from attnlens.inits.gained import apart, offdiagonal_tails, placed
from attnlens.inits.plan import Layer, Plan, PlannedGains
from attnlens.inits.report import ProductReport
from attnlens.inits.verify.mistakes import one_product

TAILS = 0.2
"""Relative distance between the kurtosis asked for and the one that is there."""
_LOG_GAIN, _ROUNDINGS, _SPREADS = 1e-4, 8.0, 6.0


def gain_problem(layer: Layer, row: ProductReport, planned: HeadWeights, drawn: PlannedGains, eps: float) -> str:
    """Say which of a product's gains or tails are not the planned ones; empty where all are.

    Gains by channel, or in rising order where channels are not settled, within 1e-4 and 8 ``eps`` in log r and log c.
    Which channels r and c have in common is then compared by the correlation of their normal scores, within six
    standard errors of two draws. Kurtosis before balancing: within `TAILS` of the one asked for, or of the nearest that
    an exchange of channels would give, unless that is not there either: a draw whose entries do not allow it is none
    the worse.
    """
    product = one_product(layer.weights, row.circuit, row.head, "balanced")
    have, wanted = product.gains, one_product(planned, row.circuit, row.head, "balanced").gains
    assert have is not None
    assert wanted is not None
    limit = _LOG_GAIN + _ROUNDINGS * eps
    for name, side in (("r", "rows"), ("c", "cols")):
        found, asked = _logs(have, side), _logs(wanted, side)
        if not drawn.by_channel:
            found, asked = np.sort(found), np.sort(asked)
        with np.errstate(invalid="ignore"):
            away = np.where(np.isinf(found) & np.isinf(asked), 0.0, np.abs(found - asked))
        worst = int(np.argmax(away))
        if away[worst] > limit:
            place = f"channel {worst}" if drawn.by_channel else f"rank {worst} of {len(away)}"
            return f"log {name} of {place} is {found[worst]:.4g}, expected {asked[worst]:.4g} ± {limit:.1g}"
    if not drawn.by_channel:
        found_together, asked_together = _together(have), _together(wanted)
        spread = _SPREADS * math.sqrt(2 / len(have.rows))
        if abs(found_together - asked_together) > spread:
            return f"r and c correlate by {found_together:.2f}, expected {asked_together:.2f} ± {spread:.2f}"
    return _tails_problem(row, product, drawn)


def has_dead_channels(plan: Plan) -> bool:
    """Whether a channel of a planned factor has no weights, so that its product has no closed form."""
    return any((weight == 0).all(1 if role == "o" else 2).any() for role, weight in plan.weights().items())


def _tails_problem(row: ProductReport, product: FactoredProduct, drawn: PlannedGains) -> str:
    wanted = drawn.kurtosis
    if math.isnan(wanted) or float(apart(row.kurtosis, wanted)) <= TAILS:
        return ""
    assert product.gains is not None
    N, rows, cols = product.dense(), product.gains.rows, product.gains.cols
    order = placed(N, rows, cols, wanted)
    nearest = offdiagonal_tails(N[np.ix_(order, order)], rows, cols)
    if float(apart(nearest, wanted)) > TAILS or float(apart(row.kurtosis, nearest)) <= TAILS:
        return ""
    return (
        f"excess kurtosis before balancing is {row.kurtosis:.3g}, expected {wanted:.3g} ± {100 * TAILS:.0f}%: with its "
        f"channels in other places it would be {nearest:.3g}"
    )


def _logs(gains: Gains, side: str) -> Array:
    """Return log gains, -inf where a channel is dead."""
    values: Array = getattr(gains, side)
    return np.where(getattr(gains, f"alive_{side}"), np.log(values), -np.inf)


def _together(gains: Gains) -> float:
    return correlation(*(normal_scores(_logs(gains, side)) for side in ("rows", "cols")))
