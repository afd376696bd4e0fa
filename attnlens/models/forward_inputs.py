"""What to put into a network to follow one forward pass: its own input where it says so, else the usual ones.

Which norm feeds which projection does not depend on the size of the input, so the first input that the network takes
serves. The network is on the meta device here, where a pass costs milliseconds.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attnlens.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import nn

InputSize = int | tuple[int, ...]
_SIDES = (224, 32, 64, 128, 256, 384, 512, 96, 28, 16)
"""Sides of images that are tried where a network states none that it takes."""
_LENGTHS = (8, 16, 64, 77, 128, 196, 197, 256)
"""Lengths of sequences that are tried."""
_STATED = ("img_size", "image_size", "input_size", "input_resolution", "spatial_size")
_MOST_PREFIX = 8
"""Class and register tokens that may stand in front of a position table's grid."""
_WAVE = 64
"""Samples of a wave for each unit of a side."""
_LARGEST = 1 << 16


def forward_inputs(network: nn.Module, input_size: InputSize | None = None) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield inputs for one forward pass of a network on the meta device, the most likely first.

    The layers say whether images, waves, token numbers or tokens of some width go in; ``input_size`` (a side, a length
    or the shape of one item without the batch) leaves no other size. The network is cast to one type: that of its
    first weight, then float32, for code that computes in single precision whatever comes in.
    """
    import torch

    first = next((tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()), torch.float32)
    for dtype in dict.fromkeys((first, torch.float32)):
        network.to(dtype)
        for shape, kind in _shapes(network, input_size, dtype):
            yield tuple(torch.zeros((1, *shape), dtype=kind, device="meta") for _ in range(_arguments(network)))


def check_input_size(input_size: Any) -> InputSize | None:
    """Return an input size that is a positive number or a shape of those; raises `UsageError`."""
    if input_size is None:
        return None
    numbers = (input_size,) if isinstance(input_size, int) else input_size
    sizes = isinstance(numbers, list | tuple) and all(isinstance(n, int) and 0 < n <= _LARGEST for n in numbers)
    if not sizes or not 1 <= len(numbers) <= 4:
        raise UsageError(f"input_size = {input_size!r}: give a side, as 32, or the shape of one input, as (3, 32, 32)")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def _shapes(network: nn.Module, size: InputSize | None, dtype: torch.dtype) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Yield the shape of one item and its type, for each kind of input the layers speak of, in their order."""
    import torch

    layers = [layer for layer in network.modules() if _weight(layer) is not None] or [network]
    seen: set[type] = set()
    for layer in (*layers, layers[0]):
        convolution = isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d)
        embedding = isinstance(layer, torch.nn.Embedding)
        if (convolution or embedding) and type(layer) not in seen:
            seen.add(type(layer))
            kind = dtype if convolution else torch.long
            found = _of_convolution(network, layer, size) if convolution else _of_tokens(network, (), size)
            yield from ((shape, kind) for shape in dict.fromkeys(found))
    weight = _weight(layers[0])
    width = (1 if weight is None else int(weight.shape[-1]),)
    yield from ((shape, dtype) for shape in dict.fromkeys(_of_tokens(network, width, size)))


def _weight(layer: Any) -> torch.Tensor | None:
    """Return the weight that a layer's input meets."""
    found = (getattr(layer, name, None) for name in ("weight", "in_proj_weight", "q_proj_weight"))
    return next((weight for weight in found if getattr(weight, "ndim", 0)), None)


def _of_convolution(network: nn.Module, layer: Any, size: InputSize | None) -> Iterator[tuple[int, ...]]:
    axes, channels = layer.weight.ndim - 2, layer.in_channels
    if isinstance(size, tuple):
        yield size
        return
    sides = [(size, size)] if size else [*_stated_sides(network, layer), *((side, side) for side in _SIDES)]
    for height, side in sides:
        if axes == 1:
            yield from ((channels, side * _WAVE), (side * _WAVE,), (channels, side))
        elif axes == 2:
            yield (channels, height, side)
        else:
            frames = 16 * layer.kernel_size[0]
            yield from ((channels, frames, height, side), (frames, channels, height, side))


def _of_tokens(network: nn.Module, width: tuple[int, ...], size: InputSize | None) -> Iterator[tuple[int, ...]]:
    if isinstance(size, tuple):
        yield size
        return
    stated = [table.shape[-2] for name, table in network.named_parameters() if "pos" in name and table.ndim in (2, 3)]
    for length in [size] if size else [*stated, *_LENGTHS]:
        yield (int(length), *width)


def _stated_sides(network: Any, convolution: Any) -> Iterator[tuple[int, int]]:
    """Yield the sizes a network states: in attributes, in timm's configuration, or by the grid of a position table."""
    config = getattr(network, "pretrained_cfg", None) or {}
    first = (getattr(getattr(network, "patch_embed", None), "img_size", None), config.get("input_size"))
    values = [getattr(module, name, None) for module in network.modules() for name in _STATED]
    for value in (*first, *values):
        sides = value if isinstance(value, tuple | list) and len(value) > 1 else (value, value)
        if all(isinstance(side, int) and 0 < side <= _LARGEST for side in sides[-2:]):
            yield sides[-2], sides[-1]
    for name, table in network.named_parameters():
        for prefix in range(_MOST_PREFIX + 1) if "pos" in name and table.ndim in (2, 3) else ():
            side = math.isqrt(max(table.shape[-2] - prefix, 0))
            if side and side**2 == table.shape[-2] - prefix:
                yield side * convolution.stride[-1], side * convolution.stride[-1]


def _arguments(network: nn.Module) -> int:
    """Count the inputs a forward pass cannot do without."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    given = inspect.signature(network.forward).parameters.values()
    return max(1, sum(one.kind in kinds and one.default is one.empty for one in given))
