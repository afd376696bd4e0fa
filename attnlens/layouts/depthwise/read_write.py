"""The one reader and the one writer of depthwise filters."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import numpy as np

from attnlens.errors import CheckpointError
from attnlens.heads import Array
from attnlens.layouts.depthwise.spec import FilterSpec
from attnlens.layouts.read_write import Tensors, stored_as, widened


def read_filters(spec: FilterSpec, tensors: Tensors) -> Array:
    """Read a layer's filters ``[filter, height, width]`` in float64.

    Raises `CheckpointError` when the tensor has another shape, or holds NaN or Inf.
    """
    stored = tensors[spec.tensor]
    wanted = (spec.filters, 1, *spec.kernel)
    if tuple(stored.shape) != wanted:
        raise CheckpointError(f"{spec.tensor} has shape {tuple(stored.shape)}, not {wanted}: is this the right model?")
    return widened(stored, spec.tensor)[:, 0]


def write_filters(spec: FilterSpec, filters: Array, tensors: MutableMapping[str, Any], bias: Array | None) -> None:
    """Write filters ``[filter, height, width]``, and a bias ``[filter]`` where one is given, in their own dtypes."""
    stored = tensors[spec.tensor]
    stored[:] = stored_as(stored, filters[:, None])
    if bias is not None and spec.bias:
        tensors[spec.bias][:] = stored_as(tensors[spec.bias], np.asarray(bias))
