"""Which way a draw takes to its factors, and that every way is the one its documentation describes."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from attnlens.circuits import qk_circuit
from attnlens.inits import gained, truncation
from attnlens.inits.gained import apart, offdiagonal_tails, placed
from attnlens.inits.plan import Plan, PlannedGains, Request
from attnlens.inits.products import draw_matrix, plan_ov, plan_qk
from attnlens.inits.registry import find_initialiser
from attnlens.inits.report import measure
from attnlens.inits.rules.controls import with_random_directions
from attnlens.inits.rules.teacher import _plan as planned_of_teacher
from attnlens.inits.truncation import Band, haar, singular_value, split, unwanted_band
from attnlens.inits.verify.mistakes import recognise, tolerance_at
from attnlens.statistics.inverse import Parameters
from tests.drawn_cases import NETWORKS, params, vit
from tests.test_inits_limits import layers_of
from tests.test_inits_pieces import row_of


@pytest.fixture(scope="module")
def layer():
    return layers_of(vit())[1][1]


def noise(rows, cols, batch=1, seed=0):
    return torch.randn(batch, rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Truncation.

SINGLE, DOUBLE = torch.float32, torch.float64


@pytest.mark.parametrize(
    ("rows", "cols", "count", "band", "ways"),
    [
        (30, 30, 5, True, ["krylov", DOUBLE]),
        (30, 30, 5, False, [DOUBLE]),
        (30, 30, 6, True, [DOUBLE]),  # more than a sixth
        (24, 24, 4, True, [DOUBLE]),  # narrow
        (30, 24, 4, True, [DOUBLE]),
        (60, 25, 4, True, ["krylov", DOUBLE]),
        (60, 30, 7, True, [DOUBLE]),
        (30, 30, 30, False, [SINGLE]),
        (60, 30, 30, False, [SINGLE]),
        (30, 30, 29, False, [DOUBLE]),
        (24, 24, 24, False, [DOUBLE]),
        (30, 24, 24, False, [DOUBLE]),
    ],
)
def test_the_way_to_the_factors_is_taken_by_width_and_number_of_directions(monkeypatch, rows, cols, count, band, ways):
    seen, dense = [], truncation._dense
    monkeypatch.setattr(truncation, "_WIDE", 24)
    monkeypatch.setattr(truncation, "_krylov", lambda *_: seen.append("krylov"))
    monkeypatch.setattr(truncation, "_dense", lambda A, k: (seen.append(A.dtype), dense(A, k))[1])
    A = noise(rows, cols)
    left, right = split(A, count, Band(0.1, 0.2) if band else None)
    assert seen == ways
    U, S, Vh = torch.linalg.svd(A[0], full_matrices=False)
    best = (U[:, :count] * S[:count]) @ Vh[:count]
    assert float((left[0] @ right[0].T - best).norm() / best.norm()) < 1e-5


def test_a_space_that_loses_its_rank_gives_way_to_the_exact_one(monkeypatch):
    def lost(*_):
        raise torch.linalg.LinAlgError

    monkeypatch.setattr(truncation, "_WIDE", 24)
    monkeypatch.setattr(truncation, "_krylov", lost)
    found = split(noise(30, 30), 5, Band(0.1, 0.2))
    assert all(torch.equal(*pair) for pair in zip(found, split(noise(30, 30), 5), strict=True))


def test_the_longest_entry_of_a_right_vector_is_positive_and_directions_of_nothing_are_zero():
    A = torch.zeros(1, 6, 5, dtype=torch.float64)
    A[0, 0, 0], A[0, 1, 1] = -4.0, -9.0
    left, right = split(A, 3)
    torch.testing.assert_close(left[0, :2], torch.tensor([[0.0, -2.0, 0.0], [-3.0, 0.0, 0.0]], dtype=torch.float64))
    assert right[0, 1, 0] == pytest.approx(3)
    assert right[0, 0, 1] == pytest.approx(2)
    assert not left[0, :, 2].any()
    assert not right[0, :, 2].any()


@pytest.mark.parametrize(("rows", "cols"), [(7, 5), (5, 7), (9, 9), (4, 1)])
def test_a_gram_matrix_is_formed_from_its_lower_half(rows, cols):
    A = noise(rows, cols, batch=2)
    torch.testing.assert_close(truncation._gram(A), A.mT @ A)


@pytest.mark.parametrize("degree", range(1, 6))
def test_the_filter_is_the_chebyshev_polynomial(monkeypatch, degree):
    monkeypatch.setattr(truncation, "_DEGREE", degree)
    x = torch.linspace(-1.2, 1.2, 7, dtype=torch.float64)
    found = truncation._chebyshev(torch.diag(x)[None], torch.eye(7, dtype=torch.float64)[None])[0]
    expected = np.polynomial.chebyshev.chebval(x.numpy(), [0] * degree + [1])
    np.testing.assert_allclose(found.numpy(), np.diag(expected), atol=1e-12)


def test_rows_are_made_orthonormal_and_span_what_they_spanned():
    block = noise(4, 9)
    found = truncation._orthonormal_rows(block)
    torch.testing.assert_close(found @ found.mT, torch.eye(4, dtype=torch.float64)[None])
    torch.testing.assert_close(block @ found.mT @ found, block)


def krylov(monkeypatch, pair=(0.7, 0.7), width=528, count=24, band=None):
    """Return what the Krylov space gives, the matrix it filters by, and the sizes at which it is looked at."""
    A = draw_matrix(pair, width, "normal", torch.Generator().manual_seed(0))[None]
    band = band or unwanted_band(*pair, count, width)
    matrices, sizes = [], []
    filtered, decomposed = truncation._chebyshev, torch.linalg.eigh
    monkeypatch.setattr(truncation, "_chebyshev", lambda G, X: (matrices.append(G.clone()), filtered(G, X))[1])
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: (sizes.append(M.shape[-1]), decomposed(M))[1])
    found = truncation._krylov(A, count, band)
    monkeypatch.undo()
    return A[0], band, found, matrices, sizes


@pytest.mark.parametrize("band", [None, Band(0.3, 0.9)])
def test_the_filter_is_below_one_on_the_unwanted_band(monkeypatch, band):
    A, band, found, matrices, _ = krylov(monkeypatch, band=band)
    G = matrices[0][0].double()
    low, high = band.low**2, band.high**2
    expected = (A.T @ A - (high + low) / 2 * torch.eye(528)) * 2 / (high - low)
    assert float((G - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    assert all(matrix is not None and torch.equal(matrix, matrices[0]) for matrix in matrices)
    assert found is not None
    image, basis = (part[0] for part in found)
    torch.testing.assert_close(basis.T @ basis, torch.eye(24, dtype=torch.float64))
    torch.testing.assert_close(image, A @ basis)


def test_convergence_is_looked_at_from_two_fifths_on_and_then_at_every_second_block(monkeypatch):
    *_, matrices, sizes = krylov(monkeypatch)
    spaces = sizes[:-1]  # the last is of the directions that are kept
    assert spaces == list(
        range(120, 120 + 24 * len(spaces), 24)
    )  # 2.2 (24 + 20) = 96.8, in even numbers of blocks of 12
    assert sizes[-1] == 24 + 20
    assert 12 * len(matrices) == spaces[-1]
    assert len(spaces) == 1


def test_a_space_that_does_not_converge_ends_at_half_the_width(monkeypatch):
    *_, found, matrices, sizes = krylov(monkeypatch, band=Band(0.0, 60.0))  # no direction grows
    assert found is None
    assert len(matrices) == 528 // 2 // 12
    assert sizes == list(range(120, 265, 24))


def test_the_unwanted_band_is_the_law_of_the_singular_values():
    S = torch.linalg.svdvals(draw_matrix((0.6, -0.5), 800, "normal", torch.Generator().manual_seed(0)))
    band = unwanted_band(0.6, -0.5, 100, 800)
    assert band.high == pytest.approx(float(S[119]), rel=0.02)
    assert band.low == pytest.approx(float(S[-1]), abs=0.02)
    for kept in (0.1, 0.5, 0.9):
        assert singular_value(0.6, -0.5, kept) == pytest.approx(float(S[round(800 * kept)]), rel=0.02, abs=5e-3)
    assert unwanted_band(0.05, 1.0, 10, 100) is None  # float32 cannot tell its directions apart
    assert unwanted_band(0.051, -1.0, 10, 100) is not None
    assert unwanted_band(0.05, -1.0, 10, 100) is None
    assert unwanted_band(0.7, 0.7, 80, 100) is None
    assert unwanted_band(0.7, 0.7, 79, 100) is not None


def test_haar_columns_are_orthonormal_and_uniform():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([haar(5, 3, generator) for _ in range(400)])
    assert draws.dtype == torch.float64
    torch.testing.assert_close(draws.mT @ draws, torch.eye(3, dtype=torch.float64).expand(400, -1, -1))
    assert float(draws.mean(0).abs().max()) < 5 / math.sqrt(400 * 5)  # QR alone gives one sign to the diagonal


# Products at alpha = 0.


@pytest.mark.parametrize("beta", [0.7, -0.7, -0.2])
def test_a_diagonal_alone_is_split_on_directions_drawn_uniformly(layer, beta):
    plan = plan_qk(layer, [(0.0, beta)] * 2, "normal")
    for query, key in zip(plan.W_Q, plan.W_K, strict=True):
        product = query @ key.T
        np.testing.assert_allclose(product @ product, beta * product, atol=1e-12)
        assert np.trace(product) == pytest.approx(13 * beta)
        np.testing.assert_allclose((query**2).sum(0), abs(beta))


# What is measured.


def test_tails_are_measured_of_balanced_products_with_gains_alone(layer):
    plan = Plan(W_Q=layer.weights.W_Q, W_K=layer.weights.W_K, requests=(Request("qk", 0, 0.5, 0.25),))
    given = Plan(plan.W_Q, plan.W_K, requests=plan.requests, gains=(PlannedGains("qk", 1, True, 7.0),))

    def told(plan, fold):
        return measure(layer, layer.weights, plan, fold)

    for one, fold in ((plan, "balanced"), (given, "effective"), (plan, "raw")):
        assert all(math.isnan(row.kurtosis) for row in told(one, fold))
    rows = told(given, "balanced")
    assert all(math.isfinite(row.kurtosis) for row in rows)
    assert [row.requested_kurtosis for row in rows] == [pytest.approx(math.nan, nan_ok=True), 7.0]
    assert (rows[0].requested_alpha, rows[0].requested_beta) == (0.5, 0.25)
    assert all(math.isnan(value) for value in (rows[1].requested_alpha, rows[1].expected_beta))
    dense = qk_circuit(layer.weights).dense()
    assert [row.beta for row in told(plan, "raw")] == pytest.approx(np.trace(dense, axis1=1, axis2=2) / 26)
    assert [row.circuit for row in rows] == ["qk", "qk"]


@pytest.mark.parametrize(("away", "name"), [(0.99, "sign"), (-0.99, "sign"), (1.01, ""), (-1.01, "")])
def test_a_mistake_is_recognised_within_one_tolerance_of_its_prediction(layer, away, name):
    predicted = Parameters(0.5, -0.3)
    limit = tolerance_at(predicted, 26, 0.0)
    more = {"requested_alpha": 50.0, "requested_beta": 0.3, "expected_alpha": 0.5, "expected_beta": 0.3}
    row = row_of(**more, alpha=0.5, beta=-0.3 + away * limit.beta)
    assert recognise(layer, row, "raw", 0.0) == name
    assert recognise(layer, row_of(**{**more, "expected_alpha": math.nan}, alpha=0.5, beta=-0.3), "raw", 0.0) == ""


# Places of gains.


def exchanged_one_by_one(N, rows, cols, wanted):
    """Return the order of `placed`, every pair of channels tried by the tails it gives."""
    order = np.arange(len(N))

    def away(order):
        ranks = np.argsort(order)
        return float(apart(offdiagonal_tails(N[np.ix_(ranks, ranks)], rows, cols), wanted))

    free, steps = [i for i in range(len(N)) if rows[i] > 0 and cols[i] > 0], 0
    while away(order) > 0.05 and steps < 64:
        u, w = rows[order] ** 2, cols[order] ** 2
        top = sorted(free, key=lambda i: -(u + w)[i])[:32]
        tried = []
        for a in top:
            for b in free:
                other = order.copy()
                other[[a, b]] = other[[b, a]]
                tried.append((away(other), other))
        nearest = min(tried, key=lambda pair: pair[0])
        if not nearest[0] < away(order):
            break
        order, steps = nearest[1], steps + 1
    return np.argsort(order), steps


@pytest.mark.parametrize(
    ("seed", "size", "spread", "wanted"), [(3, 36, 1.0, 60.0), (3, 36, 1.0, 4000.0), (4, 40, 0.3, 3.0)]
)
def test_places_are_those_of_exchanging_channels_one_by_one(seed, size, spread, wanted):
    rng = np.random.default_rng(seed)
    N, gains = rng.normal(size=(size, size)) ** 3, np.exp(spread * rng.normal(size=(2, size)))
    if spread == 1:
        gains[0, 5], gains[1, 7] = 0.0, 0.0
    expected, steps = exchanged_one_by_one(N, *gains, wanted)
    assert steps > 0
    found = placed(N, *gains, wanted)
    np.testing.assert_array_equal(found, expected)


def test_channels_are_exchanged_64_times_at_most(monkeypatch):
    rng = np.random.default_rng(0)
    N, gains = rng.normal(size=(150, 150)), np.exp(0.3 * rng.normal(size=(2, 150)))
    exchanged, exchange = [], gained._Sum.exchange
    monkeypatch.setattr(gained._Sum, "exchange", lambda self, pair: (exchanged.append(pair), exchange(self, pair))[1])
    placed(N, *gains, -1.0)
    assert len(exchanged) == 2 * 64  # of squares and of fourth powers


def test_a_sum_is_known_whole_where_all_of_it_is_kept_and_no_gains_are_laid_on(layer):
    plan = plan_ov(layer, (0.4, -0.4), "normal", "svd")
    drawn = draw_matrix((0.4, -0.4), 26, "normal", layer.streams.generator("ov", layer.index))
    np.testing.assert_array_equal(plan.total, drawn.numpy())
    np.testing.assert_allclose(np.einsum("hdv,hvo->do", plan.W_V, plan.W_O), plan.total, atol=1e-12)
    _, (narrow,) = layers_of(NETWORKS["grouped"]())
    assert plan_ov(narrow, (0.4, -0.4), "normal", "svd").total is None
    network, layers = layers_of(vit())
    for gains, known in (("none", True), ("quantiles", False)):
        rule = find_initialiser("fitted").rule(network, {"params": params(), "gains": gains})
        assert (rule.plan(layers[0]).total is not None) == known


# Random directions.


@pytest.mark.parametrize("lone", ["W_Q", "W_K", "W_V", "W_O"])
def test_a_factor_without_its_other_is_left_as_it_is(layer, lone):
    weight = getattr(layer.weights, lone)
    found = with_random_directions(layer, Plan(**{lone: weight}))
    assert list(found.weights()) == [lone[-1].lower()]
    assert getattr(found, lone) is weight


# Teachers.


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("role", "qkvo")
def test_a_bias_that_one_of_the_two_lacks_takes_no_other_with_it(layer, role, side):
    has, lacks = layer.weights, layer.weights.replace(**{f"b_{role.upper()}": None})
    mine, theirs = (has, lacks) if side == "teacher" else (lacks, has)
    found = planned_of_teacher(replace(layer, weights=mine), theirs, "raw", lambda weight, _: weight)
    assert list(found.biases) == [other for other in "qkvo" if other != role]
    for other, bias in found.biases.items():
        np.testing.assert_array_equal(bias, getattr(layer.weights, f"b_{other.upper()}"))
