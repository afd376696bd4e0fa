"""The closed form's width and shares in trained networks: what a start without parameters is drawn from."""

from __future__ import annotations

from typing import NamedTuple

from attnlens.filters.closed_form import Shape, side, within_range
from attnlens.layouts.depthwise.spec import Kernel


class Relative(NamedTuple):
    """A `Shape` free of kernel size: ``relative_s`` is s / side^2, the centre is the kernel's."""

    relative_s: float
    blur: float
    slope: float
    contrast: float

    def at(self, kernel: Kernel) -> Shape:
        """Return the shape for a kernel, its width within the range a width can be told in."""
        width = within_range(self.relative_s * side(kernel) ** 2, kernel)
        return Shape(width, self.blur, self.slope, self.contrast)


STRIDE_1 = Relative(0.06, 0.13, 0.13, 0.34)
STRIDED = Relative(0.08, 0.66, 0.15, 0.02)
"""Medians, to two digits, over four networks of each one's median layer: EfficientNet-Lite0 (16 layers) and MobileNetV2
(17), trained on ImageNet, and the detector and the recogniser of PP-OCRv4 (PP-LCNet, 14 layers each). In all four,
layers of stride above 1 smooth, and the others hold a centre against its surround; docs/filters.md has the numbers."""


def trained_shape(strided: bool) -> Relative:
    """Return the width and the shares that layers of stride 1, or above, have in trained networks."""
    return STRIDED if strided else STRIDE_1
