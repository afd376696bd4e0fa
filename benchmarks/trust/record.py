"""The one file that holds the counts: benchmarks/results/trust.json, an entry a part."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attnlens.atomic import write_text_atomic

RESULTS = Path(__file__).parents[1] / "results" / "trust.json"


def machine(packages: tuple[str, ...] = ("attnlens", "numpy", "torch", "timm", "safetensors")) -> dict[str, Any]:
    """Return where a measurement was made."""
    cpus = len(os.sched_getaffinity(0))
    found = {"machine": platform.machine(), "cpus": cpus, "python": platform.python_version()}
    return found | {name: version(name) for name in packages}


def record(part: str, command: str, seconds: float, counts: dict[str, Any], path: Path = RESULTS) -> None:
    """Replace the entry of one part, leaving the others as they are."""
    known = json.loads(path.read_text()) if path.exists() else {}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    known[part] = {"command": command, "seconds": round(seconds, 1), "time": when, **counts, "made_on": machine()}
    write_text_atomic(path, json.dumps(dict(sorted(known.items())), indent=2) + "\n")
