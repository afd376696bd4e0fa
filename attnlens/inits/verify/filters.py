"""Comparing a network's depthwise filters with what an initialiser makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from attnlens.filters.covariance import covariance_error, relative_distance, second_moment
from attnlens.heads import Array
from attnlens.inits.apply import make_filter_layer, planned_bias
from attnlens.inits.plan import ALL_HEADS, FilterLayer, FilterPlan, Network, Rule
from attnlens.inits.random import Streams
from attnlens.inits.verify.check import MATRIX_TOLERANCE, Check, stored_eps
from attnlens.layouts.depthwise import FilterSpec, read_filters
from attnlens.layouts.read_write import widened

DRAWS = 40
"""Draws of other seeds that say how far a covariance lies from its own: the limit is their mean and six deviations."""
_OTHER_SEEDS = 2**24


def verify_filter_layer(
    rule: Rule, network: Network, index: int, spec: FilterSpec, whole: bool
) -> tuple[list[Check], str]:
    """Compare one layer's filters, whole or by their covariance; say why where there is nothing to compare."""
    assert rule.filters is not None
    layer = make_filter_layer(network, index, spec)
    plan = rule.filters(layer)
    if plan.filters is None:
        return [], plan.skipped
    key = (index, spec.path, "filters", ALL_HEADS)
    if whole:
        have = read_filters(spec, network.tensors)
        limit = max(MATRIX_TOLERANCE, 4 * stored_eps(network.tensors[spec.tensor]))
        error = relative_distance(have, plan.filters)
        problem = f"||F - D|| / ||D|| is {error:.2g}, above {limit:.1g}: another draw, or other options"
        checks = [Check(*key, matrix_error=error, matrix_tolerance=limit, problem=problem if error > limit else "")]
        return [*checks, *_bias_check(network, index, spec, plan, limit)], ""
    if plan.covariance is None:
        return [], "is drawn without a covariance that is known: only with the seed can it be compared"
    error, limit = _of_covariance(layer.filters, plan.covariance), _limit(rule, layer)
    problem = f"the error of the covariance is {error:.2g}, above {limit:.2g} that draws of it have"
    return [Check(*key, matrix_error=error, matrix_tolerance=limit, problem=problem if error > limit else "")], ""


def _limit(rule: Rule, layer: FilterLayer) -> float:
    """Return what draws of other seeds, made by the same rule, show as the largest plausible error."""
    assert rule.filters is not None
    errors = []
    for draw in range(DRAWS):
        plan = rule.filters(replace(layer, streams=Streams(_OTHER_SEEDS + draw)))
        assert plan.filters is not None
        assert plan.covariance is not None
        errors.append(_of_covariance(plan.filters, plan.covariance))
    return float(np.mean(errors) + 6 * np.std(errors, ddof=1))


def _of_covariance(filters: Array, covariance: Array) -> float:
    return covariance_error(second_moment(filters), covariance, len(filters))[0]


def _bias_check(network: Network, index: int, spec: FilterSpec, plan: FilterPlan, limit: float) -> list[Check]:
    wanted = planned_bias(spec, plan)
    if wanted is None or spec.bias is None:
        return []
    have = widened(network.tensors[spec.bias], spec.bias)
    worst = float(np.abs(have - wanted).max() / max(1.0, np.abs(wanted).max()))
    problem = f"a bias is {worst:.2g} away from what it is set to" if worst > limit else ""
    key = (index, spec.path, "bias", ALL_HEADS)
    return [Check(*key, matrix_error=worst, matrix_tolerance=limit, problem=problem)]
