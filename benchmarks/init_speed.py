"""Time of `init_` against a full SVD for every head, on the same machine in one run.

    OMP_NUM_THREADS=2 python -m benchmarks.init_speed

Writes benchmarks/results/init_speed.json. For a ViT-B and a ViT-L on the CPU with two threads:

- ours: `init_(model, "mimetic")` of a live network, describing it and reading every product back included; wall time
  and CPU time of each of n calls;
- full: what public code does, one `torch.linalg.svd` of each head's draw and of each layer's, float32 and float64, on
  two threads; measured on one layer between our calls, times the number of layers;
- error: the largest relative difference of our QK products from the best rank-k approximation by that float64 SVD, and
  of our OV product from the draw, over one layer.
The machine's load average before and after stands in the file: on a busy machine wall times are too long.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from attnlens.atomic import write_text_atomic
from attnlens.checkpoints import ModuleWeights
from attnlens.inits import init_
from attnlens.inits.products import draw_matrix
from attnlens.inits.random import Streams
from attnlens.layouts import read_heads
from attnlens.models.architecture import describe_module
from attnlens.provenance import run_provenance

RESULTS = Path(__file__).parent / "results" / "init_speed.json"
MODELS = {"vit_base_patch16_224": 3.0, "vit_large_patch16_224": 12.0}
"""Models with the seconds that were asked for on two cores."""


def timed(work: Callable[[], object]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": round(time.perf_counter() - wall, 3), "cpu": round(time.process_time() - cpu, 3)}


def draws(size: int, heads: int) -> list[torch.Tensor]:
    """Return what `mimetic` with seed 0 draws for the first layer: a matrix for each head's QK, then one for OV."""
    qk = [draw_matrix((0.7, 0.7), size, "normal", Streams(0).generator("qk", 0, head)) for head in range(heads)]
    return [*qk, draw_matrix((0.4, -0.4), size, "normal", Streams(0).generator("ov", 0))]


def full(matrices: list[torch.Tensor], rank: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Factor every matrix by its full SVD and keep the leading directions (all of the last one's)."""
    factors = []
    for place, A in enumerate(matrices):
        U, S, Vh = torch.linalg.svd(A)
        kept = len(A) if place == len(matrices) - 1 else rank
        roots = S[:kept].sqrt()
        factors.append((U[:, :kept] * roots, Vh[:kept].T * roots))
    return factors


def errors(model: torch.nn.Module, matrices: list[torch.Tensor], rank: int) -> dict[str, float]:
    heads = read_heads(describe_module(model).specs[0], ModuleWeights(model))
    qk = []
    for (left, right), W_Q, W_K in zip(full(matrices, rank), heads.W_Q, heads.W_K, strict=False):
        best = left @ right.T
        qk.append(float((torch.from_numpy(W_Q @ W_K.T) - best).norm() / best.norm()))
    assert heads.W_O is not None
    total = sum(torch.from_numpy(v @ o) for v, o in zip(heads.W_V, heads.W_O, strict=True))
    return {"qk": max(qk), "ov": float((total - matrices[-1]).norm() / matrices[-1].norm())}


def measure(name: str, asked: float, repeats: int) -> dict[str, Any]:
    model = timm.create_model(name)
    attn = model.blocks[0].attn
    size, heads, depth = attn.qkv.in_features, attn.num_heads, len(model.blocks)
    matrices = draws(size, heads)
    narrow = [A.float() for A in matrices]
    rank = size // heads
    ours: list[dict[str, float]] = []
    wide_svd: list[dict[str, float]] = []
    narrow_svd: list[dict[str, float]] = []
    init_(model, "mimetic")  # libraries loaded, memory touched
    for _ in range(repeats):
        ours.append(timed(lambda: init_(model, "mimetic", seed=0)))
        narrow_svd.append(timed(lambda: full(narrow, rank)))
        wide_svd.append(timed(lambda: full(matrices, rank)))
        print(name, ours[-1], narrow_svd[-1], wide_svd[-1], file=sys.stderr)
    found: dict[str, Any] = {"model": name, "layers": depth, "heads": heads, "embed_dim": size, "n": repeats}
    found |= {
        "seconds_asked_for": asked,
        "ours_runs": ours,
        "svd_float32_runs": narrow_svd,
        "svd_float64_runs": wide_svd,
    }
    for kind in ("wall", "cpu"):
        mine = statistics.median(run[kind] for run in ours)
        found[f"ours_{kind}"] = mine
        for label, runs in (("float32", narrow_svd), ("float64", wide_svd)):
            whole = statistics.median(run[kind] for run in runs) * depth
            found[f"svd_{label}_{kind}"] = round(whole, 2)
            found[f"ratio_{label}_{kind}"] = round(whole / mine, 2)
    found["relative_error"] = errors(model, matrices, rank)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(2)
    before = os.getloadavg()
    rows = [measure(name, asked, given.repeats) for name, asked in MODELS.items()]
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    result = {
        "command": "OMP_NUM_THREADS=2 python -m benchmarks.init_speed --repeats " + str(given.repeats),
        "machine": {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "load_average": {"before": before, "after": os.getloadavg()},
        **run_provenance(),
        "models": rows,
    }
    write_text_atomic(given.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
