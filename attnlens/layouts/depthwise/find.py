"""Finding depthwise convolutions in a live module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from attnlens.layouts.depthwise.spec import FilterSpec
from attnlens.layouts.spec import Refusal

if TYPE_CHECKING:
    from torch import nn

STANDARDISED = "each filter is standardised before it acts: its mean and its norm do not count"


def filter_modules(model: nn.Module) -> Iterator[FilterSpec | Refusal]:
    """Describe every depthwise convolution of a model, in module order.

    Depthwise: a `torch.nn.Conv2d` with as many groups as input channels, more than one of them, and a kernel larger
    than 1 x 1; there may be several filters a channel. A layer whose filters are computed from other tensors (a
    parametrisation) is refused.
    """
    from torch import nn

    for path, module in model.named_modules():
        if not isinstance(module, nn.Conv2d) or not 1 < module.in_channels == module.groups:
            continue
        height, width = module.kernel_size
        if height * width == 1:
            continue
        kind = type(module)
        name = f"{kind.__module__}.{kind.__qualname__}"
        stored = dict(module.named_parameters(recurse=False))
        if "weight" not in stored:
            yield Refusal(path, name, "depthwise", "computes its filters from other tensors: nothing is stored as such")
            continue
        prefix = f"{path}." if path else ""
        yield FilterSpec(
            path=path,
            module_class=name,
            tensor=f"{prefix}weight",
            bias=f"{prefix}bias" if "bias" in stored else None,
            filters=module.out_channels,
            channels=module.in_channels,
            kernel=(height, width),
            stride=(module.stride[0], module.stride[1]),
            dilation=(module.dilation[0], module.dilation[1]),
            label=STANDARDISED if any("StdConv2d" in base.__name__ for base in kind.__mro__) else "",
        )


def filter_parameters(module: nn.Module) -> list[str]:
    """Name the parameters that hold a module's depthwise filters, in module order; biases are not among them."""
    return [filters.tensor for filters in filter_modules(module) if isinstance(filters, FilterSpec)]
