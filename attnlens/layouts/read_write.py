"""The one reader and the one writer of every layout."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from attnlens.errors import CheckpointError
from attnlens.heads import Array, HeadWeights, InputNorm
from attnlens.layouts.spec import BATCH_NORM_LEAVES, AttentionSpec, NormSpec, Slot

_WEIGHTS = re.compile(r"b?float(16|32|64|128)|[<>]?f[248]|float8_e[45]m[23]\w*|float8_e3m4")
"""Types of stored numbers that are weights. Integers are codes or masks; E8M0 holds powers of two, which are scales."""
LARGEST = 1e15
"""Largest weight that is read: beyond it the powers that statistics take of products leave float64."""


class Tensors(Protocol):
    """What the reader needs of a checkpoint: arrays by name, in whatever floating type they are stored."""

    def __getitem__(self, name: str, /) -> Any:
        """Return the array of that name."""
        ...


def read_heads(spec: AttentionSpec, tensors: Tensors, layer: int = 0) -> HeadWeights:
    """Read one layer's `HeadWeights` as ``spec`` describes them, in float64.

    Shapes: see `HeadWeights`. A BatchNorm behind a projection is folded in: weight * g / sqrt(var + eps).
    Raises `CheckpointError` when a tensor has another shape than the layout needs, or holds NaN or Inf.
    """
    slots = spec.slots()
    weights = {role: _read_weight(slot, tensors) for role, slot in slots.items()}
    biases = {role: _read_bias(slot, tensors, whole=role == "o") for role, slot in slots.items()}
    norm, own_norms = _norms(spec, tensors)
    return HeadWeights(
        layer=layer,
        name=spec.path,
        W_Q=np.swapaxes(weights["q"], 1, 2),
        W_K=np.swapaxes(weights["k"], 1, 2),
        W_V=np.swapaxes(weights["v"], 1, 2),
        W_O=weights.get("o"),
        b_Q=biases["q"],
        b_K=biases["k"],
        b_V=biases["v"],
        b_O=biases.get("o"),
        norm_gain=norm.gain,
        norm_centres=norm.centres,
        own_norms=own_norms,
        layer_scale=None if spec.layer_scale is None else _vector(tensors, spec.layer_scale),
        scale=spec.scale,
        leaves_out=spec.leaves_out,
    )


def write_heads(spec: AttentionSpec, heads: HeadWeights, tensors: MutableMapping[str, Any]) -> None:
    """Write ``heads`` into the stored arrays of ``tensors`` in place, each in its own dtype.

    The inverse of `read_heads`: ``read(write(heads)) == heads`` for heads the storage type can hold. Only rows and
    columns the layout names are touched. A bias that is None leaves the stored bias as it is; norm gain and
    LayerScale are never written. Arrays may be numpy arrays or torch tensors.
    """
    pairs = {
        "q": (np.swapaxes(heads.W_Q, 1, 2), heads.b_Q),
        "k": (np.swapaxes(heads.W_K, 1, 2), heads.b_K),
        "v": (np.swapaxes(heads.W_V, 1, 2), heads.b_V),
        "o": (heads.W_O, heads.b_O),
    }
    for role, slot in spec.slots().items():
        weight, bias = pairs[role]
        assert weight is not None, f"{spec.path} stores an output projection and the heads hold none"
        _write_weight(slot, weight, tensors)
        if bias is not None and (slot.bias or slot.batch_norm):
            _write_bias(slot, bias, tensors, whole=role == "o")


def _indices(slot: Slot, offset: int) -> Any:
    """Return the index of every (head, unit), shape ``[heads, width]``."""
    group, head = np.divmod(np.arange(slot.heads)[:, None], slot.group or slot.heads)
    start = offset + group * slot.group_stride + head * slot.head_stride
    return start + np.arange(slot.width)[None, :] * slot.unit_stride


def _matrix(tensors: Tensors, name: str) -> Any:
    """Return a stored tensor in two dimensions: trailing 1x1 kernel axes are dropped."""
    stored = tensors[name]
    if stored.ndim < 2 or any(size != 1 for size in stored.shape[2:]):
        raise CheckpointError(f"{name} has shape {tuple(stored.shape)}; a matrix is needed: is this the right model?")
    return stored[(slice(None), slice(None), *[0] * (stored.ndim - 2))]


def _read_weight(slot: Slot, tensors: Tensors) -> Array:
    """Return the slot's weight as ``[head, unit, other side]``, BatchNorm folded in."""
    index = _indices(slot, slot.offset)
    parts = []
    for position, name in enumerate(slot.named(slot.tensor)):
        stored, rows = _matrix(tensors, name), index[_heads_held(slot, position)]
        if rows.max(initial=-1) >= stored.shape[slot.axis]:
            raise CheckpointError(
                f"{name} has shape {tuple(stored.shape)}, too small for {slot.heads} heads of width {slot.width}: "
                "name the architecture this file was made for"
            )
        chosen = _run(rows.ravel())
        flat = stored[chosen] if slot.axis == 0 else stored[:, chosen].T
        parts.append(widened(flat, name).reshape(*rows.shape, -1))
    weight = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if slot.batch_norm:
        gain, _ = _batch_norm(slot, tensors, whole=slot.axis == 1)
        weight = weight * (gain[:, :, None] if slot.axis == 0 else gain)
    return weight


def _run(units: NDArray[np.int_]) -> NDArray[np.int_] | slice:
    """Return the slice that units in a row make, which is a view and no copy; else the units."""
    one_by_one = units.size > 0 and (np.diff(units) == 1).all()
    return slice(int(units[0]), int(units[-1]) + 1) if one_by_one else units


def _write_weight(slot: Slot, weight: Array, tensors: MutableMapping[str, Any]) -> None:
    index = _indices(slot, slot.offset)
    if slot.batch_norm:
        gain, _ = _batch_norm(slot, tensors, whole=slot.axis == 1)
        weight = _divide(weight, gain[:, :, None] if slot.axis == 0 else gain, slot)
    for position, name in enumerate(slot.named(slot.tensor)):
        heads = _heads_held(slot, position)
        stored, flat = _matrix(tensors, name), weight[heads].reshape(-1, weight.shape[-1])
        units = index[heads].ravel()
        if slot.axis == 0:
            stored[units] = stored_as(stored, flat)
        else:
            stored[:, units] = stored_as(stored, flat.T)


def _heads_held(slot: Slot, position: int) -> slice:
    """Return the heads that the slot's tensor number ``position`` holds: one, or all of them."""
    return slice(position, position + 1) if slot.per_head else slice(None)


def _read_bias(slot: Slot, tensors: Tensors, whole: bool) -> Array | None:
    """Return a bias ``[head, unit]``, or ``[out]`` where it is one whole vector; BatchNorm folded in."""
    if not slot.bias and not slot.batch_norm:
        return None
    bias: Any = 0.0
    if slot.bias:
        bias = _per_unit(slot, slot.bias, slot.bias_offset, tensors, whole)
    if slot.batch_norm:
        gain, shift = _batch_norm(slot, tensors, whole)
        bias = bias * gain + shift
    return np.asarray(bias)


def _write_bias(slot: Slot, bias: Array, tensors: MutableMapping[str, Any], whole: bool) -> None:
    """Write a bias; behind a BatchNorm without a bias of its own, the shift goes into the BatchNorm's bias."""
    name, offset = slot.bias, slot.bias_offset
    if slot.batch_norm:
        gain, shift = _batch_norm(slot, tensors, whole)
        if slot.bias:
            bias = _divide(bias - shift, gain, slot)
        else:
            mean = _per_unit(slot, f"{slot.batch_norm}.running_mean", slot.batch_norm_offset, tensors, whole)
            name, offset, bias = f"{slot.batch_norm}.bias", slot.batch_norm_offset, bias + mean * gain
    assert name is not None
    if whole:
        tensors[name][:] = stored_as(tensors[name], bias)
        return
    for position, tensor in enumerate(slot.named(name)):
        heads = _heads_held(slot, position)
        tensors[tensor][_indices(slot, offset)[heads]] = stored_as(tensors[tensor], bias[heads])


def _batch_norm(slot: Slot, tensors: Tensors, whole: bool) -> tuple[Array, Array]:
    """Return a BatchNorm as y = gain * x + shift with gain = w / sqrt(var + eps), shift = b - mean * gain.

    Shapes ``[head, unit]``, or ``[out]`` for the whole vector behind an output projection.
    """
    weight, bias, mean, variance = (
        _per_unit(slot, f"{slot.batch_norm}.{leaf}", slot.batch_norm_offset, tensors, whole)
        for leaf in BATCH_NORM_LEAVES
    )
    gain = weight / np.sqrt(_positive(variance + slot.batch_norm_eps, f"{slot.batch_norm}.running_var"))
    return gain, bias - mean * gain


def _divide(values: Array, gain: Array, slot: Slot) -> Array:
    """Take a BatchNorm's gain out; behind a gain of zero nothing but zero can be written."""
    silent = np.broadcast_to(gain == 0, values.shape)
    if np.any(values[silent]):
        raise CheckpointError(
            f"{slot.batch_norm}.weight is zero for some channels of {slot.tensor}: no weight before it can "
            "make the heads given; set it before writing"
        )
    return np.divide(values, gain, out=np.zeros_like(values), where=~silent)


def _per_unit(slot: Slot, name: str, offset: int, tensors: Tensors, whole: bool) -> Array:
    """Return a stored vector as ``[head, unit]``, or as it is where it belongs to the output side."""
    if whole:
        return _vector(tensors, name)
    parts, index = [], _indices(slot, offset)
    for position, tensor in enumerate(slot.named(name)):
        stored, units = _vector(tensors, tensor), index[_heads_held(slot, position)]
        if units.max(initial=-1) >= stored.size:
            raise CheckpointError(f"{tensor} has {stored.size} entries, too few for {slot.heads} heads of {slot.width}")
        parts.append(stored[units])
    return np.concatenate(parts)


def _norms(spec: AttentionSpec, tensors: Tensors) -> tuple[InputNorm, dict[str, InputNorm]]:
    """Return the norm the layer reads, and apart the norm of each role that reads another one."""
    by_role = {role: spec.norm_of(role) for role in "qkv"}
    layer = next((norm for norm in by_role.values() if norm is not None), None)
    others = {role: _input_norm(norm, tensors) for role, norm in by_role.items() if norm != layer}
    return _input_norm(layer, tensors), others


def _input_norm(norm: NormSpec | None, tensors: Tensors) -> InputNorm:
    """Return gain and centring of a norm: a BatchNorm's gain is weight / sqrt(variance + eps)."""
    if norm is None:
        return InputNorm()
    gain = None if norm.weight is None else _vector(tensors, norm.weight) + norm.gain_offset
    if norm.variance:
        spread = np.sqrt(_positive(_vector(tensors, norm.variance) + norm.eps, norm.variance))
        gain = 1.0 / spread if gain is None else gain / spread
    return InputNorm(gain, centres=norm.kind == "layer")


def _positive(variance: Array, name: str) -> Array:
    if not (variance > 0).all():
        raise CheckpointError(f"{name} holds a variance that is not above 0: this checkpoint is broken")
    return variance


def _vector(tensors: Tensors, name: str) -> Array:
    return widened(tensors[name], name).reshape(-1)


def widened(stored: Any, name: str) -> Array:
    """Widen a numpy array or torch tensor to float64 and refuse NaN and Inf."""
    kind = str(stored.dtype).removeprefix("torch.")
    if not _WEIGHTS.fullmatch(kind):
        raise CheckpointError(
            f"{name} is stored as {kind}: codes and no weights, and no scales that are known stand beside them. Give "
            "the model it was quantised from"
        )
    if not isinstance(stored, np.ndarray):
        stored = stored.detach().cpu().double().numpy()
    values = np.array(stored, dtype=np.float64, order="C")  # never a view of what is read: that may change
    largest = np.maximum(values.max(initial=0.0), -values.min(initial=0.0))
    if not np.isfinite(largest):
        bad = int(values.size - np.isfinite(values).sum())
        raise CheckpointError(
            f"{name} holds {bad} NaN or Inf values of {values.size} read: this checkpoint is broken, "
            "take one from before training diverged"
        )
    if largest > LARGEST:
        raise CheckpointError(f"{name} holds values beyond {LARGEST:.0e}: this checkpoint is broken")
    return values


def stored_as(stored: Any, values: Array) -> Any:
    """Convert float64 values to the type, dtype and device of a stored array."""
    if isinstance(stored, np.ndarray):
        return values.astype(stored.dtype)
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(stored)
