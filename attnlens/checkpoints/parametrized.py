"""Weights that torch computes at each forward pass from stored ones: weight_norm, spectral_norm, masks of pruning."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np

from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.computed import Plan

_PARAMETRIZED = re.compile(r"^(?P<stem>.*\.parametrizations\.\w+)\.(?P<part>.+)$")


def reparametrised(stored: Checkpoint) -> Checkpoint:
    """Return the weights under weight_norm (g v / |v|), spectral_norm (W / u^T W v) and masks of pruning (W * mask)."""
    plan = Plan(stored)
    listed: dict[str, set[str]] = {}
    for name in stored:
        if found := _PARAMETRIZED.match(name):
            listed.setdefault(found["stem"], set()).add(found["part"])
    for name in stored:
        if name.endswith("weight_g") and f"{name[:-1]}v" in stored:
            _weight_norm(plan, name.removesuffix("_g"), name, f"{name[:-1]}v")
        elif ".parametrizations." in name and name.endswith((".original0", ".original")):
            _parametrised(plan, name, listed)
        elif name.endswith("_orig"):
            _wrapped(plan, name.removesuffix("_orig"))
    return plan.view("weight_norm, spectral_norm and masks applied")


def _weight_norm(plan: Plan, target: str, g: str, v: str) -> None:
    """Apply weight = g v / |v|, the norm taken over every axis along which g has one entry."""
    lengths, shape = plan.stored.shape(g), plan.stored.shape(v)
    axes = tuple(axis for axis, size in enumerate(lengths) if size == 1)
    if lengths in ((), (1,)):
        axes = tuple(range(len(shape)))
    elif len(lengths) != len(shape) or any(one not in (1, size) for one, size in zip(lengths, shape, strict=True)):
        plan.refused[target] = (
            f"has lengths {g} of shape {lengths} for {v} of shape {shape}, which do not belong together"
        )
        return
    plan.make(target, (g, v), shape, lambda g, v: g * v / np.sqrt((v * v).sum(axis=axes, keepdims=True)))


def _parametrised(plan: Plan, name: str, listed: Mapping[str, set[str]]) -> None:
    """Apply torch's own parametrizations that are one formula: weight_norm and spectral_norm."""
    stem, _, leaf = name.rpartition(".")
    target, others = stem.replace(".parametrizations.", "."), listed.get(stem, set())
    if leaf == "original0" and others == {"original0", "original1"}:
        _weight_norm(plan, target, name, f"{stem}.original1")
    elif others == {"original", "0._u", "0._v"}:
        _spectral_norm(plan, target, name, f"{stem}.0._u", f"{stem}.0._v")
    else:
        plan.refused[target] = (
            f"is computed from {', '.join(sorted(others))[:100]} by a parametrization that the file does not name: "
            "save the network after torch.nn.utils.parametrize.remove_parametrizations"
        )


def _spectral_norm(plan: Plan, target: str, original: str, u: str, v: str) -> None:
    """Apply weight = W / (u^T W v), as in evaluation: u and v are stored."""
    shape = plan.stored.shape(original)
    if len(shape) < 2 or plan.stored.shape(u) != shape[:1] or plan.stored.shape(v) != (math.prod(shape[1:]),):
        plan.refused[target] = "is under spectral_norm of another axis than the first: remove it before saving"
        return
    plan.make(target, (original, u, v), shape, lambda w, u, v: w / (u @ w.reshape(len(u), -1) @ v))


def _wrapped(plan: Plan, target: str) -> None:
    """Apply what keeps the stored weight as ``_orig``: masks of pruning, torch's older spectral_norm."""
    original, mask, u, v = (f"{target}_{end}" for end in ("orig", "mask", "u", "v"))
    held = {name for name in (mask, u, v) if name in plan.stored}
    if held == {mask} and plan.stored.shape(mask) != plan.stored.shape(original):
        shapes = f"{plan.stored.shape(original)} and {plan.stored.shape(mask)}"
        plan.refused[target] = f"is stored as {original} and {mask} of shapes {shapes}, which do not belong together"
    elif held == {mask}:
        plan.make(target, (original, mask), plan.stored.shape(original), lambda w, m: w * m)
    elif held == {u, v}:
        _spectral_norm(plan, target, original, u, v)
    else:
        plan.refused[target] = f"is stored as {original} and what it is made of is not: save the network's own weights"
