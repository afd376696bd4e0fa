"""Adapters beside a weight: LoRA and DoRA of loralib, PEFT and kohya's files, and IA3."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnlens.checkpoints.adapter_config import NAMES
from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.computed import Plan, Values
from attnlens.errors import CheckpointError

# Adapters of low rank: ends of the names of A and B, in loralib, PEFT and kohya's files.
_LOW_RANK = re.compile(r"^(?P<stem>.+?)\.(?P<end>lora_A|lora_down)(?P<kind>(\.\w+)?\.weight|)$")
FRONT = "base_model.model."
"""What PEFT puts in front of the names of a model's modules."""
_MERGE = ": merge it (peft's merge_and_unload, loralib's eval()) and save the merged weights without it"


def adapted(stored: Checkpoint, about: Callable[[], Mapping[str, Any]]) -> Checkpoint:
    """Return the weights with what stands beside them merged: W + scale B A, DoRA's magnitudes, IA3's vectors.

    The scale is that of the file (``alpha``, ``scaling``) or of the ``adapter`` that ``about`` holds.
    """
    plan = Plan(stored)
    stated: _Stated | None = None
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
            stated = stated or _Stated(about().get("adapter"))
            _low_rank(plan, low, bases.get(target, target), stated)
    for name in stored:
        if ".ia3_l" in name:
            stated = stated or _Stated(about().get("adapter"))
            _ia3(plan, name, bases, stated.turned)
    return plan.view("adapters merged")


def _low_rank(plan: Plan, found: re.Match[str], base: str, stated: _Stated) -> None:
    """Add scale B A to W; with a magnitude (DoRA) rescale its rows to that length."""
    stored, stem, a = plan.stored, found["stem"], found[0]
    b = f"{stem}.{found['end'].replace('_A', '_B').replace('down', 'up')}{found['kind']}"
    target = f"{stem}.weight"
    if base not in stored or b not in stored:
        plan.refused[target] = f"has an adapter {a} beside it, and not all that belongs to it{_MERGE}"
        return
    shape, low, high = stored.shape(base), stored.shape(a), stored.shape(b)
    alpha = next((n for n in (f"{stem}.alpha", f"{stem}.lora_alpha") if n in stored), None)
    scaling = f"{stem}.scaling" if f"{stem}.scaling" in stored else None
    rank = low[0] if low else 0
    scale = stated.scale(stem, rank)
    if alpha is None and scaling is None and scale is None:
        plan.refused[target] = (
            f"has an adapter beside it ({a}, {b}) whose scale alpha / r is not in the file{_MERGE}; a PEFT folder with "
            "its adapter_config.json states the scale"
        )
        return
    if stated.rank(stem) not in (None, rank):
        plan.refused[target] = f"has an adapter {a} of rank {rank}, where its configuration states another{_MERGE}"
        return
    turned = stated.turned
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


class _Stated:
    """What an ``adapter_config.json`` states of scales, ranks and axes; nothing where there is none."""

    def __init__(self, config: Any) -> None:
        self.config: Mapping[str, Any] = config if isinstance(config, dict) else {}
        self.turned = bool(self.config.get("fan_in_fan_out"))
        self._alphas, self._ranks = (_ByName(self.config.get(key)) for key in ("alpha_pattern", "rank_pattern"))
        if self._alphas.expression is not None:
            raise CheckpointError(
                f"the adapter_config.json states alpha of the modules {self._alphas.expression!r}, and expressions out "
                "of files are not run: merge the adapter (peft's merge_and_unload) and give the merged model"
            )

    def rank(self, layer: str) -> Any:
        """Return the rank PEFT gives a layer; None where it is not stated, or by an expression."""
        return self._ranks.of(layer, self.config.get("r")) if self._ranks.expression is None else None

    def scale(self, layer: str, rank: int) -> float | None:
        """Return alpha / r, or alpha / sqrt(r), of a layer; None where it is not stated."""
        alpha = self._alphas.of(layer, self.config.get("lora_alpha"))
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or rank < 1 or abs(alpha) > sys.float_info.max:
            return None
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)


class _ByName:
    """What a configuration states of modules by their names, or by the ends of these."""

    expression: str | None = None
    """One of its keys that is more than a name."""

    def __init__(self, patterns: Any) -> None:
        self._values: dict[str, tuple[int, Any]] = {}
        for order, (pattern, value) in enumerate(patterns.items() if isinstance(patterns, dict) else ()):
            names = NAMES.fullmatch(pattern)
            if names is None:
                self.expression = pattern
            else:
                self._values.setdefault(names[1].replace("\\", ""), (order, value))

    def of(self, layer: str, otherwise: Any) -> Any:
        """Return, as PEFT does, the first value whose names are the layer's, or its end at a dot."""
        name = layer.rpartition(FRONT)[2]
        ends = (f"^{name}", name, *(name[dot.end() :] for dot in re.finditer(r"\.", name)))
        stated = [self._values[end] for end in ends if end in self._values]
        return min(stated, key=lambda known: known[0], default=(0, otherwise))[1]


def _ia3(plan: Plan, name: str, bases: Mapping[str, str], turned: bool) -> None:
    """Scale rows (and the bias) by an IA3 vector ``[out, 1]``, or columns by one ``[1, in]``.

    Of a weight that is ``turned``, stored ``[in, out]``, columns are the outputs.
    """
    stem = name.partition(".ia3_l")[0]
    target, bias = f"{stem}.weight", f"{stem}.bias"
    base, vector = bases.get(target, target), plan.stored.shape(name)
    if target in plan.refused or base not in plan.stored:
        return
    shape = plan.stored.shape(base)
    already = plan.made.get(target)
    several = already is not None and already.parts != (base,)
    outputs, inputs = (shape[::-1] if turned else shape) if len(shape) == 2 else (0, 0)
    if several or len(shape) != 2 or vector not in ((outputs, 1), (1, inputs)):
        plan.refused[target] = f"has an adapter {name} of shape {vector} beside it{_MERGE}"
        return
    plan.make(target, (base, name), shape, lambda w, scale: w * (scale.T if turned else scale))
    own_bias = bases.get(bias, bias)
    if vector == (outputs, 1) and own_bias in plan.stored:
        plan.make(bias, (own_bias, name), plan.stored.shape(own_bias), lambda b, scale: b * scale[:, 0])
