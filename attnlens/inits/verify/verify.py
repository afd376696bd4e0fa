"""Checking a network against an initialiser: by whole matrices where the draw is known, by statistics otherwise."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attnlens.circuits import FactoredProduct, Fold, qk_circuit
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.heads import Array, HeadWeights
from attnlens.inits.apply import make_layer, planned_heads, planned_layers, run_each
from attnlens.inits.caveats import whole_layer_reason
from attnlens.inits.file import METADATA_KEY, params_record
from attnlens.inits.folding import gains, scaled, silent_roles
from attnlens.inits.plan import ALL_HEADS, Layer, Network, Plan, Rule, without_silent
from attnlens.inits.random import Streams
from attnlens.inits.registry import find_initialiser
from attnlens.inits.report import ProductReport, Skipped, describe_option, measure
from attnlens.inits.verify.check import MATRIX_TOLERANCE, Check, stored_eps
from attnlens.inits.verify.filters import verify_filter_layer
from attnlens.inits.verify.mistakes import (
    MISTAKES,
    SAME_DRAW,
    Tolerance,
    clones,
    diagonal_spread,
    off_diagonal_cosine,
    one_product,
    recognise,
    size_of,
    spread_limits,
    tolerance_at,
)
from attnlens.layouts import AttentionSpec
from attnlens.layouts.depthwise import FilterSpec
from attnlens.layouts.read_write import Tensors
from attnlens.models.open import open_model
from attnlens.models.opened import OpenedModel
from attnlens.statistics.inverse import Parameters

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn


@dataclass(frozen=True)
class VerifyReport:
    """What a network's attention or its depthwise filters are, compared with what an initialiser makes of them."""

    model: str
    init: str
    seed: int | None
    options: Mapping[str, Any]
    fold: Fold
    whole: bool
    """Whether whole matrices were compared; else statistics alone."""
    checks: tuple[Check, ...]
    skipped: tuple[Skipped, ...]

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


class Claim(NamedTuple):
    """What a network is said to have been initialised with."""

    init: str
    seed: int | None
    options: dict[str, Any]


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
    an initialiser that draws nothing) every product is compared as a whole matrix; without one by alpha, beta and the
    spread of its diagonal, within the tolerances that `tolerance_at` and `spread_limits` state, filters by their
    covariance. Products that fail are matched with the known `MISTAKES`.

    Raises what `open_model` and the initialiser raise, and `UsageError` where a file's record cannot be followed.
    """
    opened = open_model(model, checkpoint, filters=True, model_args=model_args, input_size=input_size)
    claim = Claim(init, seed, options) if init is not None else recorded(opened, seed, options)
    chosen = find_initialiser(claim.init)
    architecture, tensors = opened.architecture, opened.checkpoint
    network = Network(architecture, tensors, Streams(claim.seed or 0), _builder(model, opened))
    rule = chosen.rule(network, claim.options)
    whole = rule.replays and (claim.seed is not None or not rule.random)
    layers = planned_layers(rule, network, claim.init)
    jobs: list[Callable[[], _Found]] = [partial(_verify_layer, rule, network, *p, whole) for p in layers.attention]
    jobs += [partial(_verify_filters, rule, network, *layer, whole) for layer in layers.filters]
    results = run_each(jobs, tensors, layers.specs())
    checks = _with_repeated_layers([check for result in results for check in result.checks], results)
    skipped = [*layers.refused, *(item for result in results for item in result.skipped)]
    if not checks:
        reason = f": {skipped[0].name} {skipped[0].reason}" if skipped else ""
        raise UnsupportedAttentionError(f"nothing in {opened.name} can be compared with {claim.init!r}{reason}")
    return VerifyReport(
        opened.name, claim.init, claim.seed, claim.options, rule.fold, whole, tuple(checks), tuple(skipped)
    )


def recorded(opened: OpenedModel, seed: int | None, options: dict[str, Any]) -> Claim:
    """Return what the metadata of a file says, `mimetic` where it says nothing.

    Raises `UsageError` where an option was an object that the file could not hold, or parameters have changed.
    """
    text = opened.checkpoint.metadata.get(METADATA_KEY)
    if text is None:
        return Claim("mimetic", seed, options)
    data = json.loads(text)
    resolved = {**data["options"], **options}
    unnamed = [name for name, value in resolved.items() if isinstance(value, str) and value.startswith("<")]
    if unnamed:
        raise UsageError(f"the file was made with {unnamed[0]} = {resolved[unnamed[0]]}: pass that option again")
    made_with = data.get("params")
    given = params_record(resolved.get("params")) if made_with else None
    if given and made_with and given["sha256"] != made_with["sha256"]:
        raise UsageError(
            f"{opened.name} was made with a parameter file {made_with['file']} of another content (sha256 "
            f"{made_with['sha256'][:12]}...): pass that file as --params"
        )
    return Claim(data["init"], data["seed"] if seed is None else seed, resolved)


def _builder(model: Any, opened: OpenedModel) -> Callable[[], nn.Module] | None:
    if model is not None and not isinstance(model, str | os.PathLike | Mapping):
        return lambda: model
    if opened.timm_args is None:
        return None

    def build() -> nn.Module:
        import timm

        return timm.create_model(opened.architecture.name, **(opened.timm_args or {}))

    return build


class _Found(NamedTuple):
    layer: int
    checks: list[Check]
    skipped: list[Skipped]
    first: FactoredProduct | None = None
    """QK of the first head, where heads are drawn: to compare with that of other layers."""


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
    known = not cut and not any(math.isnan(row.expected_alpha) for row in rows)
    twins = rows if known else measure(layer, planned, plan, rule.fold)
    checks = [
        _check(layer, row, twin, rule, closed=not cut and not math.isnan(row.expected_alpha), whole=whole, eps=eps)
        for row, twin in zip(rows, twins, strict=True)
    ]
    biases = _bias_checks(layer, planned, eps) if whole else []
    drawn = any(request.circuit == "qk" and request.alpha > 0 for request in plan.requests)
    if not drawn or (whole and all(check.passed for check in checks)):
        return _Found(index, [*checks, *biases], skipped)
    product = qk_circuit(layer.weights, rule.fold)
    return _Found(index, [*_with_clones(checks, clones(product)), *biases], skipped, product.head(0))


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


def _check(
    layer: Layer, row: ProductReport, twin: ProductReport, rule: Rule, *, closed: bool, whole: bool, eps: float
) -> Check:
    """Judge one product, against what the closed form expects or else what the initialiser's own draw measures."""
    width, _ = size_of(layer, row)
    if closed:
        expected = Parameters(row.expected_alpha, row.expected_beta)
        tolerance = tolerance_at(expected, width, eps)
    else:
        expected = Parameters(twin.alpha, twin.beta)
        tolerance = tolerance_at(expected, width, eps, drawn=2)
    compared = whole and not math.isnan(row.relative_error)
    limit = max(MATRIX_TOLERANCE, 4 * eps)
    problem = ""
    if not compared or row.relative_error > limit:
        problem = _deviation(layer, row, expected, tolerance, rule.fold, spread=closed)
    mistake = recognise(layer, row, rule.fold, eps) if problem and closed else ""
    if compared and row.relative_error > limit:
        as_drawn = "alpha and beta are as expected: another draw, or other options"
        problem = f"||M - A|| / ||A|| is {row.relative_error:.2g}, above {limit:.1g}: {problem or as_drawn}"
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


_ROW_FIELDS = ("layer", "name", "circuit", "head", "requested_alpha", "requested_beta", "alpha", "beta")


def _deviation(
    layer: Layer, row: ProductReport, expected: Parameters, tolerance: Tolerance, fold: Fold, spread: bool
) -> str:
    """Say which statistic lies outside its tolerance; empty where none does, or none is defined."""
    for name in ("alpha", "beta"):
        measured, wanted, limit = getattr(row, name), getattr(expected, name), getattr(tolerance, name)
        if abs(measured - wanted) > limit:
            return f"{name} is {measured:.4g}, expected {wanted:.4g} ± {limit:.2g}"
    width, _ = size_of(layer, row)
    if spread and expected.alpha > 0:
        low, high = spread_limits(width)
        measured = float(diagonal_spread(one_product(layer.weights, row.circuit, row.head, fold)))
        if not low <= measured <= high:
            return f"sd(diagonal) sqrt(d) / alpha is {measured:.3g}, expected {low:.2f} to {high:.2f}"
    return ""


def _bias_checks(layer: Layer, planned: HeadWeights, eps: float) -> list[Check]:
    """Compare the biases an initialiser sets; none where it sets none."""
    deviations: list[float] = []
    for name in ("b_Q", "b_K", "b_V", "b_O"):
        wanted: Array | None = getattr(planned, name)
        have: Array | None = getattr(layer.weights, name)
        if wanted is not None and have is not None:
            deviations.append(float(np.abs(have - wanted).max() / max(1.0, np.abs(wanted).max())))
    if not deviations:
        return []
    worst, limit = max(deviations), max(MATRIX_TOLERANCE, 4 * eps)
    problem = f"a bias is {worst:.2g} away from what it is set to" if worst > limit else ""
    key = (layer.index, layer.spec.path, "bias", ALL_HEADS)
    return [Check(*key, matrix_error=worst, matrix_tolerance=limit, problem=problem)]


def _with_clones(checks: list[Check], clones: list[tuple[int, int, float]]) -> list[Check]:
    """Mark the QK checks of heads that repeat an earlier one."""
    repeated = {head: (first, cosine) for first, head, cosine in clones}
    return [
        _repeated(check, f"head {repeated[int(check.head)][0]}", repeated[int(check.head)][1])
        if check.circuit == "qk" and check.head in repeated
        else check
        for check in checks
    ]


def _with_repeated_layers(checks: list[Check], results: list[_Found]) -> list[Check]:
    """Mark the first heads of layers that repeat the first head of an earlier layer."""
    originals: list[_Found] = []
    repeated: dict[int, tuple[int, float]] = {}
    for result in results:
        if result.first is None:
            continue
        cosines = [(off_diagonal_cosine(result.first, other.first), other.layer) for other in originals if other.first]
        cosine, layer = max(cosines, default=(0.0, -1))
        if cosine > SAME_DRAW:
            repeated[result.layer] = (layer, cosine)
        else:
            originals.append(result)
    return [
        _repeated(check, f"layer {repeated[check.layer][0]}", repeated[check.layer][1])
        if (check.circuit, check.head) == ("qk", 0) and check.layer in repeated
        else check
        for check in checks
    ]


def _repeated(check: Check, what: str, cosine: float) -> Check:
    problem = f"its off-diagonal is that of {what}: cosine {cosine:.2f}"
    return replace(check, problem="; ".join(filter(None, (check.problem, problem))), mistake="cloned heads")
