"""Time and memory of `inspect` against the plain dense way, on the same machine in one run.

    python benchmarks/inspect_speed.py   # some four minutes, 5 GB of temporary disk
    python benchmarks/inspect_speed.py --skip-giant

Writes benchmarks/results/inspect_speed.json. Three measurements, each a median of several runs in fresh processes:

- products: every statistic of the 288 per-head products of a ViT-B (12 layers, QK and OV, raw) once the file is open;
  dense: the same statistics from each d x d matrix with numpy, measured on the first layer's 24 products, times 12.
- giant: vit_giant_patch14_224 (1.0 B parameters, random weights): peak of anonymous memory above the imports and wall
  time; dense: timm.create_model, load_state_dict and one float64 copy of every layer's weights.
- process: a whole `attnlens inspect` of a local ViT-B file, table and four PNGs, architecture known from an earlier
  run; dense: a Python process that imports timm, loads the model and forms the d x d products with their means.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "inspect_speed.json"

MEMORY = """
import threading, time
class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True); self.peak = 0; self.base = self.now()
    def now(self):
        return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon")) / 1024
    def run(self):
        while True:
            self.peak = max(self.peak, self.now()); time.sleep(0.002)
"""

PRODUCTS = """
import sys, time
from attnlens.inspection import measure_layer
from attnlens.models.open import open_model
from attnlens.layouts import read_heads
from attnlens.threads import over_threads
opened = open_model("vit_base_patch16_224", sys.argv[1])
start = time.perf_counter()
def measure(indexed):
    return measure_layer(read_heads(indexed[1], opened.checkpoint, indexed[0]), ("raw",))[0]
rows = [row for found in over_threads(measure, opened.architecture.indexed()) for row in found]
print(time.perf_counter() - start, sum(1 for row in rows if row[1] != "all"))
"""

PRODUCTS_DENSE = """
import sys, time, numpy as np
from attnlens.models.open import open_model
from attnlens.layouts import read_heads
from attnlens.heads import expand_groups
opened = open_model("vit_base_patch16_224", sys.argv[1])
start = time.perf_counter()
layer, spec = opened.architecture.indexed()[0]
w = read_heads(spec, opened.checkpoint, layer)
count = 0
for M in [q @ k.T for q, k in zip(w.W_Q, w.W_K)] + [v @ o for v, o in zip(w.W_V, w.W_O)]:
    d = len(M); diag = np.diag(M); off = M[~np.eye(d, dtype=bool)]
    s = np.linalg.svd(M, compute_uv=False); e = np.linalg.eigvals(M)
    row = [np.sqrt(d * (off**2).mean()), diag.mean(), diag.std(ddof=1) / d**0.5, diag.mean() / off.std(), s[0]]
    row += [diag.sum() / np.linalg.norm(M) / d**0.5, (s**2).sum() / s[0]**2, e.real.sum() / np.abs(e).sum()]
    row += [np.linalg.norm(M + M.T)]
    count += 1
print((time.perf_counter() - start) * 288 / count, count)
"""

GIANT = (
    MEMORY
    + """
import sys, numpy, scipy.sparse.linalg, json
import attnlens, attnlens.inspection
watch = Peak(); watch.start()
start = time.perf_counter()
found = attnlens.inspect("vit_giant_patch14_224", sys.argv[1])
print(time.perf_counter() - start, watch.peak - watch.base, len(found.stats))
"""
)

GIANT_DENSE = (
    MEMORY
    + """
import sys, numpy as np, timm, torch
from safetensors.torch import load_file
watch = Peak(); watch.start()
start = time.perf_counter()
model = timm.create_model("vit_giant_patch14_224", num_classes=0)
model.load_state_dict(load_file(sys.argv[1]))
for block in model.blocks:
    qkv = block.attn.qkv.weight.detach().double().numpy(); proj = block.attn.proj.weight.detach().double().numpy()
print(time.perf_counter() - start, watch.peak - watch.base, 0)
"""
)

PROCESS_DENSE = """
import sys, timm, torch
from safetensors.torch import load_file
model = timm.create_model("vit_base_patch16_224", num_classes=0)
model.load_state_dict(load_file(sys.argv[1]))
rows = []
for block in model.blocks:
    q, k, v = block.attn.qkv.weight.detach().double().reshape(3, 12, 64, 768)
    o = block.attn.proj.weight.detach().double().reshape(768, 12, 64).permute(1, 2, 0)
    for M in (q.mT @ k, v.mT @ o):
        diag = M.diagonal(dim1=-2, dim2=-1)
        rows += [diag.mean(-1), (M.square().sum((-2, -1)) - diag.square().sum(-1)).sqrt()]
"""


def random_checkpoint(name: str, folder: Path) -> Path:
    """Write a timm architecture's random weights as safetensors."""
    path = folder / f"{name}.safetensors"
    code = (
        "import sys, timm; from safetensors.torch import save_model\n"
        f"save_model(timm.create_model({name!r}, num_classes=0), sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)
    return path


def numbers(code: str, path: Path) -> list[float]:
    """Run ``code`` in a fresh process and return the numbers it prints."""
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def wall(command: list[str]) -> float:
    """Return the wall time of a whole process."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def repeat(runs: int, measure) -> list[list[float]]:
    """Call ``measure`` one time unrecorded and ``runs`` times recorded; return the columns."""
    measure()
    return [list(column) for column in zip(*(measure() for _ in range(runs)), strict=True)]


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "n": len(values)}


def record(result: dict[str, object]) -> None:
    """Write what has been measured so far."""
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-giant", action="store_true")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    result: dict[str, object] = {}
    load = os.getloadavg()[0]
    result["machine"] = {
        "cpu_count": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("attnlens", "numpy", "scipy", "torch", "timm")},
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load_before": load,
        "command": "python " + " ".join(sys.argv),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = random_checkpoint("vit_base_patch16_224", folder)
        factored = repeat(arguments.runs, lambda: numbers(PRODUCTS, base))
        dense = numbers(PRODUCTS_DENSE, base)
        result["products"] = {
            "count": int(factored[1][0]),
            "seconds": summary(factored[0]),
            "dense_seconds": dense[0],
            "dense_measured_on": int(dense[1]),
            "ratio": dense[0] / statistics.median(factored[0]),
        }
        record(result)
        command = [sys.executable, "-c", "from attnlens.cli import main; main()", "inspect", "vit_base_patch16_224"]
        command += ["--checkpoint", str(base), "--output", str(folder / "out")]
        ours = repeat(arguments.runs, lambda: [wall(command)])[0]
        plain = repeat(3, lambda: [wall([sys.executable, "-c", PROCESS_DENSE, str(base)])])[0]
        result["process"] = {
            "seconds": summary(ours),
            "dense_seconds": summary(plain),
            "ratio": statistics.median(plain) / statistics.median(ours),
        }
        record(result)
        if not arguments.skip_giant:
            giant = random_checkpoint("vit_giant_patch14_224", folder)
            lean, heavy = numbers(GIANT, giant), numbers(GIANT_DENSE, giant)
            result["giant"] = {
                "seconds": lean[0],
                "private_mb": lean[1],
                "rows": int(lean[2]),
                "dense_seconds": heavy[0],
                "dense_private_mb": heavy[1],
                "memory_ratio": heavy[1] / lean[1],
            }
    record(result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
