"""Mimetic initialisation and its parts: query-key near the identity, value-projection near its negative."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from attnlens.circuits import Fold
from attnlens.inits.plan import ALL_HEADS, Layer, Network, Plan, Request, Rule
from attnlens.inits.products import Columns, Noise, Pair, ov_reason, plan_ov, plan_qk
from attnlens.inits.registry import choose, initialiser, number

_FOLDS = ("raw", "effective")


@initialiser("mimetic")
def mimetic(
    _network: Network,
    *,
    alpha_qk: float = 0.7,
    beta_qk: float = 0.7,
    alpha_ov: float = 0.4,
    beta_ov: float = -0.4,
    columns: Columns = "svd",
    noise: Noise = "normal",
    fold: Fold = "raw",
) -> Rule:
    """Draw each head's QK as alpha Z + beta I cut to its rank, each layer's OV likewise with a negative beta.

    Per head, with a fresh Z: ``alpha_qk Z + beta_qk I = U S V^T``, ``W_Q = U_k sqrt(S_k)``, ``W_K = V_k sqrt(S_k)``;
    per layer: ``alpha_ov Z + beta_ov I = U S V^T``, ``W_V = U sqrt(S)``, ``W_O = sqrt(S) V^T``. Z is i.i.d. with
    variance 1/d. Attention biases are set to zero. Source: Trockman & Kolter, ICML 2023 (arXiv 2305.09828); the default
    numbers are those of public reimplementations.
    """
    qk = (number("alpha_qk", alpha_qk, 0), number("beta_qk", beta_qk))
    ov = (number("alpha_ov", alpha_ov, 0), number("beta_ov", beta_ov))
    return _rule(qk, ov, noise, columns, fold)


@initialiser("qk-only")
def qk_only(
    _network: Network, *, alpha: float = 0.7, beta: float = 0.7, noise: Noise = "normal", fold: Fold = "raw"
) -> Rule:
    """Draw QK as `mimetic` does and leave W_V, W_O and their biases as they are."""
    return _rule((number("alpha", alpha, 0), number("beta", beta)), None, noise, "svd", fold)


@initialiser("ov-only")
def ov_only(
    _network: Network,
    *,
    alpha: float = 0.4,
    beta: float = -0.4,
    columns: Columns = "svd",
    noise: Noise = "normal",
    fold: Fold = "raw",
) -> Rule:
    """Draw OV as `mimetic` does and leave W_Q, W_K and their biases as they are."""
    return _rule(None, (number("alpha", alpha, 0), number("beta", beta)), noise, columns, fold)


ov_positive = initialiser("ov-positive")(partial(ov_only, beta=0.4))
ov_positive.__doc__ = "Draw OV as `ov-only` does with the sign of its diagonal turned: the control for that sign."


def _rule(qk: Pair | None, ov: Pair | None, noise: Noise, columns: Columns, fold: Fold) -> Rule:
    noise = choose("noise", noise, ("normal", "uniform"))
    columns = choose("columns", columns, ("svd", "shuffled"))

    def plan(layer: Layer) -> Plan:
        parts = []
        if qk is not None:
            parts.append(plan_qk(layer, [qk] * layer.weights.num_heads, noise))
        if ov is not None:
            parts.append(plan_ov(layer, ov, noise, columns))
        return merged(*parts)

    def requests(layer: Layer) -> tuple[Request, ...]:
        found = []
        if qk is not None and layer.weights.W_Q.shape[1] == layer.weights.W_K.shape[1]:
            found += [Request("qk", head, *qk) for head in range(layer.weights.num_heads)]
        if ov is not None and not ov_reason(layer):
            found.append(Request("ov", ALL_HEADS, *ov))
        return tuple(found)

    return Rule(plan, choose("fold", fold, _FOLDS), requests)


def merged(*plans: Plan) -> Plan:
    """Put the plans of a layer's two circuits together."""
    whole = Plan()
    for plan in plans:
        given = {name: getattr(plan, name) for name in ("W_Q", "W_K", "W_V", "W_O", "total")}
        whole = replace(
            whole,
            **{name: value for name, value in given.items() if value is not None},
            biases={**whole.biases, **plan.biases},
            requests=whole.requests + plan.requests,
            gains=whole.gains + plan.gains,
            skipped=whole.skipped + plan.skipped,
            notes=whole.notes + plan.notes,
        )
    return whole
