"""Every statistic of products of every kind is what it was: to 1e-7, or to 1e-10 where it is that small.

Other tests say what the numbers mean; these hold all of them. After a deliberate change:
``python -m tests.test_statistics_stored``.
"""

import json
import lzma
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from attnlens.circuits import FactoredProduct, WholeProduct, layer_ov, ov_circuit
from attnlens.errors import AttnlensError
from attnlens.statistics import inverse, nulls, trace
from attnlens.statistics.diagonal import DiagonalFit, fit_alpha_beta, fit_diagonal
from attnlens.statistics.gains import describe_gains, gain_profiles
from attnlens.statistics.inference import Inference, infer, noise_edge
from attnlens.statistics.pairs import offdiagonal_kurtosis, pair_moments
from attnlens.statistics.roots import bracketed_roots
from attnlens.statistics.verdicts import _Findings, _judge_one, corrected, judge
from tests.conftest import random_heads

STORED = Path(__file__).parent / "golden" / "statistics.json.xz"
RELATIVE, ABSOLUTE = 1e-7, 1e-10


def drawn(rows, cols, rank, count=3, seed=0):
    rng = np.random.default_rng([seed, rows, cols, rank])
    return rng.normal(size=(count, rows, rank)), rng.normal(size=(count, cols, rank))


def with_diagonal(size, beta, alpha=1.0, seed=1):
    """Return alpha Z + beta I, whole."""
    Z = np.random.default_rng(seed).normal(size=(size, size)) / math.sqrt(size)
    return WholeProduct.of(alpha * Z + beta * np.eye(size), size)


def few_channels(size, beta, alpha=1.0):
    M = with_diagonal(size, beta, alpha).dense()
    M[np.arange(4), np.arange(4)] += 6.0, -5.0, 8.0, 7.0
    return WholeProduct.of(M, size)


def low_rank(size, beta):
    (A,), (B,) = drawn(size, size, 2, count=1, seed=4)
    M = with_diagonal(size, beta).dense() + 4 * A @ A.T / size - 2 * B @ B.T / size
    return WholeProduct.of(M, size)


def linked(size, rank, share):
    A, B = drawn(size, size, rank, seed=2)
    return FactoredProduct(A, B + share * A)


def gained(size, rank):
    A, B = drawn(size, size, rank, seed=5)
    gains = np.exp(np.random.default_rng(6).normal(size=(2, 3, size, 1)))
    gains[0, 1, 3], gains[1, 2, :2] = 0, 0
    return FactoredProduct(A * gains[0], (B + A / 2) * gains[1])


def tied(size, rank):
    A, _ = drawn(size, size, rank, seed=7)
    return FactoredProduct(A, A)


PRODUCTS = {
    "noise": lambda: FactoredProduct(*drawn(31, 31, 7)),
    "one wide": lambda: FactoredProduct(*drawn(29, 29, 1)),
    "linked": lambda: linked(37, 11, 0.5),
    "turned": lambda: linked(37, 11, -0.3),
    "identity": lambda: with_diagonal(41, 0.6),
    "negative": lambda: with_diagonal(41, -0.3),
    "faint": lambda: with_diagonal(41, 0.08),
    "few channels": lambda: few_channels(41, 0.1),
    "mixed": lambda: few_channels(43, 0.0, alpha=0.05),
    "low rank": lambda: low_rank(43, 0.5),
    "negative low rank": lambda: low_rank(43, -0.5),
    "gains": lambda: gained(37, 5),
    "tied": lambda: tied(23, 5),
    "three": lambda: FactoredProduct(*drawn(3, 3, 2)),
    "two": lambda: FactoredProduct(*drawn(2, 2, 2)),
    "single": lambda: FactoredProduct(*drawn(1, 1, 3)),
    "oblong": lambda: FactoredProduct(*drawn(13, 11, 5)),
    "zero": lambda: FactoredProduct(np.zeros((2, 7, 3)), np.ones((2, 7, 3))),
    "exact": lambda: FactoredProduct(np.eye(9)[None], 0.5 * np.eye(9)[None]),
    "huge": lambda: FactoredProduct(*(side * 1e30 for side in drawn(17, 17, 5))),
    "small": lambda: FactoredProduct(*(side * 1e-30 for side in drawn(17, 17, 5))),
    "one matrix": lambda: FactoredProduct(*(side[0] for side in drawn(31, 31, 7, seed=8))),
    "sum": lambda: layer_ov(random_heads()),
    "heads": lambda: ov_circuit(random_heads(), "balanced"),
}


@cache
def product_of(name):
    return PRODUCTS[name]()


def numbers(found):
    """Return a statistic, or a record of some, as JSON."""
    if isinstance(found, DiagonalFit | Inference) or hasattr(found, "__dataclass_fields__"):
        return {name: numbers(value) for name, value in asdict(found).items()}
    if isinstance(found, dict):
        return {str(name): numbers(value) for name, value in found.items()}
    if isinstance(found, list | tuple):
        return [numbers(value) for value in found]
    if isinstance(found, np.ndarray | np.generic):
        return numbers(found.tolist())
    return None if isinstance(found, float) and math.isnan(found) else found


def described(name):
    """Return everything that is said of one stack of products."""
    product = product_of(name)
    size = product.shape[-1]
    singular = product.singular_values()
    found = {
        "fit": fit_diagonal(product, singular),
        "without spectra": fit_diagonal(product, None),
        "alpha beta": fit_alpha_beta(product),
        "gains": describe_gains(product if product.gains is not None or size == 1 else product.balanced()),
        "no gains": describe_gains(product),
        "kurtosis": offdiagonal_kurtosis(product) if product.is_square and size > 1 else None,
    }
    for title, options in (("inference", {}), ("at 80%", {"level": 0.8}), ("drawn", {"permutations": 300, "seed": 3})):
        inferred = infer(product, **options)
        p_values = corrected(inferred.p_value)
        judged = judge(found["fit"], inferred, p_values)
        found[title] = [inferred, p_values, [[str(one.verdict), one.reason] for one in judged]]
    if product.is_square and size > 2:
        found["nulls"] = _nulls(product)
    return numbers(found)


def _nulls(product):
    margins, squared_norm = product.squared_margins(), product.squared_norm()
    own = nulls.own_diagonal(product, margins)
    return {
        "own": own,
        "signs": [nulls.sign_flip_p_value(own), nulls.sign_flip_draws(own, 257, 1), nulls.sign_flip_draws(own, 256)],
        "pairing": [nulls.pairing_moments(product, squared_norm), nulls.pairing_p_value(product, squared_norm)],
        "drawn pairings": nulls.pairing_draws(product, 20, 1),
        "rotation": [nulls.rotation_p_value(product), nulls.rotation_draws(product, 20, 1)],
        "trace": [trace.null_variance(product), trace.sampling_variance(product), trace.trace_p_value(product)],
        "pairs": pair_moments(product, margins, 0),
    }


def signs():
    """Return p-values of sums against random signs, from certainty to what no sum is larger than."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(5, 40)) + np.array([0, 0.1, 0.3, 1.0, 5.0])[:, None]
    lone = np.zeros((3, 12))
    lone[0, 3], lone[1, :2], lone[2, :3] = -2.0, (1.0, 1.0), (3.0, -1.0, 1e-9)
    odd = np.array([[1.0, math.nan, 2.0], [1.0, -3.0, 2.0], [0.0, 0.0, 0.0], [1e-100, 2e-100, -1e-100]])
    sizes = np.exp(4 * rng.normal(size=(4, 25)))
    flipped = sizes * rng.choice([-1, 1], size=sizes.shape)
    given = (noise, lone, odd, sizes, flipped, np.ones((1, 10)), np.array([[1.0, -1.0]]), np.array([[1.0]]))
    return numbers([nulls.sign_flip_p_value(terms) for terms in given])


def inverted():
    """Return what requests realise and what to request, on a grid, with every refusal."""
    found = {}
    for rank, width in ((1, 16), (5, 16), (64, 192), (15, 16), (16, 16)):
        for alpha in (0.0, 1e-3, 0.2, 0.7, 3.0):
            for beta in (0.0, 0.3, -0.7, 2.0):
                key = f"{alpha} {beta} {rank} {width}"
                found[key] = [_tried(each, alpha, beta, rank, width) for each in (inverse.realised, inverse.request)]
    for wrong in ((-0.1, 0, 1, 2), (math.nan, 0, 1, 2), (0, math.inf, 1, 2), (1, 1, 0, 2), (1, 1, 3, 2)):
        found[str(wrong)] = [_tried(each, *wrong) for each in (inverse.realised, inverse.request)]
    sizes = np.array([3, 3, 3, 9]), np.array([9, 9, 9, 9])
    found["together"] = inverse.requests(np.array([0.5, 0.1, 0, 0.3]), np.array([-0.2, 0.9, 0, 4.0]), *sizes)
    found["cut"] = [inverse.cut(*given) for given in ((0.7, 0.7, 0.3), (0.1, 2.0, 0.9), (1.0, 0.0, 0.5), (0.5, 0.5, 1))]
    return numbers(found)


def _tried(function, *given):
    try:
        return list(function(*given))
    except AttnlensError as error:
        return f"{type(error).__name__}: {error}"


def roots():
    """Return the roots of functions of several shapes, side by side, and how often they were asked."""
    asked = []

    def function(x):
        asked.append(x.copy())
        shapes = (x[0] - 0.3, x[1] ** 3 - 0.001, np.tanh(50 * (x[2] - 0.9)), np.exp(9 * x[3]) - 2, x[4], x[5] - 1)
        return np.array([*shapes, np.sign(x[6] - 1 / 3), (x[7] - 0.5) ** 9])

    found = bracketed_roots(function, np.zeros(8), np.ones(8))
    return numbers([found, len(asked)])


def words():
    """Return the verdict on findings on both sides of every limit, with its reason."""
    plain = dict(zip(_Findings.__dataclass_fields__, (
        *(1e-9, 0.4, 0.3, 0.5, 9.0, 0.98, 0.99, 1.0, 1.0, 0.02, 0.9, 0.1, 2.0, 64.0, 100.0),
    ), strict=True))  # fmt: skip
    changes = [
        *({"p": p} for p in (math.nan, 0.0499999, 0.05, 0.9, 1e-307, 9.9e-308, 0.0)),
        *({"p": 0.5, "typical_ratio": ratio, "sign_agreement": 0.5} for ratio in (2.0, 2.0001)),
        *({"p": 0.5, "spread_ratio": ratio} for ratio in (2.0, 2.0001)),
        *({"sign_agreement": share, "expected_agreement": 1.0} for share in (0.64, 0.66)),
        *({"sign_agreement": share, "typical_ratio": 4.0} for share in (0.2, 0.99)),
        {"sign_agreement": 0.2, "spread_ratio": 9.0},
        *({"beta_low": low} for low in (0.0, 1e-9)),
        {"identity_z": -9.0},
        {"beta": -0.4, "beta_low": -0.5, "beta_high": -0.3, "identity_z": -9.0},
        {"beta": -0.4, "beta_low": -0.5, "beta_high": 0.0, "identity_z": -9.0},
        *({"bulk_trace_share": share} for share in (0.5, 0.4999, 0.2178, 0.2177, -0.3)),
        *({"share_low_rank": share} for share in (0.5, 0.5001)),
        {"beta": -0.4, "beta_low": -0.5, "beta_high": -0.3, "identity_z": -9.0, "share_low_rank": 0.7},
    ]
    judged = [_judge_one(_Findings(**{**plain, **change})) for change in changes]
    return [[str(one.verdict), one.reason] for one in judged]


def profiles():
    """Return the gains of each side by layer, with a channel that is dead, and a layer of another width."""
    by_place = {}
    for layer, size in ((2, 11), (0, 11), (1, 7)):
        A, B = drawn(size, size, 3, seed=layer)
        A[:, 4], B[0, 2] = 0, 0
        by_place[layer, "qk", "each"] = FactoredProduct(A, B).balanced().gains
        by_place[layer, "ov", "all"] = FactoredProduct(A[0], B[0]).balanced().gains
    only = {place: gains for place, gains in by_place.items() if place[0] == 1}
    return numbers([gain_profiles(by_place), gain_profiles(only), gain_profiles({})])


def others():
    """Return what has no product: edges of noise, corrected p-values."""
    families = ([0.01, 0.04, 0.03], [[0.5, math.nan], [0.001, 0.9]], [], [math.nan], [0.02, 0.02, 0.5, 0.01])
    edges = [noise_edge(*given) for given in ((64, 64), (1, 64), (8, 64), (63, 64))]
    return numbers([edges, [corrected(np.array(family)) for family in families]])


CASES = {
    **{name: (lambda n=name: described(n)) for name in PRODUCTS},
    **{each.__name__: each for each in (signs, inverted, roots, words, profiles, others)},
}


def apart(found, stored, place=""):
    """Yield every place where two outputs differ."""
    if isinstance(stored, dict) and isinstance(found, dict) and stored.keys() == found.keys():
        for name in stored:
            yield from apart(found[name], stored[name], f"{place}.{name}")
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        for index, pair in enumerate(zip(found, stored, strict=True)):
            yield from apart(*pair, f"{place}[{index}]")
    elif isinstance(stored, float) and isinstance(found, float):
        if not math.isclose(found, stored, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            yield f"{place}: {found!r}, stored {stored!r}"
    elif found != stored or type(found) is not type(stored):
        yield f"{place}: {found!r}, stored {stored!r}"


@pytest.fixture(scope="module")
def stored():
    return json.loads(lzma.decompress(STORED.read_bytes()))


def test_every_case_is_stored(stored):
    assert stored.keys() == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_no_statistic_has_moved(stored, case):
    assert list(apart(json.loads(json.dumps(CASES[case]())), stored[case])) == []


def test_what_moved_is_found():
    kept = {"a": [1.0, None], "b": "x", "c": 3}
    assert list(apart({"a": [1.0 + 1e-8, None], "b": "x", "c": 3}, kept)) == []
    for moved in ({**kept, "a": [1 + 2e-7, None]}, {**kept, "a": [1.0]}, {**kept, "c": 4}, {**kept, "d": 1}):
        assert len(list(apart(moved, kept))) == 1


if __name__ == "__main__":
    STORED.write_bytes(lzma.compress(json.dumps({name: case() for name, case in CASES.items()}).encode(), preset=9))
