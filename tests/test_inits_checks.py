"""What `verify-init` looks at, by itself: splits, directions, biases, clones, reused noise; and places of gains."""

import math
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import torch

from attnlens.circuits import FactoredProduct, qk_circuit
from attnlens.errors import ModelNotFoundError, UnsupportedAttentionError, UsageError
from attnlens.inits import create_model
from attnlens.inits.apply import planned_layers, run_each
from attnlens.inits.gained import Factors, apart, offdiagonal_tails, placed
from attnlens.inits.plan import FilterPlan, Plan, Rule
from attnlens.inits.verify.check import Check, stored_eps
from attnlens.inits.verify.factors import bias_deviations, empty_directions, skipped_directions, split_problem
from attnlens.inits.verify.gains import has_dead_channels
from attnlens.inits.verify.marks import with_clones, with_reuse
from attnlens.inits.verify.mistakes import clones, off_diagonal_cosine, squared_values
from attnlens.inits.verify.reuse import SAMPLE, Reuse, Signs, places, reused, signs_of
from attnlens.layouts.spec import Refusal
from tests.drawn_cases import SIZES, vit
from tests.test_inits_limits import layers_of
from tests.test_inits_pieces import row_of


@pytest.fixture(scope="module")
def layer():
    return layers_of(vit())[1][1]


# Gains and their places.


def test_distances_of_tails_are_relative_where_they_are_large_and_in_tenths_near_zero():
    assert float(apart(10.0, 8.0)) == pytest.approx(math.log(10 / 8), rel=1e-2)
    assert float(apart(0.01, 0.0)) == pytest.approx(0.1, rel=1e-2)
    assert float(apart(-3.0, 3.0)) == pytest.approx(2 * math.asinh(30))


def test_a_place_of_the_channels_brings_the_tails_and_leaves_the_dead_ones():
    rng = np.random.default_rng(0)
    N, rows, cols = rng.normal(size=(40, 40)) ** 3, *np.exp(rng.normal(size=(2, 40)))
    rows[5], cols[7] = 0.0, 0.0
    for wanted in (40.0, 60.0, 200.0):
        order = placed(N, rows, cols, wanted)
        assert sorted(order) == list(range(40))
        assert (order[5], order[7]) == (5, 7)
        entries = (rows[:, None] * N[np.ix_(order, order)] * cols)[~np.eye(40, dtype=bool)]
        found = (entries**4).mean() / (entries**2).mean() ** 2 - 3
        assert offdiagonal_tails(N[np.ix_(order, order)], rows, cols) == pytest.approx(found)
        assert float(apart(found, wanted)) <= 0.05
    near = offdiagonal_tails(N, rows, cols)
    assert list(placed(N, rows, cols, near * 1.04)) == list(range(40))
    apart_rows, apart_cols = np.array([1.0, 0.0, 0.0]), np.array([0.0, 1.0, 2.0])  # no channel has both gains
    assert list(placed(N[:3, :3], apart_rows, apart_cols, 1.0)) == [0, 1, 2]


def test_factors_that_are_not_narrower_than_their_product_make_it_whole():
    rng = np.random.default_rng(0)
    for inner, kind in ((4, "FactoredProduct"), (5, "WholeProduct"), (6, "WholeProduct")):
        left, right = rng.normal(size=(2, 5, inner))
        product = Factors(left, right).product()
        assert type(product).__name__ == kind
        np.testing.assert_allclose(product.dense(), left @ right.T)
        assert product.rank_bound == min(inner, 5)


# Checks.


def test_rounding_of_the_types_that_weights_are_stored_in():
    assert stored_eps(torch.ones(1)) == pytest.approx(2**-23)
    assert stored_eps(torch.ones(1, dtype=torch.bfloat16)) == 2**-7
    assert stored_eps(np.ones(1, np.float16)) == 2**-10
    assert stored_eps(np.ones(1, ml_dtypes.bfloat16)) == 2**-7


def test_a_split_is_judged_by_the_ratio_of_the_factors_norms(layer):
    weights = layer.weights
    plan = Plan(W_Q=weights.W_Q, W_K=weights.W_K, W_V=weights.W_V, W_O=weights.W_O)

    def told(circuit, head, limit, **changes):
        other = replace(layer, weights=weights.replace(**changes))
        return split_problem(other, row_of(circuit, head), plan, "raw", limit)

    assert told("qk", 1, 1e-3) == ""
    assert told("qk", 1, 1e-3, W_Q=weights.W_Q * 1.0009) == ""
    assert told("qk", 1, 1e-3, W_Q=weights.W_Q * 1.0011).endswith("within 0.1%")
    assert told("qk", 1, 1e-3, W_K=weights.W_K / 1.1).startswith("||W_Q|| / ||W_K|| is ")
    assert told("ov", "all", 1e-3, W_O=weights.W_O / 1.1).startswith("||W_V|| / ||W_O|| is ")
    assert told("ov", 0, 1e-3, W_V=weights.W_V * 1.1).startswith("||W_V|| / ||W_O|| is ")
    one = weights.W_Q.copy()
    one[0] *= 2
    assert told("qk", 1, 1e-3, W_Q=one) == ""  # of its own head
    spreads = {("qk", 0): 26 * 13, ("ov", "all"): 26 * 26, ("ov", 1): 26 * 13}
    for (circuit, head), count in spreads.items():
        limit, name = 6 / math.sqrt(count), "W_Q" if circuit == "qk" else "W_V"
        for share, passes in ((0.98, True), (1.02, False)):
            scaled = getattr(weights, name) * math.exp(limit * share)
            assert (told(circuit, head, None, **{name: scaled}) == "") == passes
    assert told("qk", 0, 1e-3, W_Q=weights.W_Q * 0) == ""


def test_directions_that_hold_nothing_are_counted(layer):
    W = layer.weights.W_Q.copy()
    W[0, :, 10:] = 0
    other = replace(layer, weights=layer.weights.replace(W_Q=W))
    assert empty_directions(other, row_of("qk", 0), "raw", 13) == 3
    assert empty_directions(other, row_of("qk", 1), "raw", 13) == 0
    none = replace(layer, weights=layer.weights.replace(W_Q=W * 0))
    assert empty_directions(none, row_of("qk", 0), "raw", 13) == 13


@pytest.mark.parametrize(
    ("gone", "factor", "rest", "expected"),
    [(1, 0.0, 1.0, 1), (6, 0.0, 1.0, 6), (7, 0.0, 1.0, 0), (1, 0.09, 1.0, 1), (1, 0.11, 1.0, 0), (1, 0.0, 1.009, 1),
     (1, 0.0, 1.011, 0), (1, 0.0, 0.989, 0), (0, 0.0, 1.0, 0)],
)  # fmt: skip
def test_directions_are_missing_where_the_others_are_as_planned(layer, gone, factor, rest, expected):
    W_Q, W_K = (weights.copy() for weights in (layer.weights.W_Q, layer.weights.W_K))
    product = qk_circuit(layer.weights).head(0).dense()
    U, S, Vh = np.linalg.svd(product)
    scale = np.where(np.arange(13) < gone, factor, rest) * S[:13]
    W_Q[0], W_K[0] = U[:, :13] * scale, Vh[:13].T
    other = replace(layer, weights=layer.weights.replace(W_Q=W_Q, W_K=W_K))
    assert skipped_directions(other, row_of("qk", 0), layer.weights, "raw") == expected


def test_biases_deviate_in_units_of_the_larger_of_one_and_themselves(layer):
    have = layer.weights
    planned = have.replace(b_Q=have.b_Q + 0.5, b_K=None, b_V=np.full_like(have.b_V, 4.0), b_O=have.b_O)
    found = dict(bias_deviations(have, planned, frozenset("qkvo")))
    assert found.keys() == {"b_Q", "b_V", "b_O"}
    assert found["b_Q"] == pytest.approx(0.5)
    assert found["b_V"] == pytest.approx(np.abs(have.b_V - 4).max() / 4)
    assert found["b_O"] == 0
    assert dict(bias_deviations(have, planned, frozenset("o"))) == {"b_O": 0}


def test_a_planned_channel_without_weights_is_dead(layer):
    weights = layer.weights
    assert not has_dead_channels(Plan(W_Q=weights.W_Q, W_O=weights.W_O))
    for name, place in (("W_Q", (0, 3)), ("W_K", (1, 0)), ("W_O", (1, slice(None), 2))):
        dead = getattr(weights, name).copy()
        dead[place] = 0
        assert has_dead_channels(Plan(**{name: dead}))
    unit = weights.W_O.copy()
    unit[0, 2] = 0  # a unit of a head is no channel
    assert not has_dead_channels(Plan(W_O=unit))


def noise(count=4, seed=0):
    A, B = np.random.default_rng(seed).normal(size=(2, count, 30, 6))
    return A, B


def test_heads_that_repeat_an_earlier_one_are_found_with_the_first_of_them():
    A, B = noise()
    A[2], B[2] = A[0] * 2, B[0]
    A[3], B[3] = A[0], B[0] * 3
    assert [pair[:2] for pair in clones(FactoredProduct(A, B))] == [(0, 2), (0, 3)]
    assert all(cosine == pytest.approx(1) for *_, cosine in clones(FactoredProduct(A, B)))
    assert clones(FactoredProduct(*noise())) == []
    one, other = FactoredProduct(A, B).head(0), FactoredProduct(A, B).head(1)
    dense = [np.where(np.eye(30, dtype=bool), 0, product.dense()) for product in (one, other)]
    expected = (dense[0] * dense[1]).sum() / np.linalg.norm(dense[0]) / np.linalg.norm(dense[1])
    assert off_diagonal_cosine(one, other) == pytest.approx(expected)
    assert off_diagonal_cosine(one, FactoredProduct(A[1][:20], B[1][:20])) == 0


def test_singular_values_are_squared_and_directions_kept():
    A, B = noise(1)
    product = FactoredProduct(A[0], B[0])
    U, S, Vh = np.linalg.svd(product.dense())
    np.testing.assert_allclose(squared_values(product).dense(), (U * S**2) @ Vh, atol=1e-9 * S[0] ** 2)


def test_marks_name_the_head_that_is_repeated_and_the_noise_that_was_used(layer):
    weights = layer.weights
    cloned = weights.replace(W_Q=weights.W_Q[[0, 0]], W_K=weights.W_K[[0, 0]])
    checks = [Check(1, "n", "qk", 0), Check(1, "n", "qk", 1, problem="beta"), Check(1, "n", "ov", "all")]
    found = with_clones(checks, replace(layer, weights=cloned), "raw")
    assert [check.problem for check in found] == ["", "beta; its off-diagonal is that of head 0: cosine 1.00", ""]
    assert [check.mistake for check in found] == ["", "cloned heads", ""]
    assert with_clones(checks, layer, "raw") == checks
    twice = weights.replace(W_V=weights.W_V[[0, 0]], W_O=weights.W_O[[0, 0]])
    assert with_clones(checks, replace(layer, weights=twice), "raw") == checks  # heads of OV are not looked at
    by_head = [Check(1, "n", "ov", 0), Check(1, "n", "ov", 1, mistake="sign")]
    assert [check.mistake for check in with_clones(by_head, replace(layer, weights=twice), "raw")] == ["", "sign"]
    values = np.zeros(3, np.float32)
    used = Reuse(Signs(1, "qk", 1, 30, values), Signs(0, "ov", "all", 30, values), 0.625)
    told = with_reuse(checks, [used])
    assert told[1].problem == "beta; its noise is that of layer 0, ov all: its signs correlate by 0.62"
    assert told[1].mistake == "reused noise"
    assert (told[0], told[2]) == (checks[0], checks[2])


def test_places_are_off_the_diagonal_each_once_and_at_most_as_many_as_a_sample():
    rows, cols = places(7)
    assert sorted(zip(rows, cols, strict=True)) == [(i, j) for i in range(7) for j in range(7) if i != j]
    rows, cols = places(200)
    assert len(set(zip(rows, cols, strict=True))) == len(rows) == SAMPLE == 16384
    assert (rows != cols).all()
    assert (rows.max(), cols.max(), rows.min(), cols.min()) == (199, 199, 0, 0)


def test_noise_is_reused_where_signs_agree_by_more_than_eight_standard_deviations():
    assert signs_of(FactoredProduct(np.ones((5, 2)), np.ones((4, 2))), 0, "qk", 0) == []
    product = FactoredProduct(*(side[0] for side in noise()))
    (signs,) = signs_of(product, 3, "qk", 1)
    assert (signs.layer, signs.circuit, signs.head, signs.size) == (3, "qk", 1, 30)
    np.testing.assert_array_equal(signs.values, np.sign(product.dense()[places(30)]))

    def of(layer, circuit, head, agree, count=10000):
        return Signs(layer, circuit, head, 101, np.where(np.arange(count) < agree, 1.0, -1.0))

    first = of(0, "qk", 0, 10000)
    for agree, limit in ((5399, False), (5401, True), (4599, True), (4601, False)):  # 8 / sqrt(10000) = .08
        found = list(reused([first, of(1, "qk", 0, agree)]))
        assert bool(found) == limit
    (found,) = reused([first, of(1, "qk", 0, 7000), of(2, "qk", 0, 9000)][::2])
    assert (found.of, found.correlation) == (first, pytest.approx(0.8))
    assert list(reused([first, of(0, "qk", 1, 9000)])) == []  # heads of one circuit are clones, not reuse
    assert [each.product.circuit for each in reused([first, of(0, "ov", "all", 9000)])] == ["ov"]
    nearest = list(reused([first, of(1, "qk", 0, 6000), of(2, "qk", 0, 6500)]))
    assert [each.of.layer for each in nearest] == [0, 1]
    assert list(reused([of(0, "qk", 0, 0)._replace(values=np.zeros(100)), of(1, "qk", 0, 0)._replace(
        values=np.zeros(100))])) == []  # fmt: skip
    assert [each.product.size for each in reused([first, first._replace(size=5, layer=1)])] == []


# How layers are gone through.


@pytest.mark.parametrize(
    ("rule", "refused", "kinds"),
    [
        (Rule(plan=lambda _: Plan()), [(1, "b", "x")], "attention"),
        (Rule(filters=lambda _: FilterPlan()), [(2, "f", "y")], "depthwise convolution"),
        (
            Rule(plan=lambda _: Plan(), filters=lambda _: FilterPlan()),
            [(1, "b", "x"), (2, "f", "y")],
            "attention or depthwise convolution",
        ),
    ],
)
def test_layers_of_the_kinds_a_rule_plans_are_gone_through_and_refused_ones_named(rule, refused, kinds):
    known = {"name": "net", "order": ["a", "b"], "refused": [], "refused_filters": [], "filters": ()}
    unread = {**known, "refused": [Refusal("b", "X", "timm", "x")], "refused_filters": [Refusal("f", "Y", "timm", "y")]}
    read = {**unread, "filters": ("one", "two")}

    def planned(about, attention=()):
        architecture = SimpleNamespace(**about, indexed=lambda: attention)
        return planned_layers(rule, SimpleNamespace(architecture=architecture), "i")

    found = planned(unread)
    assert [(each.layer, each.name, each.circuit, each.reason) for each in found.refused] == [
        (index, name, "", reason) for index, name, reason in refused
    ]
    assert found.specs() == []
    found = planned(read, ((0, "spec"),))
    assert found.attention == (((0, "spec"),) if rule.plan else ())
    assert found.filters == (((0, "one"), (1, "two")) if rule.filters else ())
    assert found.specs() == ["spec"] * bool(rule.plan) + ["one", "two"] * bool(rule.filters)
    with pytest.raises(UnsupportedAttentionError, match=f"^initialiser 'i' is for {kinds}, and net has none that is"):
        planned(known)


def test_layers_run_side_by_side_with_a_thread_each_on_a_cpu_and_in_turn_elsewhere(layer):
    names = layer.spec.tensors()
    here, elsewhere = (dict.fromkeys(names, torch.ones(1, device=device)) for device in ("cpu", "meta"))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        jobs = [torch.get_num_threads, lambda: (torch.get_num_threads(), 7)]
        assert run_each(jobs, here, [layer.spec]) == [1, (1, 7)]
        assert run_each(jobs, elsewhere, [layer.spec]) == [2, (2, 7)]
        assert run_each(jobs, dict.fromkeys(names, np.ones(1)), [layer.spec]) == [1, (1, 7)]
        with pytest.raises(ZeroDivisionError):
            run_each([lambda: 1 / 0], here, [layer.spec])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_model_is_made_with_what_its_initialiser_takes():
    with pytest.raises(UsageError, match=r"^initialiser 'default' has no options$"):
        create_model("vit_tiny_patch16_224", init="default", init_options={"alpha": 1}, **SIZES)
    with pytest.raises(ModelNotFoundError, match=r"^timm has no architecture named 'vit_tny'"):
        create_model("timm/vit_tny.augreg", **SIZES)
    state = torch.get_rng_state()
    one, other = (create_model("vit_tiny_patch16_224", seed=3, **SIZES) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), other.parameters(), strict=True))
    tagged = create_model("timm/vit_tiny_patch16_224.augreg_in21k", seed=3, **SIZES)
    assert torch.equal(tagged.head.weight, one.head.weight)
    with pytest.raises(UsageError, match="pass a whole number of at least 0"):
        create_model("vit_tiny_patch16_224", seed=-1, **SIZES)
