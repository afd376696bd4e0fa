"""Spreading work over the processes torchrun starts: every process takes each world-size-th unit, all share records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Spread:
    """One process among all; the only one without torchrun."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    """How many of them run on this host."""

    @property
    def leads(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Return this process's items: a fixed choice, whatever has been done already."""
        return list(items[self.rank :: self.world])

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of ranks; waits for all."""
        if self.world == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values


@contextmanager
def spread() -> Iterator[Spread]:
    """Join the processes torchrun started (its environment variables), over gloo on the CPU: only records are sent."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Spread()
        return
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=14))
    try:
        local_rank, local_world = (int(os.environ.get(f"LOCAL_{name}", "0")) for name in ("RANK", "WORLD_SIZE"))
        yield Spread(distributed.get_rank(), distributed.get_world_size(), local_rank, local_world)
    finally:
        distributed.destroy_process_group()
