"""Measuring which stack size trains fastest on the device at hand."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from attnlens.training.config import Config, Run
from attnlens.training.data.on_device import Dataset, Resident
from attnlens.training.engine import Stack
from attnlens.training.hardware import fixed_attention, free_again
from attnlens.training.networks.base import Wiring
from attnlens.training.trainer import epochs_of, resident_on, units_of

if TYPE_CHECKING:
    import torch

_WARM, _TIMED = 3, 10


class _Kind(NamedTuple):
    """What units of one kind have in common: how many models, on how many data sets, how they are wired."""

    models: int
    sets: int
    wiring: Wiring


def fastest_stack(config: Config, wirings: Mapping[str, Wiring], data: Dataset, device: torch.device) -> int:
    """Return the stack size with the highest measured rate: one run, all arms of a seed, or all arms of several.

    Measured on what a comparison of that size does: its own data, on the device, its own epochs, every architecture
    among its arms. A size whose memory does not suffice is none.
    """
    arms = len(config.arms)
    sizes = sorted({1, arms, *(arms * seeds for seeds in range(2, config.seeds + 1) if config.seeds % seeds == 0)})
    resident = resident_on(data, config, device)
    with fixed_attention(config):
        rates = {size: stack_rate(config, size, wirings, resident, device) for size in sizes}
    return max(rates, key=lambda size: rates[size])


def stack_rate(config: Config, size: int, wirings: Mapping[str, Wiring], data: Resident, device: torch.device) -> float:
    """Return items/s over all runs of a comparison, from a few steps of every kind of unit; 0 when out of memory.

    What was compiled for one size is forgotten before the next, so that each has static graphs of its own.
    """
    import torch

    runs = [Run(arm, seed, config.recipe.lr) for seed in range(config.seeds) for arm in config.arms]
    units = units_of(runs, size, lambda run: wirings[run.arm])
    kinds = Counter(_Kind(len(unit), len({run.seed for run in unit}), wirings[unit[0].arm]) for unit in units)
    try:
        stacks = {kind: Stack(config, kind.models, device, wiring=kind.wiring) for kind in kinds}
        seconds = sum(count * _step_seconds(stacks[kind], kind, data) for kind, count in kinds.items())
    except torch.OutOfMemoryError:
        return 0.0
    finally:
        stacks = {}
        free_again(device)
    return len(runs) * config.recipe.batch_size / seconds


def _step_seconds(stack: Stack, kind: _Kind, data: Resident) -> float:
    """Return the seconds of a step, after a few, and with what a first epoch and an evaluation hold in memory."""
    import torch

    config, device = stack.config, stack.device
    batch = config.recipe.batch_size
    drawn = epochs_of(data, list(range(config.data_seed, config.data_seed + kind.sets)), 0)
    where = torch.arange(kind.models, device=device) % kind.sets
    state = dict(config.network.build(0, kind.wiring).state_dict())
    stack.load([state] * kind.models, [config.recipe.lr] * kind.models, _WARM + _TIMED)
    steps = data.count // batch

    def step(number: int) -> None:
        part = slice(number % steps * batch, (number % steps + 1) * batch)
        stack.step(drawn.inputs[:, part], drawn.targets[:, part], where)

    stack.evaluate(data.test_inputs, data.test_targets[: 2 * batch])
    for number in range(_WARM):
        step(number)
    stack.take_losses(_WARM)  # waits for the device
    began = time.perf_counter()
    for number in range(_TIMED):
        step(number)
    stack.take_losses(_TIMED)
    return (time.perf_counter() - began) / _TIMED
