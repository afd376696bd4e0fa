"""Work on head products, timed inside a process of its own, after imports and reading.

    python -m benchmarks.speed.inside WEIGHTS attnlens
    python -m benchmarks.speed.inside WEIGHTS dense
    python -m benchmarks.speed.inside WEIGHTS "FactoredMatrix, float64" spectra,eigenvalues 24

The first is every statistic and spectrum as `inspect` has them, the second the same from d x d matrices of one layer;
the third a tool of `benchmarks.suite` on so many of the 24 stacks of products. Prints wall and CPU seconds for 288.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np

from attnlens.circuits import ov_circuit, qk_circuit
from attnlens.heads import HeadWeights
from attnlens.models.open import open_model
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.threads import over_threads

MODEL, PRODUCTS = "vit_base_patch16_224", 288


def attnlens(layers: list[HeadWeights]) -> Callable[[], int]:
    """Fit every product with its spectrum, by the threads that `inspect` has."""
    stacks = [make(weights) for weights in layers for make in (qk_circuit, ov_circuit)]
    return lambda: sum(len(fit.alpha) for fit in over_threads(lambda M: fit_diagonal(M, M.singular_values()), stacks))


def dense(layers: list[HeadWeights]) -> Callable[[], int]:
    """Compute the same statistics of a quarter of the first layer's heads from the matrices themselves."""
    first = layers[0]
    some = range(0, len(first.W_Q), 4)
    assert first.W_O is not None
    matrices = [first.W_Q[i] @ first.W_K[i].T for i in some] + [first.W_V[i] @ first.W_O[i] for i in some]
    return lambda: len([statistics(M) for M in matrices])


def statistics(M: np.ndarray) -> list[float]:
    """Return what `DiagonalFit` holds of one matrix."""
    d, diagonal = len(M), np.diag(M)
    off = M[~np.eye(d, dtype=bool)]
    s, values, norm = np.linalg.svd(M, compute_uv=False), np.linalg.eigvals(M), np.linalg.norm(M)
    share = s[s > 0] / s.sum()
    return [
        *(np.sqrt(d * (off**2).mean()), diagonal.mean(), diagonal.std(ddof=1) / d**0.5, diagonal.mean() / off.std()),
        *(norm, s[0], (s**2).sum() / s[0] ** 2, diagonal.sum() / norm / d**0.5, np.exp(-(share * np.log(share)).sum())),
        *(values.real.sum() / np.abs(values).sum(), (np.linalg.norm(M + M.T) / 2 / norm) ** 2),
        (diagonal * diagonal.mean() > 0).mean(),
    ]


def tool(layers: list[HeadWeights], name: str, tasks: str, count: str) -> Callable[[], int]:
    """Let a tool do its tasks on float32 factors, after one product of each that is not timed."""
    from benchmarks.suite.methods import TOOLS

    sides = [side for w in layers for side in ((w.W_Q, w.W_K), (w.W_V, np.swapaxes(w.W_O, 1, 2)))]  # type: ignore[arg-type]
    stacks = [tuple(np.ascontiguousarray(side, np.float32) for side in pair) for pair in sides][: int(count)]
    work = [TOOLS[name].tasks[task] for task in tasks.split(",")]

    def each(stack: tuple[np.ndarray, ...]) -> int:
        for task in work:
            task(*stack)
        return len(stack[0])

    each(tuple(side[:1] for side in stacks[0]))
    return lambda: sum(map(each, stacks))


def main(weights: str, what: str, *rest: str) -> None:
    """Read the weights, work, and print."""
    opened = open_model(MODEL, weights)
    layers = [opened.heads(layer) for layer, _ in opened.architecture.indexed()]
    ways = {"attnlens": attnlens, "dense": dense}
    work = tool(layers, what, *rest) if rest else ways[what](layers)
    wall, cpu = time.perf_counter(), time.process_time()
    share = PRODUCTS / work()
    print((time.perf_counter() - wall) * share, (time.process_time() - cpu) * share)


if __name__ == "__main__":
    main(*sys.argv[1:])
