"""Measure what balancing costs beside the other statistics of the same products, in CPU time of one thread.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.balance_speed [--checkpoint FILE]

writes `benchmarks/results/balance_speed.json`. The products are those of a ViT-B, 12 layers of 12 QK and 12 OV heads of
64 units at width 768, with lognormal gains of sigma 0.5 on their channels; with FILE, weights of --model, those of the
file. Paired: for each of several passes over the layers, the balanced
product of every stack and then what `inspect` (fit, spectra, gains) and `fit-params` (intervals, p-values) say of it.
"""

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

import attnlens
from attnlens.circuits import FactoredProduct, ov_circuit, qk_circuit
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.statistics.gains import describe_gains
from attnlens.statistics.inference import infer

PASSES = 5
LAYERS, HEADS, WIDTH, HEAD_DIM, SPREAD = 12, 12, 768, 64, 0.5


def drawn() -> list[FactoredProduct]:
    rng = np.random.default_rng(0)
    shape = (2 * LAYERS, HEADS, WIDTH, HEAD_DIM)
    A, B = rng.standard_normal((2, *shape)) * np.exp(SPREAD * rng.standard_normal((2, 2 * LAYERS, 1, WIDTH, 1)))
    return [FactoredProduct(a, b) for a, b in zip(A, B, strict=True)]


def read(model: str, checkpoint: str) -> list[FactoredProduct]:
    seen = attnlens.inspect(model, checkpoint)
    layers = [seen.heads(layer) for layer in seen.layers]
    return [circuit(weights, "effective") for weights in layers for circuit in (qk_circuit, ov_circuit)]


def measure(products: list[FactoredProduct]) -> dict[str, float]:
    seconds = dict.fromkeys(("balance", "fit", "infer"), 0.0)
    for product in products:
        start = time.process_time()
        balanced = FactoredProduct(product.A, product.B).balanced()
        middle = time.process_time()
        fit_diagonal(balanced, balanced.singular_values())
        describe_gains(balanced)
        late = time.process_time()
        infer(balanced)
        seconds["infer"] += time.process_time() - late
        seconds["balance"] += middle - start
        seconds["fit"] += late - middle
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint")
    parser.add_argument("--model", default="vit_base_patch16_224")
    options = parser.parse_args()
    products = read(options.model, options.checkpoint) if options.checkpoint else drawn()
    measure(products[:2])  # warm
    passes = [measure(products) for _ in range(PASSES)]
    found = {
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')} "
        f"OPENBLAS_NUM_THREADS={os.environ.get('OPENBLAS_NUM_THREADS', 'unset')} python -m benchmarks.balance_speed"
        + (f" --model {options.model} --checkpoint FILE" if options.checkpoint else ""),
        "machine": platform.platform() + ", " + platform.machine(),
        "versions": {name: version(name) for name in ("numpy", "scipy")} | {"python": platform.python_version()},
        "products": sum(len(product.A) for product in products),
        "passes": PASSES,
        "seconds": {name: round(statistics.median(each[name] for each in passes), 3) for name in passes[0]},
        "balance_over_rest": [round(each["balance"] / (each["fit"] + each["infer"]), 3) for each in passes],
        "balance_over_fit": [round(each["balance"] / each["fit"], 3) for each in passes],
    }
    target = Path(__file__).parent / "results" / "balance_speed.json"
    target.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
