"""Measure how far `attnlens.statistics.inverse` is from fresh draws, and how long a call takes.

    OMP_NUM_THREADS=1 python -m benchmarks.inverse

writes `benchmarks/results/inverse.json` in about four minutes on one core. Two parts:
- `realised`: draws over a grid of width, kept share and alpha/beta (a negative ratio draws with negative beta), each
  draw serving every head_dim, against the closed form;
- `request`: targets at fractions of the highest identity cosine the rank allows, solved, drawn and measured end to end.
Errors, standard errors and single-draw spreads are percent of max(|alpha|, |beta|) of the realised pair.
"""

import json
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from attnlens.statistics.inverse import Parameters, realised, request

DRAWS = {64: 2000, 128: 600, 256: 160, 512: 40, 1024: 10, 2048: 3}
KEPT = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
RATIOS = (0.01, -0.1, 0.3, -0.7, 1, -3, 10)
REQUEST_DRAWS = {64: 1000, 128: 300, 256: 80, 512: 20}
REQUEST_KEPT = (1 / 64, 1 / 8, 1 / 2)
COSINES = (0.0, -0.5, 0.9, -0.99)  # of the bound sqrt(k / d)
SEED = 0


def draw(params: Parameters, dims: list[int], embed_dim: int, rng: np.random.Generator) -> list[Parameters]:
    """Draw `alpha * Z + beta * I` once and return the realised parameters of its truncation to each of dims."""
    matrix = params.alpha * rng.standard_normal((embed_dim, embed_dim)) / math.sqrt(embed_dim)
    matrix[np.diag_indices(embed_dim)] += params.beta
    left = np.linalg.eigh(matrix @ matrix.T)[1][:, ::-1]  # columns u_i, largest first; several times faster than an SVD
    right = left.T @ matrix  # rows s_i v_i^T
    found = []
    for k in dims:
        diagonal = np.sum(left[:, :k] * right[:k].T, axis=1)
        off_diagonal = np.sum(right[:k] ** 2) - np.sum(diagonal**2)
        found.append(Parameters(math.sqrt(max(off_diagonal, 0.0) / (embed_dim - 1)), float(diagonal.mean())))
    return found


def compare(expected: Parameters, draws: list[Parameters]) -> dict[str, Any]:
    """Return measured mean, expected value, error, standard error and spread of both parameters."""
    scale = max(abs(expected.alpha), abs(expected.beta))
    row: dict[str, Any] = {"n": len(draws)}
    for name in Parameters._fields:
        values = [getattr(d, name) for d in draws]
        spread = 100 * statistics.stdev(values) / scale
        row[name] = {
            "measured": round(statistics.fmean(values), 5),
            "expected": round(getattr(expected, name), 5),
            "error": round(100 * (getattr(expected, name) - statistics.fmean(values)) / scale, 3),
            "standard_error": round(spread / math.sqrt(len(values)), 3),
            "spread": round(spread, 3),
        }
    return row


def measure_realised(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for embed_dim, n in DRAWS.items():
        dims = [round(share * embed_dim) for share in KEPT]
        for ratio in RATIOS:
            drawn = Parameters(abs(ratio), math.copysign(1.0, ratio))
            draws = [draw(drawn, dims, embed_dim, rng) for _ in range(n)]
            for head_dim, found in zip(dims, zip(*draws, strict=True), strict=True):
                key = {"embed_dim": embed_dim, "head_dim": head_dim, "ratio": ratio}
                rows.append(key | compare(realised(*drawn, head_dim, embed_dim), list(found)))
    return rows


def measure_request(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for embed_dim, n in REQUEST_DRAWS.items():
        for head_dim in (round(share * embed_dim) for share in REQUEST_KEPT):
            for fraction in COSINES:
                cosine = fraction * math.sqrt(head_dim / embed_dim)
                target = Parameters(math.sqrt(1 - cosine**2), cosine)
                drawn = request(*target, head_dim, embed_dim)
                found = [draw(drawn, [head_dim], embed_dim, rng)[0] for _ in range(n)]
                key = {"embed_dim": embed_dim, "head_dim": head_dim, "cosine_of_bound": fraction}
                rows.append(key | compare(target, found))
    return rows


def measure_calls() -> dict[str, float]:
    """Return the CPU time of one `request` and how far `realised` of it is from the target, over a dense grid."""
    seconds, residuals = [], []
    for kept in (share for share in KEPT if share < 1):
        for angle in np.linspace(0.0, 0.9999, 200):
            cosine = float(angle) * math.sqrt(kept)
            target = Parameters(math.sqrt(1 - cosine**2), cosine)
            start = time.process_time()  # the machine is shared: elapsed time would measure the neighbours
            drawn = request(*target, round(2048 * kept), 2048)
            seconds.append(time.process_time() - start)
            residuals.append(math.dist(realised(*drawn, round(2048 * kept), 2048), target))
    return {
        "calls": len(seconds),
        "median_ms": round(1e3 * statistics.median(seconds), 3),
        "p99_ms": round(1e3 * statistics.quantiles(seconds, n=100)[-1], 3),
        "max_ms": round(1e3 * max(seconds), 3),
        "max_round_trip_residual": float(f"{max(residuals):.1e}"),
    }


def largest(rows: list[dict[str, Any]], column: str) -> dict[str, float]:
    return {name: max(abs(row[name][column]) for row in rows) for name in Parameters._fields}


def main() -> None:
    start = time.perf_counter()
    rng = np.random.default_rng(SEED)
    parts = {"realised": measure_realised(rng), "request": measure_request(rng)}
    by_width = {
        part: {
            str(d): {
                column: largest([row for row in rows if row["embed_dim"] == d], column)
                for column in ("error", "standard_error", "spread")
            }
            for d in sorted({row["embed_dim"] for row in rows})
        }
        for part, rows in parts.items()
    }
    header = {
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')} python -m benchmarks.inverse",
        "machine": platform.platform() + ", " + platform.machine(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "seed": SEED,
        "unit": "percent of max(|alpha|, |beta|) of the realised pair",
        "time_per_request": measure_calls(),
        "largest_by_embed_dim": by_width,
        "seconds": round(time.perf_counter() - start),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in header.items()]
    lines += [f'"{part}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for part, rows in parts.items()]
    target = Path(__file__).parent / "results" / "inverse.json"
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(json.dumps(header, indent=1))


if __name__ == "__main__":
    main()
