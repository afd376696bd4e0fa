"""Marks on checks of products: heads that repeat one another, noise that was used before."""

from __future__ import annotations

from dataclasses import replace

from attnlens.circuits import Fold, ov_circuit, qk_circuit
from attnlens.inits.plan import ALL_HEADS, Layer
from attnlens.inits.verify.check import Check
from attnlens.inits.verify.mistakes import clones
from attnlens.inits.verify.reuse import Reuse


def with_clones(checks: list[Check], layer: Layer, fold: Fold) -> list[Check]:
    """Mark the checks of heads that repeat an earlier one of their layer and circuit."""
    repeated: dict[tuple[str, int | str], str] = {}
    for circuit, stack in (("qk", qk_circuit), ("ov", ov_circuit)):
        if any(check.circuit == circuit and check.head != ALL_HEADS for check in checks):
            for first, head, cosine in clones(stack(layer.weights, fold)):
                repeated[circuit, head] = f"its off-diagonal is that of head {first}: cosine {cosine:.2f}"
    places = [(check.circuit, check.head) for check in checks]
    return [
        _named(check, repeated[place], "cloned heads") if place in repeated else check
        for check, place in zip(checks, places, strict=True)
    ]


def with_reuse(checks: list[Check], reuses: list[Reuse]) -> list[Check]:
    """Mark the checks of products whose noise is that of another layer or circuit."""
    by_place = {(each.product.layer, each.product.circuit, each.product.head): each for each in reuses}
    marked = []
    for check in checks:
        each = by_place.get((check.layer, check.circuit, check.head))
        if each is not None:
            of = f"layer {each.of.layer}, {each.of.circuit} {each.of.head}"
            problem = f"its noise is that of {of}: its signs correlate by {each.correlation:.2f}"
            marked.append(_named(check, problem, "reused noise"))
        else:
            marked.append(check)
    return marked


def _named(check: Check, problem: str, mistake: str) -> Check:
    return replace(check, problem="; ".join(filter(None, (check.problem, problem))), mistake=check.mistake or mistake)
