"""Tensors inside what training scripts save: dictionaries in dictionaries, pickled modules, scripted modules."""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from attnlens.checkpoints.pickled_data import Inert, TensorRef
from attnlens.errors import CheckpointError

DEEPEST = 12
"""Levels that are looked into for weights."""
_MOST_HOLDERS = 100_000
_NOT_WEIGHTS = ("optim", "sched", "exp_avg", "grad", "scaler", "loss")
"""Beginnings of keys under which a training script keeps tensors that are no network's."""


def parts_of(value: Any) -> Mapping[Any, Any]:
    """Return what a dictionary, a pickled module or a scripted one holds, by name; empty for anything else."""
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, Inert):
        return {}
    own = value.attributes()
    if "_modules" not in own:
        return value.items or own
    held = (own.get(kind) for kind in ("_modules", "_buffers", "_parameters"))
    return ChainMap(*(part for part in held if isinstance(part, dict)))  # a view: a module may be reached many times


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor, or stands for one of a kind that is not read."""
    if isinstance(value, Inert):
        return "ensor" in value.name.rpartition(" ")[2]
    return isinstance(value, TensorRef) or (hasattr(value, "dtype") and hasattr(value, "shape"))


def named_tensors(root: Any, room: float = math.inf) -> tuple[dict[str, Any], dict[str, str]]:
    """Return every tensor by its dotted name, and of each name the keys in front of the state dict it stands in.

    Raises `ValueError` where the names have more than ``room`` characters: a pickle may say one long key once and use
    it in many dictionaries. Raises `CheckpointError` where a name is that of two tensors.
    """
    found: dict[str, Any] = {}
    keys: dict[str, str] = {}
    waiting: list[tuple[str, str, Any, int]] = [("", "", root, 0)]
    seen: set[int] = set()
    while waiting:
        prefix, outer, value, depth = waiting.pop()
        if id(value) in seen or depth > DEEPEST or len(seen) > _MOST_HOLDERS:
            continue
        seen.add(id(value))
        inner: list[tuple[str, str, Any, int]] = []
        for key, part in parts_of(value).items():
            room -= len(prefix) + (len(key) if isinstance(key, str) else 20)
            if room < 0:
                raise ValueError("its keys make names of more characters than it has bytes")
            name = f"{prefix}{key}"
            if _is_tensor(part):
                if found.setdefault(name, part) is not part:
                    raise CheckpointError(f"{name} names two tensors, by keys in keys and by a key with dots: keep one")
                keys[name] = outer
            elif parts_of(part) and not (isinstance(value, Mapping) and str(key).lower().startswith(_NOT_WEIGHTS)):
                inside = f"{name}." if isinstance(value, Mapping) or not depth else outer
                inner.append((f"{name}.", inside, part, depth + 1))
        waiting.extend(reversed(inner))
    return found, keys
