"""Depthwise filters told by the shapes of a file's tensors alone: a state dict nobody named the architecture of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from attnlens.layouts.depthwise.spec import FilterSpec

if TYPE_CHECKING:
    from attnlens.checkpoints import Checkpoint

LABEL = "told from tensor shapes: stride is not known, and filters of a single input channel look the same"
_WEIGHT = "weight"


def filters_by_shape(stored: Checkpoint, names: list[str]) -> tuple[FilterSpec, ...]:
    """Describe the tensors that are shaped like depthwise filters, in the order of ``names``.

    ``[filters, 1, height, width]`` with more than one filter and more than one position, under a name that ends in
    "weight". How many filters belong to a channel is not in a file: one is assumed.
    """
    shapes = {name: tuple(stored.shape(name)) for name in names if name.rpartition(".")[2] == _WEIGHT}
    return tuple(_spec(name, shape, stored) for name, shape in shapes.items() if _is_depthwise(shape))


def _is_depthwise(shape: tuple[int, ...]) -> bool:
    return len(shape) == 4 and shape[0] > 1 and shape[1] == 1 and shape[2] * shape[3] > 1


def _spec(name: str, shape: tuple[int, ...], stored: Mapping[str, object]) -> FilterSpec:
    bias = f"{name.removesuffix(_WEIGHT)}bias"
    return FilterSpec(
        path=name.removesuffix(_WEIGHT).removesuffix("."),
        module_class="tensor shapes",
        tensor=name,
        bias=bias if bias in stored else None,
        filters=shape[0],
        channels=shape[0],
        kernel=(shape[2], shape[3]),
        stride=(1, 1),
        dilation=(1, 1),
        label=LABEL,
    )
