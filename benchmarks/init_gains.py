"""What `fitted` with gains gives back of a pre-trained network, and what decides the tails of its products.

    OMP_NUM_THREADS=1 python -m benchmarks.init_gains --checkpoint vit_small_patch14_dinov2.safetensors

Writes benchmarks/results/init_gains.json. The network is fitted, drawn anew for each seed, and measured again: whether
balanced alpha and beta lie in the source's 95% intervals, how far gains lie from the source's (log units), the excess
kurtosis of the effective product over the source's, and the time of `init_` over that without gains. ``chance`` is
`channels` with the draw's channels left as they came. ``placements`` says how the source's own kurtosis lies among
those of its own balanced products with their channels in a random order, and what share of the sum of fourth powers its
ten largest entries hold.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm

from attnlens.atomic import write_text_atomic
from attnlens.circuits import FactoredProduct, Kind, layer_ov, qk_circuit
from attnlens.fit.entries import Heads
from attnlens.fit.fit_params import fit_params
from attnlens.fit.params import InitParams
from attnlens.heads import Array
from attnlens.inits import init_
from attnlens.inits.gained import offdiagonal_tails
from attnlens.models.open import open_model
from attnlens.provenance import run_provenance
from attnlens.statistics.diagonal import alpha_beta

RESULTS = Path(__file__).parent / "results" / "init_gains.json"
COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.init_gains --checkpoint FILE"
PLACEMENTS, LARGEST = 200, 10
CIRCUITS: tuple[tuple[Kind, Heads], ...] = (("qk", "each"), ("ov", "all"))


class Product(NamedTuple):
    """One product of a network: balanced, its gains, and the kurtosis of its effective entries."""

    alpha: float
    beta: float
    rows: Array
    cols: Array
    kurtosis: float
    entries: Array
    """balanced"""


def products(model: Any, checkpoint: Path | None = None) -> dict[tuple[int, Kind, int | str], Product]:
    """Read every QK head and every summed OV."""
    opened = open_model(model, checkpoint, None)
    found = {}
    for layer, _ in opened.architecture.indexed():
        weights = opened.heads(layer)
        for head, product in enumerate_heads(qk_circuit(weights, "balanced")):
            found[layer, "qk", head] = _measured(product)
        found[layer, "ov", "all"] = _measured(layer_ov(weights, "balanced"))
    return found  # type: ignore[return-value]


def enumerate_heads(stack: FactoredProduct) -> Iterator[tuple[int, FactoredProduct]]:
    return ((head, stack.head(head)) for head in range(stack.shape[0]))


def _measured(product: FactoredProduct) -> Product:
    assert product.gains is not None
    alpha, beta = (float(value) for value in alpha_beta(product.diagonal(), product.squared_norm()))
    rows, cols, N = product.gains.rows, product.gains.cols, product.dense()
    return Product(alpha, beta, rows, cols, offdiagonal_tails(N, rows, cols), N)


def without_tails(params: InitParams) -> InitParams:
    """Return parameters that ask for no kurtosis."""
    gains = [each.model_copy(update={"kurtosis": [None] * each.num_heads}) for each in params.gains]
    return params.model_copy(update={"gains": gains})


def compare(params: InitParams, source: dict[Any, Product], drawn: Sequence[dict[Any, Product]]) -> dict[str, Any]:
    """Compare draws of several seeds with the source."""
    rows: dict[str, Any] = {}
    for circuit, head in CIRCUITS:
        entries = {(e.layer, circuit, e.head): e for e in params.select(circuit, head, fold="balanced")}
        pairs = [(entries[key], source[key], draw[key]) for draw in drawn for key in entries]
        ratio = np.array([found.kurtosis / wanted.kurtosis for _, wanted, found in pairs])
        gains = [
            (np.log(getattr(found, side)), np.log(getattr(wanted, side)))
            for _, wanted, found in pairs
            for side in ("rows", "cols")
        ]
        rows[f"{circuit} {head}"] = {
            "n": len(pairs),
            "alpha_inside": round(float(np.mean([e.alpha_low <= f.alpha <= e.alpha_high for e, _, f in pairs])), 4),
            "beta_inside": round(float(np.mean([e.beta_low <= f.beta <= e.beta_high for e, _, f in pairs])), 4),
            "alpha_worst": float(f"{max(abs(f.alpha / w.alpha - 1) for _, w, f in pairs):.2g}"),
            "gain_by_channel_worst": round(float(max(np.abs(f - w).max() for f, w in gains)), 4),
            "gain_quantiles_rms": round(
                float(np.sqrt(np.mean([np.mean((np.sort(f) - np.sort(w)) ** 2) for f, w in gains]))), 4
            ),
            "kurtosis_ratio": {q: round(float(np.quantile(ratio, float(q))), 3) for q in ("0.05", "0.5", "0.95")},
            "kurtosis_within_20_percent": round(float(np.mean(np.abs(ratio - 1) <= 0.2)), 4),
        }
    return rows


def placements(source: dict[Any, Product]) -> dict[str, Any]:
    """Say how the source's kurtosis lies among those of its channels in a random order."""
    generator = np.random.default_rng(0)
    found: dict[str, Any] = {}
    for circuit in ("qk", "ov"):
        below, share = [], []
        for key, product in source.items():
            if key[1] != circuit:
                continue
            orders = (generator.permutation(len(product.rows)) for _ in range(PLACEMENTS))
            placed = [offdiagonal_tails(product.entries, product.rows[p], product.cols[p]) for p in orders]
            below.append(float(np.mean(np.array(placed) < product.kurtosis)))
            fourth = (product.entries * np.outer(product.rows, product.cols)) ** 4
            np.fill_diagonal(fourth, 0.0)
            share.append(np.sort(fourth.ravel())[-LARGEST:].sum() / fourth.sum())
        found[circuit] = {
            "n": len(below),
            "outside_95_percent": round(float(np.mean([not 0.025 <= p <= 0.975 for p in below])), 4),
            "above": round(float(np.mean([p > 0.975 for p in below])), 4),
            "median_share_of_ten_entries": round(float(np.median(share)), 4),
        }
    return found


def sharing(params: InitParams) -> dict[str, Any]:
    """Say how far the heads of a layer share their gains, and r goes with c: mean, least, largest over layers."""
    rows: dict[str, Any] = {}
    for circuit, head in (("qk", "each"), ("ov", "each"), ("ov", "all")):
        group = [each for each in params.gains if (each.circuit, each.head) == (circuit, head)]
        values = {"rows": [g.rows.shared for g in group], "cols": [g.cols.shared for g in group]}
        values["correlation"] = [g.correlation for g in group]
        rows[f"{circuit} {head}"] = {
            name: [round(float(f(each)), 2) for f in (np.mean, np.min, np.max)] for name, each in values.items()
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    params = fit_params(given.model, checkpoint=given.checkpoint)
    source = products(given.model, given.checkpoint)
    module = timm.create_model(given.model, pretrained=False, img_size=56, init_values=1.0)
    ways: dict[str, tuple[InitParams, str]] = {
        "none": (params, "none"),
        "channels": (params, "channels"),
        "chance": (without_tails(params), "channels"),
        "quantiles": (params, "quantiles"),
    }
    results: dict[str, Any] = {}
    for name, (asked, gains) in ways.items():
        drawn, times = [], []
        for seed in range(given.seeds):
            start = time.process_time()
            init_(module, "fitted", params=asked, gains=gains, seed=seed)
            times.append(time.process_time() - start)
            drawn.append(products(module))
        results[name] = {"cpu_seconds": round(float(np.median(times)), 2), **compare(params, source, drawn)}
        print(name, json.dumps(results[name], indent=1), flush=True)
    data = {
        "command": COMMAND,
        **run_provenance(),
        "model": given.model,
        "seeds": given.seeds,
        "draws": results,
        "placements": placements(source),
        "sharing": sharing(params),
    }
    write_text_atomic(RESULTS, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
