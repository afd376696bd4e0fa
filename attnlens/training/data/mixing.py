"""Mixup, CutMix and stochastic depth: drawn on the CPU from (seed, epoch, purpose), equal for every arm of a seed.

Of images that train with any of them, targets are float32 columns ``[..., item, column]``: the label, the share that is
the item's own (1 without mixing; the rest is that of the item at the mirrored place of its batch), and for each
residual branch of the network what it is multiplied by, layer by layer, attention before MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnlens.training.data.order import generator

if TYPE_CHECKING:
    from torch import Tensor

    from attnlens.training.config import Recipe

SWITCH = 0.5
"""Share of the batches that CutMix mixes where Mixup is on too; timm's default."""


class Unpacked(NamedTuple):
    """Labels ``[..., item]``, the share that is an item's own, and its branches' factors; None where not used."""

    labels: Tensor
    share: Tensor | None
    keep: Tensor | None


def draw_mixing(recipe: Recipe, seed: int, epoch: int, steps: int, size: int) -> dict[str, NDArray[Any]]:
    """Draw, a batch, the share of an item's own and the box that is taken from the mirrored item, as timm's Mixup does.

    lambda ~ Beta(alpha, alpha); CutMix's box has sides sqrt(1 - lambda) of the image's around a uniform centre, is cut
    at the border, and lambda becomes what is left outside. Boxes ``[4, batch]`` are first and last row and column;
    empty for Mixup.
    """
    if not (recipe.mixup or recipe.cutmix):
        return {}
    random = generator(seed, epoch, "mix")
    both = recipe.mixup > 0 and recipe.cutmix > 0
    cut = random.random(steps) < SWITCH if both else np.full(steps, recipe.cutmix > 0)
    alpha = np.where(cut, recipe.cutmix, recipe.mixup)
    share = random.beta(alpha, alpha)
    side = (size * np.sqrt(1 - share)).astype(np.int64)
    centre = random.integers(0, size, (2, steps))
    low, high = np.clip(centre - side // 2, 0, size), np.clip(centre + (side + 1) // 2, 0, size)
    box = np.where(cut, np.stack([low[0], high[0], low[1], high[1]]), 0)
    area = (box[1] - box[0]) * (box[3] - box[2])
    return {"share": np.where(cut, 1 - area / size**2, share), "box": box}


def mixed(images: Tensor, draws: Mapping[str, NDArray[Any]], batch: int) -> Tensor:
    """Return whole batches of uint8 images, each mixed with its mirror image; rounded to uint8, as timm's collation."""
    import torch

    if not draws:
        return images
    parts = images.unflatten(0, (-1, batch))
    other = parts.flip(1)
    own, rest = (
        torch.from_numpy(share.astype(np.float32)).to(images.device).view(-1, 1, 1, 1, 1)
        for share in (draws["share"], 1 - draws["share"])
    )
    top, bottom, left, right = (torch.from_numpy(edge).to(images.device).view(-1, 1, 1, 1, 1) for edge in draws["box"])
    rows = torch.arange(images.shape[-2], device=images.device).view(-1, 1)
    columns = torch.arange(images.shape[-1], device=images.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    blended = (parts.float() * own + other.float() * rest).round().to(torch.uint8)
    cut = (bottom > top) & (right > left)
    return torch.where(inside, other, torch.where(cut | (own == 1), parts, blended)).flatten(0, 1)


def draw_kept(rates: list[float], seed: int, epoch: int, count: int) -> dict[str, NDArray[Any]]:
    """Draw what residual branches are multiplied by, ``[item, branch]``: two a layer, each dropped at the layer's rate.

    0 where it is dropped, else 1 / (1 - rate), as in timm's DropPath.
    """
    if not any(rates):
        return {}
    uniform = generator(seed, epoch, "drop").random((count, 2 * len(rates)), dtype=np.float32)
    rate = np.repeat(np.array(rates, np.float32), 2)
    return {"keep": (uniform >= rate) / (1 - rate)}


def packed(labels: Tensor, draws: Mapping[str, NDArray[Any]], batch: int) -> Tensor:
    """Return targets in the form that this module's docstring describes; labels as they are where nothing is drawn."""
    import torch

    if not draws:
        return labels
    columns = [labels[:, None].float()]
    share = draws.get("share", np.ones(len(labels) // batch)).repeat(batch).astype(np.float32)
    columns.append(torch.from_numpy(share)[:, None].to(labels.device))
    if "keep" in draws:
        columns.append(torch.from_numpy(draws["keep"].astype(np.float32)).to(labels.device))
    return torch.cat(columns, 1)


def unpacked(targets: Tensor, recipe: Recipe) -> Unpacked:
    """Take targets apart again."""
    if not recipe.packs:
        return Unpacked(targets, None, None)
    share = targets[..., 1] if recipe.mixup or recipe.cutmix else None
    return Unpacked(targets[..., 0].long(), share, targets[..., 2:] if recipe.drop_path else None)
