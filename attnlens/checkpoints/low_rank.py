"""Adapters beside a weight: LoRA and DoRA of loralib, PEFT and kohya's files, and IA3."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.computed import Plan, Values

# Adapters of low rank: ends of the names of A and B, in loralib, PEFT and kohya's files.
_LOW_RANK = re.compile(r"^(?P<stem>.+?)\.(?P<end>lora_A|lora_down)(?P<kind>(\.\w+)?\.weight|)$")
_MERGE = ": merge it (peft's merge_and_unload, loralib's eval()) and save the merged weights without it"

LARGEST_ALPHA = 1e9
"""Below it is the alpha of an adapter's configuration; of JSON an integer may be beyond float64."""


def adapted(stored: Checkpoint, about: Callable[[], Mapping[str, Any]]) -> Checkpoint:
    """Return the weights with what stands beside them merged: W + scale B A, DoRA's magnitudes, IA3's vectors.

    The scale is that of the file (``alpha``, ``scaling``) or of the ``adapter`` that ``about`` holds.
    """
    plan = Plan(stored)
    stated: Any = None
    bases: dict[str, str] = {}
    for name in stored:
        if name.endswith((".base_layer.weight", ".base_layer.bias")):
            own = name.replace(".base_layer.", ".")
            bases[own] = name
            plan.make(own, (name,), stored.shape(name), lambda w: w)
    seen: dict[str, str] = {}
    for name in stored:
        low = _LOW_RANK.match(name)
        target = f"{low['stem']}.weight" if low else ""
        if low and target in seen:
            plan.made.pop(target, None)
            plan.refused[target] = f"has several adapters beside it ({seen[target]}, {name}){_MERGE}"
        elif low:
            seen[target] = name
            stated = about().get("adapter") if stated is None else stated
            config = stated if isinstance(stated, dict) else {}
            _low_rank(plan, low, bases.get(target, target), config)
    for name in stored:
        if ".ia3_l" in name:
            _ia3(plan, name, bases)
    return plan.view("adapters merged")


def _low_rank(plan: Plan, found: re.Match[str], base: str, config: Mapping[str, Any]) -> None:
    """Add scale B A to W; with a magnitude (DoRA) rescale its rows to that length."""
    stored, stem, a = plan.stored, found["stem"], found[0]
    b = f"{stem}.{found['end'].replace('_A', '_B').replace('down', 'up')}{found['kind']}"
    target, layer = f"{stem}.weight", stem
    if base not in stored or b not in stored:
        plan.refused[target] = f"has an adapter {a} beside it, and not all that belongs to it{_MERGE}"
        return
    shape, low, high = stored.shape(base), stored.shape(a), stored.shape(b)
    alpha = next((n for n in (f"{stem}.alpha", f"{stem}.lora_alpha") if n in stored), None)
    scaling = f"{stem}.scaling" if f"{stem}.scaling" in stored else None
    rank = low[0] if low else 0
    scale = _stated_scale(config, layer, rank)
    if alpha is None and scaling is None and scale is None:
        plan.refused[target] = (
            f"has an adapter beside it ({a}, {b}) whose scale alpha / r is not in the file{_MERGE}; a PEFT folder with "
            "its adapter_config.json states the scale"
        )
        return
    turned = bool(config.get("fan_in_fan_out"))
    rows, columns = shape[::-1] if turned and len(shape) == 2 else shape if len(shape) == 2 else (0, 0)
    if rank < 1 or len(low) != 2 or len(high) != 2 or (high[0], high[1], low[1]) != (rows, low[0], columns):
        plan.refused[target] = (
            f"has shape {shape}, and its adapter shapes {high} and {low}, which do not multiply{_MERGE}"
        )
        return
    ends = ("", ".weight", found["kind"].removesuffix(".weight"), found["kind"])
    magnitude = next((n for end in ends if (n := f"{stem}.lora_magnitude_vector{end}") in stored), None)
    extra = scaling or alpha
    parts = (base, a, b, *([extra] if extra else []), *([magnitude] if magnitude else []))
    by_rank = extra == alpha and extra is not None

    def merged(w: Values, a: Values, b: Values, *more: Values) -> Values:
        factor = float(more[0].reshape(-1)[0]) / (rank if by_rank else 1) if extra else scale or 0.0
        change = factor * (b @ a)
        found = w + (change.T if turned else change)
        if not magnitude:
            return found
        lengths = np.sqrt((found * found).sum(axis=0 if turned else 1, keepdims=True))
        return found * more[-1].reshape(lengths.shape) / lengths

    plan.make(target, parts, shape, merged)


def _stated_scale(config: Mapping[str, Any], layer: str, rank: int) -> float | None:
    """Return alpha / r, or alpha / sqrt(r), that an ``adapter_config.json`` states for a layer; None without one."""
    alpha: Any = config.get("lora_alpha")
    patterns = config.get("alpha_pattern")
    for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
        alpha = own if layer == pattern or layer.endswith(f".{pattern}") else alpha
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < LARGEST_ALPHA or rank < 1:
        return None
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _ia3(plan: Plan, name: str, bases: Mapping[str, str]) -> None:
    """Scale rows (and the bias) by an IA3 vector ``[out, 1]``, or columns by one ``[1, in]``."""
    stem = name.partition(".ia3_l")[0]
    target, bias = f"{stem}.weight", f"{stem}.bias"
    base, vector = bases.get(target, target), plan.stored.shape(name)
    if target in plan.refused or base not in plan.stored:
        return
    shape = plan.stored.shape(base)
    already = plan.made.get(target)
    several = already is not None and already.parts != (base,)
    if several or len(shape) != 2 or vector not in ((shape[0], 1), (1, shape[1])):
        plan.refused[target] = f"has an adapter {name} of shape {vector} beside it{_MERGE}"
        return
    plan.make(target, (base, name), shape, lambda w, scale: w * scale)
    own_bias = bases.get(bias, bias)
    if vector == (shape[0], 1) and own_bias in plan.stored:
        plan.make(bias, (own_bias, name), plan.stored.shape(own_bias), lambda b, scale: b * scale[:, 0])
