"""Codes and scales: the weights that quantised ones stand for, where the rule is public and the scales are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.computed import Plan, Values, widened_codes

DEQUANTISED = "de-quantised by the scales beside the codes"

_SCALES = {"SCB": 127.0, "weight_scale": 1.0, "weight_scale_inv": 1.0, "scale_weight": 1.0}
"""Names of scales beside codes, with what the product is divided by: bitsandbytes, compressed-tensors, DeepSeek."""
_PACKED = {
    "qweight": "is stored as packed codes (GPTQ or AWQ)",
    "weight_packed": "is stored as packed codes (compressed-tensors)",
    "weight.absmax": "is stored as 4-bit codes (bitsandbytes)",
    "weight.quant_map": "is stored as 4-bit codes (bitsandbytes)",
    "codebooks": "is stored as codes of a codebook (AQLM)",
    "weight_scale_2": "is stored as 4-bit codes with scales of two levels",
    "weight_global_scale": "is stored as 4-bit codes with scales of two levels",
    "weight._data": "is stored as codes (quanto)",
}
_ORIGINAL = ": give the model it was quantised from, or de-quantise and save it with the library that wrote it"


def dequantised(stored: Checkpoint, about: Callable[[], Mapping[str, Any]]) -> Checkpoint:
    """Return the weights that codes and the scales beside them stand for: weight = codes * scale, by rows or blocks.

    ``about`` may hold the ``quantization_config`` of the model, which states the size of blocks. Packed codes, and
    scales of which no rule is known, are refused where they are asked for.
    """
    plan = Plan(stored)
    for name in stored:
        leaf = name.rpartition(".")[2]
        module = name.removesuffix(leaf)
        for packed, what in _PACKED.items():
            if f".{name}".endswith(f".{packed}"):
                plan.refused[name.removesuffix(packed) + "weight"] = what + _ORIGINAL
        if leaf not in _SCALES or f"{module}weight" not in stored:
            continue
        codes = f"{module}weight"
        shape, scales = stored.shape(codes), stored.shape(name)
        divisor = _SCALES[leaf]
        if f"{module}weight_scale_2" in stored:
            continue
        quantised = about().get("quantization_config")
        block = quantised.get("weight_block_size") if isinstance(quantised, dict) else None
        sizes = _block_sizes(shape, scales, block)
        if sizes is None:
            plan.refused[codes] = (
                f"has shape {shape} and its {leaf} shape {scales}, of which no rule is known{_ORIGINAL}"
            )
            continue
        parts = (codes, name)
        zero = f"{module}weight_zero_point"
        form = f"{module}weight_format"
        if leaf == "SCB" and (form not in stored or float(widened_codes(stored[form]).max(initial=-1.0)) != 0.0):
            plan.refused[codes] = (
                "is stored as codes with SCB, and without the weight_format 0 beside it by which bitsandbytes says "
                f"that its rows are divided by 127{_ORIGINAL}"
            )
            continue
        if zero in stored and stored.shape(zero) != scales:
            plan.refused[codes] = (
                f"has a zero point of shape {stored.shape(zero)} and its {leaf} shape {scales}, of which no rule is "
                f"known{_ORIGINAL}"
            )
        elif zero in stored:
            plan.make(
                codes,
                (*parts, zero),
                shape,
                lambda w, s, z, n=shape, b=sizes: (w - _spread(z, n, b)) * _spread(s, n, b),
            )
        else:
            plan.make(codes, parts, shape, lambda w, s, n=shape, b=sizes, d=divisor: w * _spread(s, n, b) / d)
        plan.hidden |= {form} if form in stored else set()
    return plan.view(DEQUANTISED)


def _block_sizes(shape: tuple[int, ...], scales: tuple[int, ...], block: Any) -> tuple[int, int] | None:
    """Return the rows and columns of a matrix that share a scale; None where the shapes leave it open."""
    if len(shape) != 2:
        return None
    rows, columns = shape
    if not scales or np.prod(scales) == 1:
        return rows, columns
    if scales in ((rows,), (rows, 1)):
        return 1, columns
    if len(scales) != 2 or 0 in scales:
        return None
    known = (
        block if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block) else None
    )
    fits = (known or [128, 128],)
    for high, wide in fits:
        if (-(-rows // high), -(-columns // wide)) == scales:
            return high, wide
    if known is None and rows % scales[0] == 0 and columns % scales[1] == 0:
        return rows // scales[0], columns // scales[1]
    return None


def _spread(scales: Values, shape: tuple[int, ...], block: tuple[int, int]) -> Values:
    """Return scales of blocks for every entry; the last blocks may be cut, and one block may be of any size."""
    grid = scales.reshape(-1, 1) if scales.ndim < 2 else scales
    for axis, length in enumerate(block):
        grid = grid if grid.shape[axis] == 1 else np.repeat(grid, length, axis)
    return np.broadcast_to(grid[: shape[0], : shape[1]], shape)
