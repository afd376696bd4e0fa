"""Measure what the words of `attnlens.statistics.verdicts` are worth where there is no diagonal: levels, words, power.

    OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m benchmarks.null_level --checkpoint FILE

writes `benchmarks/results/null_level.json`. FILE holds the weights of the model behind `networks`
(vit_small_patch14_dinov2); without it that part is left out and said so. Parts:

- `simulated`: factors that nothing links, of many structures: share of p-values below 0.05 and 0.005 of the test that
  decides and of those beside it, share of products with a word, share of 95% intervals that hold beta = 0 and the root
  mean square of alpha over the draws; `planted` the same intervals with a diagonal planted, B + c A for B;
- `networks`: the real network with the units of every head rotated at random, W_Q R and W_V R, which leaves no diagonal
  in expectation and all else as it is: share of p-values below 0.05 by kind of circuit, and of networks with a false
  word among their heads and layer sums after Holm's correction, with Clopper and Pearson's 95% interval; for each fold,
  by the test that decides and by coin-flip signs, which decided before;
- `power`: rejection and words against beta in units of alpha / d.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from scipy import stats

from attnlens.circuits import FOLDS, FactoredProduct, layer_ov, ov_circuit, qk_circuit
from attnlens.heads import Array, HeadWeights
from attnlens.provenance import run_provenance
from attnlens.statistics.diagonal import DiagonalFit, fit_diagonal
from attnlens.statistics.inference import Inference, infer
from attnlens.statistics.verdicts import LEVEL, Judgement, Verdict, corrected, judge

SEED = 0
SIZES = {(64, 16): 2000, (96, 32): 1000, (384, 64): 1000}
PLANTED = 0.3
NETWORK = "vit_small_patch14_dinov2"
NETWORKS = 200
POWER = ((64, 16, 2000), (192, 64, 500), (384, 64, 300))
EFFECTS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0)
TESTS = ("p_value", "sign_p_value", "rotation_p_value", "pairing_p_value")
SILENT = (Verdict.NONE, Verdict.NOT_DESCRIBED)
Draw = Callable[[], Array]
Piece = tuple[Callable[[Generator], Any], Generator]


def structures(rng: Generator, d: int, k: int) -> dict[str, Draw]:
    """Return what draws a pair of factors ``[2, d, k]`` that nothing links, by name."""

    def normal() -> Array:
        return rng.standard_normal((2, d, k))

    def rotation(n: int) -> Array:
        basis, upper = np.linalg.qr(rng.standard_normal((n, n)))
        return basis * np.sign(np.diag(upper))

    def chained(rho: float) -> Draw:
        root = np.linalg.cholesky(rho ** np.abs(np.subtract.outer(np.arange(d), np.arange(d))))
        return lambda: root @ normal()

    def spectrum(power: float, columns: float = 0.0) -> Draw:
        def draw() -> Array:
            basis = rotation(d)
            root = (basis * np.arange(1.0, d + 1) ** (-power / 2)) @ basis.T
            return root @ normal() * np.arange(1.0, k + 1) ** -columns

        return draw

    def subspace(rank: int, factor: float) -> Draw:
        def draw() -> Array:
            basis = rotation(d)[:, :rank]
            return (np.eye(d) + (factor - 1) * basis @ basis.T) @ normal()

        return draw

    def mean_direction(factor: float) -> Draw:
        return lambda: (np.eye(d) + (factor - 1) * np.full((d, d), 1 / d)) @ normal()

    def large_column() -> Array:
        factors = normal()
        factors[:, :, 0] *= 30
        return factors

    def large_channels() -> Array:
        factors = normal()
        factors[:, large] *= 30
        return factors

    def mean_and_large_channels() -> Array:
        factors = normal() + 3 * rng.standard_normal((2, 1, k))
        factors[:, large] *= 10
        return factors

    def truncated() -> Array:
        left, values, right = np.linalg.svd(rng.standard_normal((d, d)))
        return np.stack([left[:, :k] * values[:k], right[:k].T])

    def with_gains(spread: float) -> Draw:
        gains = np.exp(spread * rng.standard_normal((1, d, 1)))  # one network's: intervals are given the gains
        return lambda: gains * normal()

    large = rng.choice(d, 4, replace=False)
    columns = np.arange(1.0, k + 1)
    return {
        "normal": normal,
        "t3 entries": lambda: rng.standard_t(3, (2, d, k)),
        "truncated noise": truncated,
        "AR(1) channels, 0.5": chained(0.5),
        "AR(1) channels, 0.9": chained(0.9),
        "channel spectrum i^-1/2": spectrum(0.5),
        "channel spectrum i^-1": spectrum(1.0),
        "channel spectrum i^-2": spectrum(2.0),
        "shared subspace of 4, times 2": subspace(4, 2),
        "shared subspace of 8, times 3": subspace(8, 3),
        "mean direction, times 4": mean_direction(4),
        "mean direction, times 11": mean_direction(11),
        "columns j^-1/2": lambda: normal() * columns**-0.5,
        "columns j^-1": lambda: normal() * columns**-1.0,
        "columns j^-1, units rotated": lambda: normal() * columns**-1.0 @ rotation(k),
        "spectrum i^-1 and columns j^-1/2": spectrum(1.0, 0.5),
        "spectrum i^-1 and columns j^-1": spectrum(1.0, 1.0),
        "one column, times 30": large_column,
        "lognormal gains, 0.5": with_gains(0.5),
        "lognormal gains, 1": with_gains(1.0),
        "4 large channels": large_channels,
        "shared mean and 4 large channels": mean_and_large_channels,
    }


def simulate(rng: Generator, name: str, d: int, k: int) -> dict[str, Any]:
    """Measure a structure at a size, without a diagonal and with one planted."""
    n = SIZES[d, k]
    draw = structures(rng, d, k)[name]
    A, B = np.ascontiguousarray(np.swapaxes(np.stack([draw() for _ in range(n)]), 0, 1))
    found, fit = measured(A, B + PLANTED * A)
    return {
        "structure": name,
        "d": d,
        "k": k,
        "n": n,
        **level_of(A, B),
        "planted": covered(found, fit.alpha, fit.beta, float(fit.beta.mean())),
    }


def measured(A: Array, B: Array) -> tuple[Inference, DiagonalFit]:
    """Return what is found of a stack of products, a hundred at a time: of a thousand wide ones it takes 19 GB."""
    parts = [FactoredProduct(A[start : start + 100], B[start : start + 100]) for start in range(0, len(A), 100)]
    found, fits = zip(*((infer(part), fit_diagonal(part, None)) for part in parts), strict=True)
    return together(found), together(fits)


def together(parts: tuple[Any, ...]) -> Any:
    """Put results of one kind, whose fields are arrays, one behind the other."""
    return type(parts[0])(*(np.concatenate([getattr(part, each.name) for part in parts]) for each in fields(parts[0])))


def level_of(A: Array, B: Array) -> dict[str, Any]:
    """Return what is said of products that have no diagonal."""
    found, fit = measured(A, B)
    p_values = {test: getattr(found, test) for test in TESTS}
    p_values["max(sign, rotation)"] = np.maximum(found.sign_p_value, found.rotation_p_value)
    words = Counter(judgement.verdict for judgement in judge(fit, found, found.p_value))
    return {
        "below_0.05": {test: share(p < 0.05) for test, p in p_values.items()},
        "below_0.005": {test: share(p < 0.005) for test, p in p_values.items()},
        "words": {word.value: round(count / len(A), 4) for word, count in words.items()},
        "intervals": covered(found, fit.alpha, fit.beta, 0.0),
    }


def covered(found: Inference, alpha: Array, beta: Array, truth: float) -> dict[str, float]:
    """Return how often intervals hold beta's truth and alpha's root mean square, and their width over what is right."""
    rms = float(np.sqrt((alpha**2).mean()))
    return {
        "beta": share((found.beta_low <= truth) & (truth <= found.beta_high)),
        "beta_se_over_sd": round(float(np.sqrt((found.beta_stderr**2).mean()) / beta.std()), 3),
        "alpha": share((found.alpha_low <= rms) & (rms <= found.alpha_high)),
        "alpha_se_over_sd": round(float(np.sqrt((found.alpha_stderr**2).mean()) / alpha.std()), 3),
    }


def rotated(weights: HeadWeights, rng: Generator) -> HeadWeights:
    """Rotate the units of every head's query and value at random: no product keeps a diagonal but by chance."""

    def turned(factor: Array) -> Array:
        basis, upper = np.linalg.qr(rng.standard_normal((len(factor), factor.shape[-1], factor.shape[-1])))
        return factor @ (basis * np.sign(np.diagonal(upper, axis1=-2, axis2=-1))[:, None, :])

    return weights.replace(W_Q=turned(weights.W_Q), W_V=turned(weights.W_V))


def circuits(layers: list[HeadWeights], fold: Any) -> Iterator[tuple[str, FactoredProduct]]:
    """Yield every product of a network under a fold, stacks of heads and single sums."""
    for weights in layers:
        yield "qk", qk_circuit(weights, fold)
        yield "ov", ov_circuit(weights, fold)
        yield "sum", layer_ov(weights, fold)


def network(rng: Generator, layers: list[HeadWeights]) -> dict[str, Any]:
    """Measure the words and p-values of a network whose heads' units are rotated at random, by fold."""
    null = [rotated(weights, rng) for weights in layers]
    found: dict[str, Any] = {}
    for fold in FOLDS:
        measured = [(kind, fit_diagonal(p, None), infer(p)) for kind, p in circuits(null, fold)]
        found[fold] = {}
        for test in ("p_value", "sign_p_value"):
            words = [judgement.verdict for judgement in judged(measured, test)]
            p_values: dict[str, list[float]] = {}
            for kind, _, inference in measured:
                p_values.setdefault(kind, []).extend(np.ravel(getattr(inference, test)).tolist())
            found[fold][test] = {
                "identity": any("identity" in word.value for word in words),
                "any word": any(word not in SILENT for word in words),
                "p": p_values,
            }
    return found


def families(networks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count false words over networks and small p-values over their products, by fold."""
    rows = []
    for fold in FOLDS:
        tests = networks[0][fold]
        false = {
            f"{test}: {what}": rate(sum(each[fold][test][what] for each in networks), len(networks))
            for test in tests
            for what in ("any word", "identity")
        }
        alone = {
            f"{test}: {kind}": np.concatenate([each[fold][test]["p"][kind] for each in networks])
            for test in tests
            for kind in tests[test]["p"]
        }
        rows.append(
            {
                "fold": fold,
                "networks": len(networks),
                "circuits": sum(map(len, tests["p_value"]["p"].values())),
                "networks_with_a_false_word": false,
                "below_0.05": {what: share(p < 0.05) for what, p in alone.items()},
                "below_0.0005": {what: share(p < 0.0005) for what, p in alone.items()},
            }
        )
    return rows


def judged(measured: list[tuple[str, Any, Inference]], test: str) -> list[Judgement]:
    """Judge a whole network by the p-values of one test, corrected as one family."""
    p_values = corrected(np.concatenate([np.ravel(getattr(found, test)) for _, _, found in measured]))
    sizes = np.cumsum([np.size(found.p_value) for _, _, found in measured])[:-1]
    parts = np.split(p_values, sizes)
    return [word for (_, fit, found), p in zip(measured, parts, strict=True) for word in judge(fit, found, p)]


def power(rng: Generator, d: int, k: int, n: int, effect: float) -> dict[str, Any]:
    """Measure rejection and words at a planted diagonal."""
    A, B = rng.standard_normal((2, n, d, k))
    found, fit = measured(A, B + effect / math.sqrt(d * k) * A)  # beta = planted k, alpha = sqrt(d k)
    words = Counter(judgement.verdict for judgement in judge(fit, found, found.p_value))
    return {
        "d": d,
        "k": k,
        "n": n,
        "beta_d_over_alpha": effect,
        **{test: share(getattr(found, test) < LEVEL) for test in TESTS},
        "words": {word.value: round(count / n, 4) for word, count in words.items()},
    }


def share(held: Array) -> float:
    return round(float(np.mean(held)), 4)


def rate(count: int, n: int) -> dict[str, Any]:
    """Return a share with Clopper and Pearson's exact 95% interval."""
    interval = stats.binomtest(count, n).proportion_ci(0.95)
    return {"count": count, "rate": round(count / n, 4), "low": round(interval.low, 4), "high": round(interval.high, 4)}


def pieces(layers: list[HeadWeights], networks: int) -> dict[str, list[Piece]]:
    """Return every piece of every part, each with a generator that neither jobs nor the length of a part move."""
    names = structures(np.random.default_rng(SEED), 8, 2)
    parts: dict[str, list[Callable[[Generator], Any]]] = {
        "networks": [partial(network, layers=layers)] * networks if layers else [],
        "power": [partial(power, d=d, k=k, n=n, effect=effect) for d, k, n in POWER for effect in EFFECTS],
        "simulated": [partial(simulate, name=name, d=d, k=k) for d, k in SIZES for name in names],
    }
    generators = {part: np.random.default_rng([SEED, place]) for place, part in enumerate(parts)}
    return {part: list(zip(some, generators[part].spawn(len(some)), strict=True)) for part, some in parts.items()}


def timed(piece: Piece) -> tuple[Any, float]:
    """Return what a piece finds, and the CPU time it took: on a shared machine elapsed time measures the neighbours."""
    start = time.process_time()
    return piece[0](piece[1]), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", help=f"weights of {NETWORK}; without it no network is rotated")
    parser.add_argument("--networks", type=int, default=NETWORKS)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=os.devnull, help="file of what is done: the run goes on there")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "null_level.json")
    options = parser.parse_args()
    layers = []
    if options.checkpoint:
        import attnlens

        inspection = attnlens.inspect(NETWORK, options.checkpoint)
        layers = [inspection.heads(layer) for layer in inspection.layers]
    found: dict[str, Any] = {}
    seconds = 0.0
    parts = pieces(layers, options.networks)
    with ProcessPoolExecutor(options.jobs) as pool, options.keep.open("a+") as kept:
        kept.seek(0)
        done = [json.loads(line) for line in kept]
        for part, some in parts.items():
            before = [each for each in done if each[0] == part]
            found[part] = [result for _, result, _ in before]
            seconds += sum(took for *_, took in before)
            for result, took in pool.map(timed, some[len(before) :]):
                found[part].append(result)
                kept.write(json.dumps([part, result, took]) + "\n")
                kept.flush()
                seconds += took
                at = f"{part}: {len(found[part])} of {len(some)}, {seconds:.0f} s of CPU time"
                print(at, file=sys.stderr, flush=True)
    found["networks"] = families(found["networks"]) if layers else "left out: no --checkpoint"
    results: dict[str, Any] = {
        "command": f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')} "
        f"OPENBLAS_NUM_THREADS={os.environ.get('OPENBLAS_NUM_THREADS', 'unset')} python -m benchmarks.null_level"
        + (" --checkpoint FILE" if options.checkpoint else ""),
        "machine": platform.platform() + ", " + platform.machine(),
        **run_provenance(),
        "seed": SEED,
        **found,
        "cpu_seconds": round(seconds),
    }
    lines = [
        f"{json.dumps(key)}: "
        + ("[\n" + ",\n".join(map(json.dumps, value)) + "\n]" if isinstance(value, list) else json.dumps(value))
        for key, value in results.items()
    ]
    options.output.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
