"""Measuring which stack size trains fastest on the device at hand."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from attnlens.training.config import Config
from attnlens.training.engine import Stack

if TYPE_CHECKING:
    import torch

_WARM, _TIMED = 3, 10


def stack_rate(config: Config, models: int, device: torch.device) -> float:
    """Return items/s, summed over a stack's models, of a few training steps on random data; 0 when out of memory.

    The network is the plain one, whatever arms are wired otherwise.
    """
    import torch

    network, batch = config.network, config.recipe.batch_size
    state = dict(network.build(0).state_dict())
    random = network.example(batch, torch.Generator().manual_seed(0))
    inputs, targets = (part[None].to(device) for part in random)
    where = torch.zeros(models, dtype=torch.long, device=device)
    try:
        stack = Stack(config, models, device)
        stack.load([state] * models, [config.recipe.lr] * models, _WARM + _TIMED)
        for _ in range(_WARM):
            stack.step(inputs, targets, where)
        stack.take_losses(_WARM)  # waits for the device
        began = time.perf_counter()
        for _ in range(_TIMED):
            stack.step(inputs, targets, where)
        stack.take_losses(_TIMED)
    except torch.OutOfMemoryError:
        return 0.0
    return models * batch * _TIMED / (time.perf_counter() - began)


def fastest_stack(config: Config, device: torch.device) -> int:
    """Return the stack size with the highest measured rate: one run, all arms of a seed, or all arms of several."""
    arms = len(config.arms)
    sizes = sorted({1, arms, *(arms * seeds for seeds in range(2, config.seeds + 1) if config.seeds % seeds == 0)})
    rates = {size: stack_rate(config, size, device) for size in sizes}
    return max(rates, key=lambda size: rates[size])
