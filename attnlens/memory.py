"""How much memory is free, in words and in bytes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from attnlens.errors import ModelNotFoundError

if TYPE_CHECKING:
    import torch
    from torch import nn

_MEMINFO = Path("/proc/meminfo")
_OF_DEVICE = 0.5
"""Share of a GPU's free memory that a data set may take."""
_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Return the bytes this process can still take, by the kernel and by its control group; None where unknown."""
    found = []
    with suppress(OSError, ValueError, LookupError):
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError, KeyError):  # a container's own limit; the kernel gives files' pages back
        limit, used = (int((_CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        kept = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(kept["inactive_file"]) + int(kept["active_file"]))
    return min(found, default=None)


def fits_on(device: torch.device, size: int) -> bool:
    """Whether a data set of so many bytes, which is in memory, is put on a device: a GPU needs room for training."""
    if device.type == "cpu":
        return True
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return size <= _OF_DEVICE * free


def check_fits(model: nn.Module, what: str) -> None:
    """Raise `ModelNotFoundError` where a network on the meta device would take more memory than is free."""
    size, free = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())), free_memory()
    if free is not None and size > free:
        raise ModelNotFoundError(
            f"{what} is a model of {in_words(size)}, and {in_words(free)} of memory are free: make it smaller"
        )


def in_words(size: float) -> str:
    """Write bytes in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
