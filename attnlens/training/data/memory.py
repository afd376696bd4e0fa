"""How much memory is free, in words and in bytes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
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


def in_words(size: float) -> str:
    """Write bytes in MB or GB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
