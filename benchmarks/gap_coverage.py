"""Measure how often intervals for the share of a gap hold it: Fieller's, which reports give, and the bootstrap's.

    OMP_NUM_THREADS=1 python -m benchmarks.gap_coverage

writes `benchmarks/results/gap_coverage.json` in a few minutes of one core. A setting draws, for n seeds, the accuracies
of three arms, in points: what a seed gives all of them, and what each run adds. `given` is the share of comparisons in
which the share is given (`attnlens.training.statistics.gap_closed` refuses the others), `fieller` the share of those
whose interval holds the truth, `set` the same of Fieller's whole set over all comparisons, refused or not, `bootstrap`
the same of the percentile interval of seeds drawn again, on the comparisons where the share is given.
"""

import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from attnlens.atomic import write_text_atomic
from attnlens.heads import Array
from attnlens.training.statistics import LEVEL, fieller, gap_closed

SEED = 0
DRAWS, RESAMPLES = 10_000, 999
SEEDS = (3, 6, 10)
IMAGES = 797
"""Test images an accuracy is counted on, in the setting that rounds."""
SETTINGS: dict[str, dict[str, Any]] = {
    "half of ten points": {"share": 0.5, "gap": 10.0},
    "nothing of ten points": {"share": 0.0, "gap": 10.0},
    "more than the gap": {"share": 1.3, "gap": 10.0},
    "half of three points, noise of one": {"share": 0.5, "gap": 3.0},
    "half of ten points, counted on 797 images": {"share": 0.5, "gap": 10.0, "counted": True},
    "half of ten points, noise of t with 3 degrees of freedom": {"share": 0.5, "gap": 10.0, "heavy": True},
}
"""Runs add noise with a standard deviation of one point, what is pre-trained half of it, seeds one point."""


def draw(rng: Generator, n: int, *, share: float, gap: float, counted: bool = False, heavy: bool = False) -> Array:
    """Return accuracies ``[default / arm / pretrained, seed]`` as shares of 1."""
    noise = rng.standard_t(3, (4, n)) / np.sqrt(3) if heavy else rng.standard_normal((4, n))
    centre = 70 + np.array([[0], [share * gap], [gap]])
    values = (centre + noise[3] + noise[:3] * np.array([[1.0], [1.0], [0.5]])) / 100
    return np.round(values * IMAGES) / IMAGES if counted else values


def bootstrap(above: Array, whole: Array, rng: Generator) -> tuple[float, float]:
    """Return the percentile interval of the ratio of means, seeds drawn again whole."""
    seeds = rng.integers(0, len(above), (RESAMPLES, len(above)))
    low, high = np.quantile(above[seeds].mean(1) / whole[seeds].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def measure(name: str, n: int) -> dict[str, Any]:
    """Return how often the intervals of one setting hold the truth."""
    setting = SETTINGS[name]
    rng = np.random.default_rng([SEED, n, list(SETTINGS).index(name)])
    truth, given, held, whole_sets, drawn = setting["share"], 0, 0, 0, 0
    for _ in range(DRAWS):
        base, arm, best = draw(rng, n, **setting)
        values = {name: dict(enumerate(row)) for name, row in (("b", base), ("a", arm), ("p", best))}
        shares = fieller(arm - base, best - base)
        inside = shares.low <= truth <= shares.high
        whole_sets += shares.kind == "every" or inside == (shares.kind == "between")
        found = gap_closed(values, "a", baseline="b", pretrained="p")
        if found.refused:
            continue
        given += 1
        held += found.low <= truth <= found.high
        low, high = bootstrap(arm - base, best - base, rng)
        drawn += low <= truth <= high
    rates = {"fieller": held / given, "bootstrap": drawn / given} if given else {}
    return {
        "setting": name,
        "n": n,
        "given": given / DRAWS,
        "set": whole_sets / DRAWS,
        **{key: round(rate, 4) for key, rate in rates.items()},
    }


def main() -> None:
    """Measure every setting and write the results."""
    began = time.process_time()
    found = [measure(name, n) for name in SETTINGS for n in SEEDS]
    data = {
        "command": "OMP_NUM_THREADS=1 python -m benchmarks.gap_coverage",
        "versions": {name: version(name) for name in ("numpy", "scipy")},
        "seed": SEED,
        "level": LEVEL,
        "draws": DRAWS,
        "resamples": RESAMPLES,
        "settings": SETTINGS,
        "coverage": found,
        "cpu_seconds": round(time.process_time() - began),
    }
    write_text_atomic(Path(__file__).parent / "results" / "gap_coverage.json", json.dumps(data, indent=1) + "\n")
    for row in found:
        print(row)


if __name__ == "__main__":
    main()
