"""What every result file says about the run that made it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

_PACKAGES = ("attnlens", "numpy", "scipy", "timm", "torch", "safetensors")


def run_provenance() -> dict[str, Any]:
    """Return the versions in use and the time, JSON-ready; nothing is imported to find a version."""
    return {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
