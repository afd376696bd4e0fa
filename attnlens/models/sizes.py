"""Sizes of a timm architecture that a file's own shapes show: depth, widths, patch, tokens in front, window.

Somebody who trains a named architecture at another size keeps its names. What the shapes of the file show and the named
network has otherwise becomes an argument of the architecture. How many heads a width has no shape shows, except where a
table of relative positions has a column for each.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from attnlens.errors import AttnlensError, UsageError
from attnlens.models.architecture import check_model_args
from attnlens.models.bounded import names_bounded

Shapes = Mapping[str, tuple[int, ...]]


def shown_arguments(name: str, given: dict[str, Any], stored: Shapes) -> dict[str, Any] | None:
    """Return the arguments that build timm's ``name`` as the file's shapes show it; ``given`` ones are kept.

    None where the file has names in its blocks that the network would not have: it is of another architecture. Raises
    `UsageError` where the width is another one and nothing says the number of heads.
    """
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    accepted = inspect.signature(type(model).__init__).parameters
    shown: dict[str, Any] = {}
    for argument, measure in _MEASURES.items():
        found, named = measure(stored), measure(own)
        if argument in accepted and argument not in given and None not in (found, named) and found != named:
            shown[argument] = found
    if "img_size" in accepted and "img_size" not in given:
        side = _image_side(stored, own, model)
        shown |= {"img_size": side} if side is not None else {}
    if "embed_dim" in shown and not {"num_heads"} & {*shown, *given}:
        raise UsageError(
            f"the file is {shown['embed_dim']} wide, {name} {_embed_dim(own)}, and shapes do not say how many heads it "
            "has: add --model-arg num_heads=N"
        )
    if shown.get("class_token") is False and "global_pool" in accepted:
        shown["global_pool"] = "avg"
    arguments = check_model_args({**given, **shown}, name)
    if not shown:
        return None
    sized = _names(name, json.dumps(arguments, sort_keys=True))
    if sized is None:
        return None
    stacks = {key.partition(".")[0] for key in own if re.search(r"\.\d+\.", key)}
    strange = [key for key in stored if key.partition(".")[0] in stacks and key not in sized]
    return None if strange else arguments


@cache
def _names(name: str, arguments: str) -> set[str] | None:
    """Return the names of a network's tensors; None where its constructor does not take the sizes, or for too long."""
    try:
        return names_bounded(name, json.loads(arguments))
    except AttnlensError:
        return None


def in_words(arguments: dict[str, Any], given: dict[str, Any]) -> dict[str, str]:
    """Say, for the provenance, which arguments the shapes have shown."""
    shown = ", ".join(f"{key}={value}" for key, value in arguments.items() if key not in given)
    return {"sizes": f"shown by the shapes: {shown}"} if shown else {}


def _embed_dim(shapes: Shapes) -> int | None:
    return _at(shapes, "patch_embed.proj.weight", 0)


def _at(shapes: Shapes, name: str, axis: int) -> int | None:
    """Return a size of a tensor, None where it is not there or has no such axis."""
    shape = shapes.get(name, ())
    return shape[axis] if -len(shape) <= axis < len(shape) else None


def _square(shapes: Shapes, name: str) -> int | None:
    """Return the side of a square convolution."""
    shape = shapes.get(name, ())
    return shape[-1] if len(shape) == 4 and shape[-1] == shape[-2] else None


def _depth(shapes: Shapes) -> int | None:
    """Return how many blocks stand in one row, None where they stand in stages."""
    return len({found[1] for key in shapes if (found := re.match(r"blocks\.(\d+)\.", key))}) or None


def _depths(shapes: Shapes) -> tuple[int, ...] | None:
    """Return how many blocks each stage has."""
    found = {
        (int(m[2]), int(m[3])) for key in shapes if (m := re.match(r"(layers|stages)\.(\d+)\.blocks\.(\d+)\.", key))
    }
    stages = sorted({stage for stage, _ in found})
    return tuple(sum(one == stage for one, _ in found) for stage in stages) or None


def _windows(shapes: Shapes, axis: int) -> list[int]:
    """Return a size of the first table of relative positions of each stage."""
    names = sorted((n for n in shapes if n.endswith("blocks.0.attn.relative_position_bias_table")), key=_numbers)
    return [shapes[name][axis] for name in names]


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


def _window_size(shapes: Shapes) -> int | None:
    """Return w of the largest table of (2w - 1)^2 relative positions: small last stages have a smaller window."""
    rows = max(_windows(shapes, 0), default=0)
    return (math.isqrt(rows) + 1) // 2 or None


def _present(name: str) -> Callable[[Shapes], bool]:
    return lambda shapes: name in shapes


_MEASURES: dict[str, Callable[[Shapes], Any]] = {
    "depth": _depth,
    "depths": _depths,
    "embed_dim": _embed_dim,
    "patch_size": lambda shapes: _square(shapes, "patch_embed.proj.weight"),
    "in_chans": lambda shapes: _at(shapes, "patch_embed.proj.weight", 1),
    "qkv_bias": lambda shapes: (
        any(re.search(r"attn\.(q|k|v|qkv)(_proj|_bias|\.bias)", key) for key in shapes)
        if any(key.endswith("attn.qkv.weight") for key in shapes)
        else None
    ),
    "reg_tokens": lambda shapes: _at(shapes, "reg_token", 1) or 0,
    "class_token": _present("cls_token"),
    "qk_norm": lambda shapes: any(key.endswith("attn.q_norm.weight") for key in shapes),
    "init_values": lambda shapes: 1e-5 if "blocks.0.ls1.gamma" in shapes else 0.0,
    "window_size": _window_size,
    "num_heads": lambda shapes: tuple(_windows(shapes, 1)) or None,
}
"""Argument of an architecture -> what a set of shapes says of it, None where it says nothing."""


def _image_side(stored: Shapes, own: Shapes, model: Any) -> int | None:
    """Return the side of images the position table is for; None where it is that of ``model``, or says nothing."""
    embed: Any = getattr(model, "patch_embed", None)
    tokens, expected = _at(stored, "pos_embed", -2), _at(own, "pos_embed", -2)
    patch, grid = _square(stored, "patch_embed.proj.weight"), getattr(embed, "num_patches", None)
    if tokens is None or expected is None or patch is None or grid is None:
        return None
    in_front = ("cls_token" in stored) + (_at(stored, "reg_token", 1) or 0) if expected > grid else 0
    side = math.isqrt(tokens - in_front) if tokens > in_front else 0
    same = side * patch == embed.img_size[-1]
    return side * patch if side and side**2 == tokens - in_front and not same else None
