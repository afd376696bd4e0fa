"""The weights that are measured: random ones of known architectures, and a real model where it is at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from math import prod
from pathlib import Path

import numpy as np

from benchmarks.speed.rows import BASE, GIANT

PARAMETERS = {BASE: 86_567_656, GIANT: 1_012_846_824}
"""Of timm's architectures with their 1000 classes"""


def weights_file(name: str, folder: Path) -> Path | None:
    """Return the file of a model, written into ``folder`` where it is random; None where a real one is not at hand."""
    if name not in PARAMETERS:
        real = Path(os.environ.get("ATTNLENS_TEST_DATA", "")) / f"{name}.safetensors"
        return real if real.is_file() else None
    path = folder / f"{name}.safetensors"
    if not path.is_file():  # by a process of its own: what this one imports would weigh on those it measures
        subprocess.run([sys.executable, "-m", "benchmarks.speed.weights", name, str(path)], check=True)
    return path


def write_state(name: str, path: Path) -> None:
    """Write the state timm draws for an architecture."""
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(timm.create_model(name).state_dict(), path, {"architecture": name})


def write_attention(name: str, path: Path) -> None:
    """Write random weights for what attnlens reads, and zeros for all the rest: hashed with it, never read."""
    from attnlens.models.described import describe_architecture

    shapes = describe_architecture(name).shapes
    rest = PARAMETERS[name] - sum(map(prod, shapes.values()))
    header: dict[str, object] = {"__metadata__": {"architecture": name}}
    end = 0
    for tensor, shape in {**shapes, "other": [rest]}.items():
        start, end = end, end + 4 * prod(shape)
        header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks(shapes):
            file.write(block)
        file.truncate(8 + len(text) + end)


def blocks(shapes: dict[str, list[int]]) -> Iterator[memoryview]:
    """Yield each tensor's bytes: matrices of variance 1/columns, vectors of ones, as norms have them."""
    rng = np.random.default_rng(0)
    for shape in shapes.values():
        matrix = len(shape) > 1
        values = rng.standard_normal(shape, np.float32) * shape[-1] ** -0.5 if matrix else np.ones(shape, np.float32)
        yield np.ascontiguousarray(values, np.float32).data.cast("B")


if __name__ == "__main__":
    chosen, target = sys.argv[1], Path(sys.argv[2])
    (write_state if chosen == BASE else write_attention)(chosen, target)
