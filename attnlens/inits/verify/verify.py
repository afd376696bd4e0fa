"""Checking a network against an initialiser: by whole matrices where the draw is known, by statistics otherwise."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attnlens.circuits import Fold
from attnlens.errors import UnsupportedAttentionError
from attnlens.heads import HeadWeights
from attnlens.inits.apply import build_checked, make_layer, planned_heads, planned_layers, run_each
from attnlens.inits.caveats import whole_layer_reason
from attnlens.inits.folding import gains, scaled, silent_roles
from attnlens.inits.plan import ALL_HEADS, Layer, Network, Plan, Rule, without_silent
from attnlens.inits.random import Streams
from attnlens.inits.registry import find_initialiser
from attnlens.inits.report import ProductReport, Skipped, describe_option, measure
from attnlens.inits.verify.check import MATRIX_TOLERANCE, Check, stored_eps
from attnlens.inits.verify.factors import bias_deviations, empty_directions, skipped_directions, split_problem
from attnlens.inits.verify.filters import verify_filter_layer
from attnlens.inits.verify.gains import gain_problem, has_dead_channels
from attnlens.inits.verify.marks import with_clones, with_reuse
from attnlens.inits.verify.mistakes import (
    MISTAKES,
    Tolerance,
    balanced_spread_error,
    diagonal_spread,
    one_product,
    recognise,
    settled_alpha,
    size_of,
    spread_limits,
    tolerance_at,
)
from attnlens.inits.verify.record import Claim, folder_of, recorded
from attnlens.inits.verify.reuse import Signs, reused, signs_of
from attnlens.layouts import AttentionSpec
from attnlens.layouts.depthwise import FilterSpec
from attnlens.layouts.read_write import Tensors
from attnlens.models.open import open_model
from attnlens.models.opened import OpenedModel
from attnlens.statistics.inverse import Parameters
from attnlens.statistics.table import StatsTable, Tabular
from attnlens.words import counted

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


@dataclass(frozen=True, repr=False)
class VerifyReport(Tabular):
    """What a network's attention or its depthwise filters are, compared with what an initialiser makes of them.

    Its rows are the checks.
    """

    model: str
    init: str
    seed: int | None
    options: Mapping[str, Any]
    fold: Fold
    whole: bool
    """Whether whole matrices were compared; else statistics alone."""
    checks: tuple[Check, ...]
    skipped: tuple[Skipped, ...]

    def _table(self) -> StatsTable:
        return StatsTable.of({name: vars(check)[name] for name in _FIRST} | vars(check) for check in self.checks)

    def _headline(self) -> str:
        failed = sum(not check.passed for check in self.checks)
        seed = "any seed" if self.seed is None else f"seed {self.seed}"
        outcome = f"{failed} of {counted(len(self.checks), 'check')} failed" if failed else "every check passed"
        return f"VerifyReport of {self.model} against {self.init}, {seed}: {outcome}"

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def mistakes(self) -> dict[str, tuple[Check, ...]]:
        """Return the known mistakes that were recognised, with the checks that show each."""
        by_name = {name: tuple(c for c in self.checks if c.mistake == name) for name in MISTAKES}
        return {name: checks for name, checks in by_name.items() if checks}

    def to_json(self) -> dict[str, Any]:
        """Return JSON-ready data; a number that is not known is null."""
        data = asdict(self)
        data["options"] = {name: describe_option(value) for name, value in self.options.items()}
        for row in data["checks"]:
            row.update({k: None for k, v in row.items() if isinstance(v, float) and math.isnan(v)})
        return {**data, "passed": self.passed, "mistakes": {n: len(c) for n, c in self.mistakes.items()}}


_FIRST = ("layer", "circuit", "head", "problem", "mistake")
"""Columns that a table of checks begins with."""


def verify_init(
    model: str | os.PathLike[str] | nn.Module | None = None,
    checkpoint: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    init: str | None = None,
    seed: int | None = None,
    model_args: dict[str, Any] | None = None,
    input_size: int | tuple[int, ...] | None = None,
    **options: Any,
) -> VerifyReport:
    """Return how a network's attention or depthwise filters differ from what an initialiser makes of them.

    Nothing is changed.

    ``model``, ``checkpoint``, ``model_args`` and ``input_size``: as `attnlens.inspect` takes them. Without ``init``,
    the initialiser, seed and options are those `attnlens init` wrote into the file, else ``mimetic``. With a seed (or
    an initialiser that draws nothing) every product is compared as a whole matrix; without one by alpha, beta, the
    spread of its diagonal and its rank, within the tolerances that `tolerance_at` and `spread_limits` state, filters by
    their covariance. Either way the split of a product between its weights, biases that are set, and noise that returns
    in another product are looked at. What fails is matched with the known `MISTAKES`.

    Raises what `open_model` and the initialiser raise, and `UsageError` where a file's record cannot be followed.
    """
    opened = open_model(model, checkpoint, filters=True, model_args=model_args, input_size=input_size)
    named = Claim(find_initialiser(init).name, seed, options) if init is not None else None
    claim = named or recorded(opened, seed, options, folder_of(model if checkpoint is None else checkpoint))
    chosen = find_initialiser(claim.init)
    architecture, tensors = opened.architecture, opened.checkpoint
    network = Network(architecture, tensors, Streams(claim.seed or 0), _builder(model, opened))
    rule = chosen.rule(network, claim.options)
    whole = rule.replays and (claim.seed is not None or not rule.random)
    layers = planned_layers(rule, network, claim.init)
    jobs: list[Callable[[], _Found]] = [partial(_verify_layer, rule, network, *p, whole) for p in layers.attention]
    jobs += [partial(_verify_filters, rule, network, *layer, whole) for layer in layers.filters]
    results = run_each(jobs, tensors, layers.specs())
    checks = with_reuse(
        [check for result in results for check in result.checks],
        list(reused([signs for result in results for signs in result.signs])),
    )
    skipped = [*layers.refused, *(item for result in results for item in result.skipped)]
    if not checks:
        reason = f": {skipped[0].name} {skipped[0].reason}" if skipped else ""
        raise UnsupportedAttentionError(f"nothing in {opened.name} can be compared with {claim.init!r}{reason}")
    return VerifyReport(
        opened.name, claim.init, claim.seed, claim.options, rule.fold, whole, tuple(checks), tuple(skipped)
    )


def _builder(model: Any, opened: OpenedModel) -> Callable[[], nn.Module] | None:
    if model is not None and not isinstance(model, str | os.PathLike | Mapping):
        return lambda: model
    if opened.timm_args is None:
        return None

    return partial(build_checked, opened.architecture.name, 0, opened.timm_args)


class _Found(NamedTuple):
    layer: int
    checks: list[Check]
    skipped: list[Skipped]
    signs: tuple[Signs, ...] = ()
    """Of the products that are drawn: to compare with those of other layers and of the other circuit."""


def _verify_layer(rule: Rule, network: Network, index: int, spec: AttentionSpec, whole: bool) -> _Found:
    reason = whole_layer_reason(spec)
    if reason:
        return _Found(index, [], [Skipped(index, spec.path, "", reason)])
    assert rule.plan is not None
    layer = make_layer(network, index, spec)
    plan = without_silent(rule.plan(layer), silent_roles(spec, network.tensors))
    skipped = [Skipped(index, spec.path, circuit, why) for circuit, why in plan.skipped]
    if not plan.weights():
        return _Found(index, [], skipped)
    plan, cut = reachable(plan, layer.weights, rule.fold)
    planned, eps = planned_heads(layer, plan, rule), _coarsest(spec, network.tensors)
    rows = measure(layer, layer.weights, plan, rule.fold)
    dead = bool(plan.gains) and has_dead_channels(plan)
    known = not cut and not any(math.isnan(row.expected_alpha) for row in rows)
    twins = rows if known else measure(layer, planned, plan, rule.fold)
    checks = [
        _check(
            _Product(layer, row, twin, plan, planned),
            rule,
            eps,
            closed=not cut and not dead and not math.isnan(row.expected_alpha),
            settled=not cut,
            whole=whole,
        )
        for row, twin in zip(rows, twins, strict=True)
    ]
    biases = _bias_checks(layer, plan, planned, eps, whole)
    drawn = any(request.alpha > 0 for request in plan.requests)
    if not drawn or (whole and all(check.passed for check in checks)):
        return _Found(index, [*checks, *biases], skipped)
    checks = with_clones(checks, layer, rule.fold)
    signs = tuple(signs for circuit, head in _drawn(rows) for signs in _signs(layer, circuit, head, rule.fold))
    return _Found(index, [*checks, *biases], skipped, signs)


def _drawn(rows: list[ProductReport]) -> list[tuple[str, int | str]]:
    """Return the products to compare noises of: heads by themselves where they are drawn so, else the layer's sum."""
    by_head = any(row.circuit == "ov" and row.head != ALL_HEADS for row in rows)
    return [(row.circuit, row.head) for row in rows if row.circuit == "qk" or by_head == (row.head != ALL_HEADS)]


def _signs(layer: Layer, circuit: str, head: int | str, fold: Fold) -> list[Signs]:
    return signs_of(one_product(layer.weights, circuit, head, fold), layer.index, circuit, head)  # type: ignore[arg-type]


def _verify_filters(rule: Rule, network: Network, index: int, spec: FilterSpec, whole: bool) -> _Found:
    checks, reason = verify_filter_layer(rule, network, index, spec, whole)
    return _Found(index, checks, [Skipped(index, spec.path, "filters", reason)] if reason else [])


def reachable(plan: Plan, weights: HeadWeights, fold: Fold) -> tuple[Plan, bool]:
    """Return what a network can have of a plan: zero where its gain cannot be divided by; and whether that cuts it."""
    by = gains(weights, fold)
    roles = {role: weight for role, weight in plan.weights().items() if role in by and not by[role].usable.all()}
    changes: dict[str, Any] = {
        f"W_{role.upper()}": scaled(role, weight, by[role].usable.astype(float)) for role, weight in roles.items()
    }
    return (replace(plan, **changes, total=None), True) if roles else (plan, False)


def _coarsest(spec: AttentionSpec, tensors: Tensors) -> float:
    """Return the relative rounding error of the coarsest type a layer's weights are stored in."""
    return max(stored_eps(tensors[name]) for slot in spec.slots().values() for name in slot.named(slot.tensor))


class _Product(NamedTuple):
    """One product to judge: as it is, as the initialiser's own draw measures, and the plan it belongs to."""

    layer: Layer
    row: ProductReport
    twin: ProductReport
    plan: Plan
    planned: HeadWeights


def _check(product: _Product, rule: Rule, eps: float, *, closed: bool, settled: bool, whole: bool) -> Check:
    """Judge one product, against what the closed form expects or else what the initialiser's own draw measures.

    ``settled``: whether a draw with gains has the alpha it was brought to.
    """
    layer, row, twin = product.layer, product.row, product.twin
    width, rank = size_of(layer, row)
    if closed:
        expected = Parameters(row.expected_alpha, row.expected_beta)
        tolerance = tolerance_at(expected, width, eps)
    else:
        expected = Parameters(twin.alpha, twin.beta)
        tolerance = tolerance_at(expected, width, eps, drawn=2, rank=rank)
    drawn = next((each for each in product.plan.gains if (each.circuit, each.head) == (row.circuit, row.head)), None)
    if drawn is not None and settled:
        tolerance = settled_alpha(expected, tolerance, eps)
    compared = whole and not math.isnan(row.relative_error)
    limit = max(MATRIX_TOLERANCE, 4 * eps)
    other = compared and row.relative_error > limit
    like = product.planned if closed else None
    problem = _deviation(layer, row, expected, tolerance, rule.fold, like) if other or not compared else ""
    mistake = recognise(layer, row, rule.fold, eps) if problem and closed else ""
    if other:
        as_drawn = "alpha and beta are as expected: another draw, or other options"
        problem = f"||M - A|| / ||A|| is {row.relative_error:.2g}, above {limit:.1g}: {problem or as_drawn}"
        missing = skipped_directions(layer, row, product.planned, rule.fold)
    else:
        missing = empty_directions(layer, row, rule.fold, rank) if closed and not compared and not problem else 0
    if missing and not mistake:
        lacks = f"{missing} of {rank} singular directions hold nothing of what they should"
        problem, mistake = "; ".join(filter(None, (problem, lacks))), "skipped direction"
    if not problem and drawn is not None and not compared:
        problem = gain_problem(layer, row, product.planned, drawn, eps)
    if not problem:
        problem = split_problem(layer, row, product.plan, rule.fold, limit if whole else None)
        mistake = "unbalanced split" if problem else ""
    return Check(
        **{name: getattr(row, name) for name in _ROW_FIELDS},
        expected_alpha=expected.alpha,
        expected_beta=expected.beta,
        alpha_tolerance=tolerance.alpha,
        beta_tolerance=tolerance.beta,
        matrix_error=row.relative_error if whole else math.nan,
        matrix_tolerance=limit if compared else math.nan,
        problem=problem,
        mistake=mistake,
    )


_ROW_FIELDS = (
    *("layer", "name", "circuit", "head", "requested_alpha", "requested_beta", "alpha", "beta"),
    *("requested_kurtosis", "kurtosis"),
)


def _deviation(
    layer: Layer, row: ProductReport, expected: Parameters, tolerance: Tolerance, fold: Fold, like: HeadWeights | None
) -> str:
    """Say which statistic lies outside its tolerance; empty where none does, or none is defined.

    The diagonal's spread is held to that of any draw; of balanced products, where it is evened out, to that of the draw
    ``like``, within six standard errors.
    """
    for name in ("alpha", "beta"):
        measured, wanted, limit = getattr(row, name), getattr(expected, name), getattr(tolerance, name)
        if abs(measured - wanted) > limit:
            return f"{name} is {measured:.4g}, expected {wanted:.4g} ± {limit:.2g}"
    width, rank = size_of(layer, row)
    if like is not None and expected.alpha > 0:
        low, high = spread_limits(width)
        if fold == "balanced":
            drawn = float(diagonal_spread(one_product(like, row.circuit, row.head, fold)))
            error = math.sqrt(2) * balanced_spread_error(width, rank)  # of two draws
            low, high = drawn * (1 - error), drawn * (1 + error)
        measured = float(diagonal_spread(one_product(layer.weights, row.circuit, row.head, fold)))
        if not low <= measured <= high:
            return f"sd(diagonal) sqrt(d) / alpha is {measured:.3g}, expected {low:.2f} to {high:.2f}"
    return ""


def _bias_checks(layer: Layer, plan: Plan, planned: HeadWeights, eps: float, whole: bool) -> list[Check]:
    """Compare the biases an initialiser sets; none where it sets none. Without its draw only those it sets to zero."""
    settled = frozenset(role for role in plan.weights() if whole or role not in plan.biases)
    deviations = list(bias_deviations(layer.weights, planned, settled))
    if not deviations:
        return []
    name, worst = max(deviations, key=lambda pair: pair[1])
    limit = max(MATRIX_TOLERANCE, 4 * eps)
    key = (layer.index, layer.spec.path, "bias", ALL_HEADS)
    problem, mistake = "", ""
    if worst > limit:
        problem = f"{name} is up to {worst:.2g} away from what it is set to"
        mistake = "" if np.any(getattr(planned, name)) else "bias not zero"
    return [Check(*key, matrix_error=worst, matrix_tolerance=limit, problem=problem, mistake=mistake)]
