"""Measure the intervals and p-values of `attnlens.statistics.inference`: coverage, uniformity under nulls, power, time.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.coverage

writes `benchmarks/results/coverage.json` in about five minutes of CPU time on one core. Parts:
- `coverage`: share of 95% intervals that hold the alpha and beta of the `estimand`, with the mean standard error over
  the estimator's actual standard deviation (1 is right, above 1 is too wide); `coverage_summary` pools it by kind;
- `nulls`: share of p-values below 0.05 and 0.005 and the p-value of a Kolmogorov-Smirnov test of uniformity, for the
  test that decides, for coin-flip signs (saddlepoint and Monte Carlo), random pairing of rows, and random rotation of
  the factors' columns (`benchmarks.null_level` has the structures under which signs fail);
- `fresh`: corrected p-values of whole networks as timm initialises them; `families`: the same of many networks of
  normal draws;
- `power`: rejection at 0.05 and verdicts, uncorrected, against beta in units of alpha / d (a noise diagonal's standard
  error);
- `saddlepoint`: largest error of log p against all 2^16 sign patterns; `time`: CPU time for a ViT-S.
"""

import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import stats

from attnlens.circuits import FactoredProduct, WholeProduct
from attnlens.heads import Array
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.statistics.inference import infer
from attnlens.statistics.inverse import realised
from attnlens.statistics.nulls import (
    own_diagonal,
    pairing_p_value,
    rotation_p_value,
    sign_flip_draws,
    sign_flip_p_value,
)
from attnlens.statistics.trace import trace_p_value
from attnlens.statistics.verdicts import LEVEL, Verdict, corrected, judge

SEED = 0
DRAWS = {64: 600, 192: 200, 384: 60}
NULL_DRAWS = {(64, 16): 1500, (384, 64): 200}
RANDOM_SIGNS = 999
FAMILIES = 300
FRESH = ("vit_small_patch14_dinov2", 16)
ESTIMANDS = {
    "plain": "alpha and beta of the full draw alpha Z + beta I",
    "truncated": "inverse.realised(alpha, beta, k, d): the ensemble mean of the rank-k draw at large d",
    "factors": "sqrt(d k (1 + planted^2)) and planted k, the ensemble mean of A (B + planted A)^T with gains of "
    "E gain^2 = 1; *_given_gains: the mean over A and B alone, for the gains this draw has",
}
Truth = tuple[float, float]
Draw = tuple[FactoredProduct, Truth, Truth]
NOISES: dict[str, Callable[[Generator, tuple[int, ...]], Array]] = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "uniform": lambda rng, size: rng.uniform(-math.sqrt(3), math.sqrt(3), size),
    "t5": lambda rng, size: rng.standard_t(5, size) / math.sqrt(5 / 3),
    "t3": lambda rng, size: rng.standard_t(3, size) / math.sqrt(3),
}


def plain(rng: Generator, d: int, alpha: float, beta: float, noise: str) -> Draw:
    """Draw alpha * Z + beta * I."""
    matrix = alpha * NOISES[noise](rng, (d, d)) / math.sqrt(d) + beta * np.eye(d)
    return FactoredProduct(matrix, np.eye(d)), (alpha, beta), (alpha, beta)


def truncated(rng: Generator, d: int, k: int, alpha: float, beta: float) -> Draw:
    """Draw the mimetic recipe: the k largest singular directions of alpha * Z + beta * I."""
    matrix = alpha * rng.standard_normal((d, d)) / math.sqrt(d) + beta * np.eye(d)
    left = np.linalg.eigh(matrix @ matrix.T)[1][:, -k:]
    truth = tuple(realised(alpha, beta, k, d))
    return FactoredProduct(left, matrix.T @ left), truth, truth


def factors(rng: Generator, d: int, k: int, planted: float, noise: str, spread: float) -> Draw:
    """Draw W_Q W_K^T with i.i.d. entries, W_K += planted * W_Q, and each channel scaled on both sides by a gain."""
    A, B = NOISES[noise](rng, (d, k)), NOISES[noise](rng, (d, k))
    gain = np.exp(spread * rng.standard_normal((d, 1)) - spread**2)  # E gain^2 = 1
    truth = math.sqrt(d * k * (1 + planted**2)), planted * k
    squares = gain**2
    pairs = (squares.sum() ** 2 - (squares**2).sum()) / (d * (d - 1))
    given = truth[0] * math.sqrt(pairs), truth[1] * float(squares.mean())
    return FactoredProduct(gain * A, gain * (B + planted * A)), truth, given


def coverage_cases() -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = []
    for d in DRAWS:
        cases += [
            {"draw": "plain", "d": d, "alpha": a, "beta": b, "noise": noise}
            for noise in NOISES
            for a, b in ((1.0, 0.0), (0.7, 0.7), (0.1, -1.0))
        ]
        cases += [
            {"draw": "truncated", "d": d, "k": k, "alpha": a, "beta": b}
            for k in (d // 8, d // 3)
            for a, b in ((0.7, 0.0), (0.7, 0.7), (0.1, 0.7))
        ]
        cases += [
            {"draw": "factors", "d": d, "k": k, "planted": c, "noise": noise, "spread": spread}
            for k in (d // 8, d)
            for noise, spread in (("normal", 0.0), ("t5", 0.0), ("t3", 0.0), ("normal", 0.5), ("normal", 1.0))
            for c in (0.0, 0.2)
            if k < d or spread == 0
        ]
    return cases


def measure_coverage(rng: Generator) -> list[dict[str, Any]]:
    makers: dict[str, Callable[..., Draw]] = {"plain": plain, "truncated": truncated, "factors": factors}
    rows = []
    for case in coverage_cases():
        arguments = {name: value for name, value in case.items() if name != "draw"}
        columns: dict[str, list[Any]] = {name: [] for name in ("estimate", "stderr", "low", "high", "truth", "given")}
        for _ in range(DRAWS[case["d"]]):
            product, truth, given = makers[case["draw"]](rng, **arguments)
            diagonal, inference = product.diagonal(), infer(product)
            off = product.squared_norm() - (diagonal**2).sum()  # what fit_diagonal does, without the singular values
            values = (
                (math.sqrt(off / (case["d"] - 1)), diagonal.mean()),
                (inference.alpha_stderr, inference.beta_stderr),
                (inference.alpha_low, inference.beta_low),
                (inference.alpha_high, inference.beta_high),
                truth,
                given,
            )
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
        rows.append(case | covered(case, {name: np.array(column, dtype=float) for name, column in columns.items()}))
    return rows


def covered(case: dict[str, Any], found: dict[str, Array]) -> dict[str, Any]:
    row: dict[str, Any] = {"n": len(found["truth"])}
    for i, name in enumerate(("alpha", "beta")):
        low, high = found["low"][:, i], found["high"][:, i]
        row[name + "_coverage"] = share((low <= found["truth"][:, i]) & (found["truth"][:, i] <= high))
        if case.get("spread"):
            row[name + "_coverage_given_gains"] = share((low <= found["given"][:, i]) & (found["given"][:, i] <= high))
        row[name + "_se_over_sd"] = round(float(found["stderr"][:, i].mean() / found["estimate"][:, i].std(ddof=1)), 3)
    return row


def share(held: Array) -> float:
    return round(float(held.mean()), 4)


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Pool coverage over d, k, alpha and beta: mean, and the lowest of a single configuration."""
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["draw"], row.get("noise", "normal"), row.get("spread", 0.0)), []).append(row)
    found = []
    for (draw, noise, spread), members in groups.items():
        summary: dict[str, Any] = {"draw": draw, "noise": noise, "spread": spread, "configurations": len(members)}
        summary["n"] = sum(row["n"] for row in members)
        for name in [name for name in members[0] if "_coverage" in name]:
            held = sum(row[name] * row["n"] for row in members) / summary["n"]
            summary[name] = {"mean": round(held, 4), "lowest": min(row[name] for row in members)}
        found.append(summary)
    return found


def null_factors(name: str, d: int, k: int, rng: Generator) -> tuple[Array, Array]:
    """Draw factors whose rows are linked in scale at most, never in direction."""
    A, B = rng.standard_normal((2, d, k))
    four = rng.choice(d, 4, replace=False)
    if name == "t3 entries":
        A, B = rng.standard_t(3, (2, d, k))
    elif name == "skewed entries":
        A, B = rng.exponential(size=(2, d, k)) - 1
    elif name == "large channels, different ones":
        A[four] *= 30
        B[rng.choice(d, 4, replace=False)] *= 30
    elif name == "large channels, the same":
        A[four] *= 30
        B[four] *= 30
    elif name == "one channel":
        A[four[0]] *= 30
        B[four[0]] *= 30
    elif name == "lognormal gains on both sides":
        gain = np.exp(rng.standard_normal((d, 1)))
        A, B = A * gain, B * gain
    elif name == "large factor column":
        A[:, 0] *= 30
        B[:, 0] *= 30
    elif name == "shared row and column mean":
        A, B = A + 3 * rng.standard_normal(k), B + 3 * rng.standard_normal(k)
    elif name == "shared mean under gains":
        gain = np.exp(0.5 * rng.standard_normal((d, 1)))
        A, B = gain * (A + rng.standard_normal(k)), gain * (B + rng.standard_normal(k))
    elif name == "shared mean, large channels":
        A, B = A + 3 * rng.standard_normal(k), B + 3 * rng.standard_normal(k)
        A[four] *= 10
        B[four] *= 10
    elif name == "truncated noise":
        left, values, right = np.linalg.svd(rng.standard_normal((d, d)))
        A, B = left[:, :k] * values[:k], right[:k].T
    return A, B


NULLS = (
    "normal entries", "t3 entries", "skewed entries", "truncated noise", "large factor column",
    "large channels, different ones", "large channels, the same", "one channel", "lognormal gains on both sides",
    "shared row and column mean", "shared mean under gains", "shared mean, large channels",
)  # fmt: skip


def measure_nulls(rng: Generator) -> list[dict[str, Any]]:
    rows = []
    for (d, k), n in NULL_DRAWS.items():
        for name in NULLS:
            found = []
            for draw in range(n):
                A, B = null_factors(name, d, k, rng)
                product = FactoredProduct(A, B)
                margins = product.squared_margins()
                own = own_diagonal(product, margins)
                found.append({
                    "decides": float(trace_p_value(product.balanced())[1]),
                    "sign_flip": float(sign_flip_p_value(own)),
                    "sign_flip_draws": float(sign_flip_draws(own, RANDOM_SIGNS, draw)),
                    "pairing": float(pairing_p_value(product, margins[0].sum())),
                    "rotation": float(rotation_p_value(product)),
                })  # fmt: skip
            for test in found[0]:
                p = np.array([row[test] for row in found])
                rows.append({
                    "null": name, "d": d, "k": k, "n": n, "test": test,
                    "below_0.05": round(float(np.mean(p <= 0.05)), 4),
                    "below_0.005": round(float(np.mean(p <= 0.005)), 4),
                    "ks_p": float(f"{stats.kstest(p, 'uniform').pvalue:.2g}"),
                })  # fmt: skip
    return rows


def measure_fresh() -> dict[str, Any]:
    """Fit networks as timm initialises them: how often the smallest corrected p-value of 156 is below the level."""
    import timm
    import torch

    from attnlens.fit.fit_params import fit_params

    name, n = FRESH
    smallest, alone, words = [], [], []
    for seed in range(n):
        torch.manual_seed(seed)
        entries = fit_params(timm.create_model(name, pretrained=False, img_size=28), fold="raw").entries
        smallest.append(min(entry.p_value for entry in entries))
        alone += [entry.p_value_alone for entry in entries]
        words += [entry.verdict for entry in entries]
    return {
        "model": name,
        "networks": n,
        "circuits": len(alone),
        "networks_with_a_corrected_p_below_0.05": sum(p < 0.05 for p in smallest),
        "smallest_corrected_p": round(min(smallest), 4),
        "p_alone_below_0.05": share(np.array(alone) < 0.05),
        "p_alone_ks": float(f"{stats.kstest(alone, 'uniform').pvalue:.2g}"),
        "verdicts": {word: words.count(word) for word in sorted(set(words))},
    }


def measure_families(rng: Generator, d: int = 192, k: int = 64, heads: int = 3, depth: int = 12) -> dict[str, Any]:
    """Correct the p-values of a ViT-Ti of normal draws: per layer every head's QK and OV, and the OV sum."""
    smallest = []
    for _ in range(FAMILIES):
        p: list[Array] = []
        for _ in range(depth):
            W_Q, W_K, W_V, W_O = rng.standard_normal((4, heads, d, k))
            total = np.einsum("hik,hjk->ij", W_V, W_O, optimize=True)
            products = FactoredProduct(W_Q, W_K), FactoredProduct(W_V, W_O), WholeProduct.of(total, d)
            p += [np.ravel(trace_p_value(product.balanced())[1]) for product in products]
        smallest.append(corrected(np.concatenate(p)).min())
    rate = share(np.array(smallest) < LEVEL)
    return {"d": d, "k": k, "circuits": depth * (2 * heads + 1), "families": FAMILIES, "rate_below_0.05": rate}


def measure_power(rng: Generator) -> list[dict[str, Any]]:
    rows = []
    for d, k, n in ((64, 16, 400), (384, 64, 100)):
        for effect in (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0):
            rejected, named = [], []
            for _ in range(n):
                A, B = rng.standard_normal((2, d, k))
                planted = effect / math.sqrt(d * k)  # beta = planted k, alpha = sqrt(d k): effect = beta d / alpha
                product = FactoredProduct(A, B + planted * A)
                inference = infer(product)
                rejected.append((inference.p_value < 0.05, inference.sign_p_value < 0.05))
                fit = fit_diagonal(product, None)
                named += [judgement.verdict for judgement in judge(fit, inference, inference.p_value)]
            decides, flip = np.mean(rejected, axis=0)
            share = {word.value: round(named.count(word) / n, 3) for word in Verdict}
            row = {"d": d, "k": k, "n": n, "beta_d_over_alpha": effect}
            rows.append(row | {"decides": round(float(decides), 3), "sign_flip": round(float(flip), 3)} | share)
    return rows


def measure_saddlepoint(rng: Generator, terms: int = 16, n: int = 200) -> dict[str, Any]:
    patterns = np.array(list(itertools.product((1.0, -1.0), repeat=terms - 1)))
    found = {}
    for name, draw in (
        ("normal terms", lambda: rng.standard_normal(terms) + rng.uniform(0, 1.5)),
        ("one term 30 times the others", lambda: rng.standard_normal(terms) * np.r_[30.0, np.ones(terms - 1)]),
    ):
        errors = {"p below 0.05": [0.0], "p above 0.05": [0.0]}
        for _ in range(n):
            x = draw()
            sums = np.abs(x[0] + patterns @ x[1:])
            exact = float(np.mean(sums >= abs(x.sum()) * (1 - 1e-12)))
            error = abs(math.log(float(sign_flip_p_value(x)) / exact))
            errors["p below 0.05" if exact < 0.05 else "p above 0.05"].append(error)
        found[name] = {side: round(max(values), 3) for side, values in errors.items()}
    return {"terms": terms, "n": n, "largest_error_of_log_p": found}


def measure_time(rng: Generator) -> dict[str, float]:
    heads = FactoredProduct(rng.standard_normal((6, 384, 64)), rng.standard_normal((6, 384, 64)))
    layer = FactoredProduct(rng.standard_normal((384, 384)), rng.standard_normal((384, 384)))
    seconds = {}
    for name, product in (("six heads", heads), ("layer sum", layer)):
        infer(product)
        start = time.process_time()  # the machine is shared: elapsed time would measure the neighbours
        for _ in range(10):
            infer(product)
        seconds[name] = (time.process_time() - start) / 10
    total = 12 * (2 * seconds["six heads"] + seconds["layer sum"])
    return {f"{name} (ms)": round(1e3 * value, 1) for name, value in seconds.items()} | {
        "ViT-S, one fold: 144 heads and 12 sums (s)": round(total, 2)
    }


def main() -> None:
    start = time.process_time()  # the machine is shared: elapsed time would measure the neighbours
    rng = np.random.default_rng(SEED)
    header = {
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')} "
        f"OPENBLAS_NUM_THREADS={os.environ.get('OPENBLAS_NUM_THREADS', 'unset')} python -m benchmarks.coverage",
        "machine": platform.platform() + ", " + platform.machine(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("numpy", "scipy", "torch", "timm")},
        "seed": SEED,
        "level": 0.95,
        "estimand": ESTIMANDS,
        "saddlepoint": measure_saddlepoint(rng),
        "time": measure_time(rng),
        "fresh": measure_fresh(),
    }
    print("fresh", round(time.process_time() - start), "s of CPU time", flush=True)
    parts: dict[str, list[dict[str, Any]]] = {}
    for name, measure in (("coverage", measure_coverage), ("nulls", measure_nulls), ("power", measure_power)):
        parts[name] = measure(rng)
        print(name, round(time.process_time() - start), "s of CPU time", flush=True)
    header["families"] = measure_families(rng)
    header["coverage_summary"] = summarise(parts["coverage"])
    header["cpu_seconds"] = round(time.process_time() - start)
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in header.items()]
    lines += [f'"{part}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for part, rows in parts.items()]
    target = Path(__file__).parent / "results" / "coverage.json"
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(json.dumps(header, indent=1))


if __name__ == "__main__":
    main()
