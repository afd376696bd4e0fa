"""One model of a scan: measured through `inspect`, told as plain data. Also the process that does so for the parent."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any

from attnlens.errors import AttnlensError
from attnlens.printable import printable
from attnlens.scans.plan import Job
from attnlens.scans.tables import Result, layer_records
from attnlens.threads import limited_to


@dataclass(frozen=True)
class Settings:
    """What is measured of every model, and how its weights are reached."""

    fold: str = "both"
    offline: bool = False
    remote: bool = False
    num_heads: int | None = None
    row_order: str | None = None


def measure(job: dict[str, Any], settings: dict[str, Any], cores: int) -> Result:
    """Inspect one model; whatever is wrong with it becomes the result ``{"status": "failed", "error": one line}``."""
    from attnlens.arguments import as_options
    from attnlens.inspection import inspect, need_attention

    asked, how = Job(**job), Settings(**settings)
    start = time.perf_counter()
    try:
        with limited_to(cores):
            found = need_attention(inspect(asked.model, asked.checkpoint, **asdict(how)), "a scan")
    except AttnlensError as error:
        with as_options():  # a file is read by whoever: `Scan.failed` says arguments
            return failed(str(error))
    except Exception as error:  # noqa: BLE001  # one model, however broken, must not stop the others
        return failed(f"internal error, {type(error).__name__}: {error}")
    specs = [spec for _, spec in found.specs]
    architecture = found.provenance["architecture"]
    return {
        "status": "ok",
        "architecture": architecture,
        "group": group_of(architecture),
        "depth": found.depth,
        "layers": len(specs),
        "heads": span([spec.q.heads for spec in specs]),
        "head_dim": span([spec.q.width for spec in specs]),
        "folds": list(found.folds),
        "leaves_out": " ".join(dict.fromkeys(flag for spec in specs for flag in spec.leaves_out)),
        "labels": list(dict.fromkeys(spec.label for spec in specs if spec.label)),
        "refused": len(found.refused),
        "seconds": round(time.perf_counter() - start, 3),
        "provenance": found.provenance,
        "table": layer_records(found.stats, found.depth),
        "csv": found.stats.to_csv(),
    }


def failed(error: str) -> Result:
    """Return the result of a model that could not be measured."""
    return {"status": "failed", "error": printable(" ".join(error.split()))}


def span(values: list[int]) -> str:
    """Write one value as itself, several as the least and the greatest."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def group_of(architecture: str) -> str:
    """Return the family in an architecture's name: its first word, without a version number.

    >>> group_of("swinv2_tiny_window8_256"), group_of("eva02_tiny_patch14_224"), group_of("llama")
    ('swin', 'eva', 'llama')
    """
    first = re.split(r"[_-]", architecture, maxsplit=1)[0].lower()
    return re.sub(r"v?\d+$", "", first) or first


def main() -> None:
    """Serve a parent process: a JSON job a line on stdin, a JSON result a line on stdout.

    Stdin is watched while a job runs, so that a worker never outlives a parent that was killed.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not mix with the answers
    jobs: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            jobs.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        answers.write(json.dumps(measure(**json.loads(jobs.get()))) + "\n")
        answers.flush()
