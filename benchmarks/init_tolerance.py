"""Spread of one draw around the closed form, which the tolerances of `verify-init` stand on.

    OMP_NUM_THREADS=1 python -m benchmarks.init_tolerance

Writes benchmarks/results/init_tolerance.json in about a minute: for each width, rank and request, mean and standard
deviation over n draws, truncated by exact eigenvectors, of (alpha - expected) d / expected alpha, of (beta - expected)
d / expected alpha, and of sd(diagonal) sqrt(d) / alpha.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from attnlens.atomic import write_text_atomic
from attnlens.inits.report import expected_at
from attnlens.provenance import run_provenance

RESULTS = Path(__file__).parent / "results" / "init_tolerance.json"
SIZES = ((48, 16), (48, 8), (96, 32), (192, 64), (192, 12), (192, 192), (384, 64), (384, 16), (384, 384))
REQUESTS = ((0.7, 0.7), (0.4, -0.4), (0.1, 1.0), (1.0, 0.1), (1.0, 0.0), (0.03, 0.4), (9.7, 0.7))
DRAWS = 24


def measure(size: int, rank: int, alpha: float, beta: float, generator: torch.Generator) -> dict[str, object]:
    expected = expected_at(alpha, beta, rank, size)
    noise = torch.randn(DRAWS, size, size, generator=generator, dtype=torch.float64) / size**0.5
    A = alpha * noise + beta * torch.eye(size, dtype=torch.float64)
    basis = torch.linalg.eigh(A.mT @ A).eigenvectors[..., -rank:]
    M = (A @ basis) @ basis.mT
    diagonal = M.diagonal(dim1=-2, dim2=-1)
    found = (((M**2).sum((-2, -1)) - (diagonal**2).sum(-1)) / (size - 1)).sqrt()
    values = {
        "alpha": (found / expected.alpha - 1) * size,
        "beta": (diagonal.mean(-1) - expected.beta) * size / expected.alpha,
        "diagonal_spread": diagonal.std(-1) * size**0.5 / found,
    }
    row: dict[str, object] = {"embed_dim": size, "head_dim": rank, "request": [alpha, beta], "n": DRAWS}
    for name, value in values.items():
        row[name] = {"mean": round(float(value.mean()), 3), "sd": round(float(value.std()), 3)}
    return row


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [measure(*size, *request, generator) for size in SIZES for request in REQUESTS]
    worst = {
        name: {kind: max(abs(row[name][kind]) for row in rows) for kind in ("mean", "sd")}  # type: ignore[index]
        for name in ("alpha", "beta", "diagonal_spread")
    }
    result = {"command": "OMP_NUM_THREADS=1 python -m benchmarks.init_tolerance", **run_provenance()}
    write_text_atomic(RESULTS, json.dumps({**result, "largest": worst, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
