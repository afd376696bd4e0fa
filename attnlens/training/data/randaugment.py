"""RandAugment on the device, whole epochs at once: timm's ``rand-m9-mstd0.5-inc1`` with bilinear resampling.

Two operations an image, each applied with probability 1/2, its magnitude drawn around 9 with standard deviation 0.5.
The fifteen operations are five families, each run once for the images that drew it:

- affine: the output pixel (x, y) is the input at (a x + b y + c, d x + e y + f), bilinear, `FILL` outside;
- blend: degenerate + factor (image - degenerate), clipped, towards grey, the mean, black or a smoothed image;
- pointwise, autocontrast, equalize: a table of 256 values, the last two from the image's own histogram.

Each operation follows Pillow's integer arithmetic and is tested against it. Draws are made on the CPU (`draw`).
Images are ``[image, channel, row, column]`` uint8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
)
AFFINE = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
POINTWISE = ("Invert", "Posterize", "Solarize", "SolarizeAdd")
BLEND = ("Color", "Contrast", "Brightness", "Sharpness")
LAYERS, MAGNITUDE, DEVIATION, PROBABILITY = 2, 9.0, 0.5, 0.5
_CHUNK = 8192
"""Images an operation works on at a time, which bounds its memory."""

Draws = dict[str, NDArray[Any]]


def draw(count: int, random: np.random.Generator) -> Draws:
    """Draw operation (-1 for none) and argument of every image in both layers, ``[2, count]`` each."""
    operation = random.integers(0, len(OPERATIONS), (LAYERS, count))
    level = np.clip(random.normal(MAGNITUDE, DEVIATION, (LAYERS, count)), 0, 10) / 10
    sign = np.where(random.random((LAYERS, count)) < 0.5, -1.0, 1.0)
    applied = random.random((LAYERS, count)) < PROBABILITY
    argument = np.zeros((LAYERS, count))
    for index, name in enumerate(OPERATIONS):
        here = operation == index
        argument[here] = argument_of(name, level[here], sign[here])
    return {"operation": np.where(applied, operation, -1).astype(np.int8), "argument": argument}


def argument_of(name: str, level: NDArray[Any], sign: NDArray[Any]) -> NDArray[Any]:
    """Return what an operation is called with at a level in [0, 1]: degrees, factors, shares, grey values."""
    if name == "Rotate":
        return 30 * level * sign
    if name in ("ShearX", "ShearY"):
        return 0.3 * level * sign
    if name in ("TranslateX", "TranslateY"):
        return 0.45 * level * sign
    if name in BLEND:
        return np.maximum(0.1, 1 + 0.9 * level * sign)
    if name == "Posterize":
        return 4 - np.floor(4 * level)  # bits kept; none at level 1, a black image, which newer Pillows refuse to make
    if name == "Solarize":
        return 256 - np.minimum(256, np.floor(256 * level))
    if name == "SolarizeAdd":
        return np.minimum(128, np.floor(110 * level))
    return np.zeros_like(level)


def apply_draws(images: Tensor, draws: Mapping[str, NDArray[Any]], fill: Tensor) -> Tensor:
    """Return the images after both layers; ``fill`` is a uint8 value a channel."""
    import torch

    images = images.clone()
    for operation, argument in zip(draws["operation"], draws["argument"], strict=True):
        order = np.argsort(operation, kind="stable")  # images by operation, moved to the device once a layer
        where, value = (torch.from_numpy(array).to(images.device) for array in (order, argument[order]))
        ends = np.searchsorted(operation[order], np.arange(len(OPERATIONS) + 1))
        for name, first, last in zip(OPERATIONS, ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            for start in range(first, last, _CHUNK):
                part = slice(start, min(start + _CHUNK, last))
                images[where[part]] = apply(name, images[where[part]], value[part], fill)
    return images


def apply(name: str, images: Tensor, argument: Tensor, fill: Tensor) -> Tensor:
    """Apply one operation to all images, each with its own argument (float64)."""
    if name in AFFINE:
        return affine(images, affine_matrix(name, argument, images.shape[-1], images.shape[-2]), fill)
    if name in BLEND:
        return blend(degenerate(name, images), images, argument)
    if name in POINTWISE:
        return through_table(images, pointwise_table(name, argument)[:, None])
    histogram = histograms(images)
    return through_table(images, autocontrast_table(histogram) if name == "AutoContrast" else equalize_table(histogram))


def affine_matrix(name: str, argument: Tensor, width: int, height: int) -> Tensor:
    """Return ``[image, 2, 3]``: where an output pixel's centre is taken from. Rotation is about the image's centre."""
    import torch

    matrix = torch.zeros(len(argument), 2, 3, dtype=torch.float64, device=argument.device)
    matrix[:, 0, 0] = matrix[:, 1, 1] = 1
    if name == "ShearX":
        matrix[:, 0, 1] = argument
    elif name == "ShearY":
        matrix[:, 1, 0] = argument
    elif name == "TranslateX":
        matrix[:, 0, 2] = argument * width
    elif name == "TranslateY":
        matrix[:, 1, 2] = argument * height
    else:
        angle = -argument * (math.pi / 180)
        cosine, sine = angle.cos(), angle.sin()
        matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 1, 0], matrix[:, 1, 1] = cosine, sine, -sine, cosine
        matrix[:, 0, 2] = width / 2 - cosine * width / 2 - sine * height / 2
        matrix[:, 1, 2] = height / 2 + sine * width / 2 - cosine * height / 2
    return matrix


def affine(images: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Resample bilinearly, edge pixels repeated for half a pixel, ``fill`` beyond; values are truncated to integers."""
    import torch

    _, channels, height, width = images.shape
    rows = torch.arange(height, dtype=torch.float64, device=images.device) + 0.5
    columns = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5
    a, b, c, d, e, f = (value[:, None, None] for value in matrix.flatten(1).unbind(1))
    x = a * columns + b * rows[:, None] + c
    y = d * columns + e * rows[:, None] + f
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    dx, dy = (x - left)[:, None], (y - top)[:, None]
    flat = images.flatten(2)

    def pixel(row: Tensor, column: Tensor) -> Tensor:
        source = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        return flat.gather(2, source.long().flatten(1)[:, None].expand(-1, channels, -1)).view(images.shape).double()

    upper = pixel(top, left) * (1 - dx) + pixel(top, left + 1) * dx
    lower = pixel(top + 1, left) * (1 - dx) + pixel(top + 1, left + 1) * dx
    blended = (upper * (1 - dy) + lower * dy).to(torch.uint8)
    return torch.where(outside[:, None], fill.view(1, -1, 1, 1), blended)


def degenerate(name: str, images: Tensor) -> Tensor:
    """Return what an enhancement blends with: grey, the mean grey, black, or the smoothed image."""
    import torch

    if name == "Brightness":
        return torch.zeros_like(images)
    if name == "Sharpness":
        return smoothed(images)
    grey = luminance(images)
    if name == "Contrast":
        grey = (grey.double().mean((2, 3), keepdim=True) + 0.5).to(torch.uint8)
    return grey.expand_as(images)


def luminance(images: Tensor) -> Tensor:
    """Return (19595 R + 38470 G + 7471 B + 2^15) / 2^16, rounded down, ``[image, 1, row, column]``."""
    import torch

    if images.shape[1] == 1:
        return images
    red, green, blue = images.int().unbind(1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[:, None]


def smoothed(images: Tensor) -> Tensor:
    """Return the mean of each pixel's 3x3 surroundings with weight 5 of 13 at its centre; edge pixels stay."""
    import torch

    wide = images.int()
    rows = wide[..., :-2, :] + wide[..., 1:-1, :] + wide[..., 2:, :]
    total = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * wide[..., 1:-1, 1:-1]
    smooth = images.clone()
    smooth[..., 1:-1, 1:-1] = ((2 * total + 13) // 26).clamp(0, 255).to(torch.uint8)
    return smooth


def blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """Return degenerate + factor (images - degenerate), in float32, truncated and clipped."""
    import torch

    low = degenerate.float()
    return (low + factor.float().view(-1, 1, 1, 1) * (images.float() - low)).clamp(0, 255).to(torch.uint8)


def pointwise_table(name: str, argument: Tensor) -> Tensor:
    """Return the table ``[image, 256]`` of an operation that sees one value at a time."""
    import torch

    value = torch.arange(256, device=argument.device).expand(len(argument), -1)
    argument = argument.long()[:, None]
    if name == "Invert":
        return 255 - value
    if name == "Posterize":
        return torch.where(argument >= 8, value, value & ~((1 << (8 - argument)) - 1))
    if name == "Solarize":
        return torch.where(value < argument, value, 255 - value)
    return torch.where(value < 128, (value + argument).clamp(max=255), value)


def histograms(images: Tensor) -> Tensor:
    """Count the values of each channel, ``[image, channel, 256]``."""
    import torch

    flat = images.flatten(2).long()
    return torch.zeros(*flat.shape[:2], 256, dtype=torch.long, device=images.device).scatter_add_(
        2, flat, torch.ones_like(flat)
    )


def autocontrast_table(histogram: Tensor) -> Tensor:
    """Return the table that stretches the range of values found to 0..255."""
    import torch

    value = torch.arange(256, device=histogram.device)
    present = histogram > 0
    low = torch.where(present, value, 256).amin(-1, keepdim=True)
    high = torch.where(present, value, -1).amax(-1, keepdim=True)
    span = (high - low).double()
    scale = torch.full_like(span, 255.0) / span  # 255.0 / span multiplies by a rounded reciprocal
    stretched = (value * scale - low * scale).long().clamp(0, 255)
    return torch.where(high <= low, value, stretched)


def equalize_table(histogram: Tensor) -> Tensor:
    """Return the table that spreads the values evenly over 0..255, as `PIL.ImageOps.equalize` does."""
    import torch

    value = torch.arange(256, device=histogram.device)
    several = (histogram > 0).sum(-1, keepdim=True) > 1
    last = torch.where(histogram > 0, value, -1).amax(-1, keepdim=True)
    step = (histogram.sum(-1, keepdim=True) - histogram.gather(-1, last)) // 255
    before = histogram.cumsum(-1) - histogram
    spread = ((step // 2 + before) // step.clamp_min(1)).clamp(0, 255)
    return torch.where(several & (step > 0), spread, value)


def through_table(images: Tensor, table: Tensor) -> Tensor:
    """Replace every value by its entry in a table ``[image, channel or 1, 256]``."""
    flat = images.flatten(2).long()
    return table.expand(-1, images.shape[1], -1).gather(2, flat).view(images.shape).to(images.dtype)
