"""The pieces of initialisers by themselves: plans, reports as they are told, notes, streams, limits where they lie."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from attnlens.circuits import FactoredProduct
from attnlens.errors import UsageError
from attnlens.inits.apply import _plain, planned_bias, planned_heads
from attnlens.inits.caveats import layer_notes, whole_layer_reason
from attnlens.inits.folding import Gain, UnusableScaleError, coordinates, folding_notes, gains
from attnlens.inits.plan import FilterPlan, Plan, PlannedGains, Request, Rule, without_silent
from attnlens.inits.random import FILTER_PURPOSES, GAIN_PURPOSES, PURPOSES, Streams
from attnlens.inits.registry import find_initialiser, initialisers, number
from attnlens.inits.report import (
    FilterReport,
    InitReport,
    ProductReport,
    Skipped,
    describe_option,
    expected_at,
    expected_parameters,
    factored_errors,
    parameters,
    product_matrix,
)
from attnlens.inits.rules.reduced import _norm
from attnlens.inits.verify.mistakes import size_of
from attnlens.layouts.flags import FLAGS
from attnlens.models.architecture import describe_module
from attnlens.statistics.inverse import realised
from tests.drawn_cases import NETWORKS, vit
from tests.filter_models import both
from tests.test_inits_limits import layers_of

NAN = math.nan


@pytest.fixture(scope="module")
def layer():
    return layers_of(vit())[1][1]


@pytest.fixture(scope="module")
def grouped():
    return layers_of(NETWORKS["grouped"]())[1][0]


def row_of(circuit="qk", head=0, **more):
    values = {"layer": 1, "name": "blocks.1.attn", "circuit": circuit, "head": head}
    numbers = dict.fromkeys(
        ("requested_alpha", "requested_beta", "expected_alpha", "expected_beta", "alpha", "beta", "relative_error"), 0.5
    )
    return ProductReport(**{**values, **numbers, **more})


# Plans.


def whole_plan(circuits=("qk", "ov")):
    one = np.ones((1, 2, 2))
    return Plan(
        *(one, one, one, one),
        total=np.eye(2),
        requests=tuple(Request(circuit, 0, 0.5, 0.5) for circuit in circuits),
        gains=tuple(PlannedGains(circuit, 0, True, NAN) for circuit in circuits),
        skipped=(("x", "before"),),
    )


@pytest.mark.parametrize(("silent", "circuit", "kept"), [("q", "qk", "vo"), ("k", "qk", "vo"), ("v", "ov", "qk"),
                                                       ("o", "ov", "qk")])  # fmt: skip
def test_a_silent_role_takes_its_circuit_out_of_a_plan(silent, circuit, kept):
    other = {"qk": "ov", "ov": "qk"}[circuit]
    found = without_silent(whole_plan(), {silent})
    assert "".join(found.weights()) == kept
    assert (found.total is None) == (circuit == "ov")
    assert [request.circuit for request in found.requests] == [other]
    assert [each.circuit for each in found.gains] == [other]
    reason = "the BatchNorm behind a projection has entries of weight zero: set it before initialising"
    assert found.skipped == (("x", "before"), (circuit, reason))


def test_a_silent_role_that_is_not_planned_changes_nothing():
    plan = replace(whole_plan(("ov",)), W_Q=None, W_K=None)
    assert without_silent(plan, {"q", "k"}) is plan
    assert without_silent(plan, set()) is plan
    both_out = without_silent(whole_plan(), {"q", "v"})
    assert (both_out.weights(), both_out.requests, len(both_out.skipped)) == ({}, (), 3)


def test_sizes_of_a_layer_with_shared_heads(grouped, layer):
    assert (grouped.query_groups, grouped.value_groups, grouped.values_width) == (3, 3, 10)
    assert (layer.query_groups, layer.value_groups, layer.values_width) == (1, 1, 26)
    assert (layer.device.type, layer.batched) == ("cpu", False)
    assert size_of(grouped, row_of()) == (23, 5)
    assert size_of(grouped, row_of("ov", "all")) == (23, 10)
    assert size_of(grouped, row_of("ov", 0)) == (23, 5)


def test_a_bias_that_is_not_planned_becomes_zero_and_that_of_the_output_is_divided_by_its_gain(layer):
    weights = layer.weights
    plan = Plan(W_V=weights.W_V, W_O=weights.W_O, biases={"o": np.arange(26.0)})
    found = planned_heads(layer, plan, Rule(fold="effective"))
    assert found.b_Q is None
    assert found.b_K is None
    np.testing.assert_array_equal(found.b_V, np.zeros_like(weights.b_V))
    np.testing.assert_allclose(found.b_O, np.arange(26.0) / weights.layer_scale)
    raw = planned_heads(layer, replace(plan, biases={"o": np.arange(26.0), "v": weights.b_V + 1}), Rule())
    np.testing.assert_array_equal(raw.b_O, np.arange(26.0))
    np.testing.assert_array_equal(raw.b_V, weights.b_V + 1)
    np.testing.assert_array_equal(raw.W_O, weights.W_O)


def test_options_that_a_report_names_without_being_asked_are_plain():
    assert [_plain(value) for value in ("a", True, 3, 0.5, NAN, math.inf, None, (1,))] == [True] * 4 + [False] * 4


def test_a_bias_of_filters_is_zero_unless_planned():
    mix, widen = describe_module(both()).filters
    assert planned_bias(widen, FilterPlan()) is None
    np.testing.assert_array_equal(planned_bias(mix, FilterPlan()), np.zeros(12))
    np.testing.assert_array_equal(planned_bias(mix, FilterPlan(bias=np.arange(12.0))), np.arange(12.0))


# Reports.


def test_a_report_tells_means_tails_errors_and_what_was_left():
    rows = (
        row_of("qk", 0, alpha=0.5, beta=0.25, relative_error=2e-7, requested_kurtosis=10.0, kurtosis=12.0),
        row_of("qk", 1, alpha=0.7, beta=0.35, relative_error=NAN, requested_kurtosis=10.0, kurtosis=7.9),
        row_of("ov", "all", alpha=0.4, beta=-0.4, relative_error=3e-7, requested_kurtosis=-1.0, kurtosis=-0.8),
        row_of("ov", 0, alpha=9.0, beta=9.0, relative_error=NAN),
    )
    skipped = (Skipped(2, "blocks.2.attn", "ov", "no matrix"), Skipped(3, "blocks.3.attn", "", "is XCA"))
    report = InitReport("fitted", 4, {}, "raw", rows, skipped, {"a note": (0, 1, 3)})
    assert str(report).splitlines() == [
        "fitted, seed 4, raw products",
        "QK: mean alpha 0.6000, beta +0.3000 over 2 heads",
        "OV: mean alpha 0.4000, beta -0.4000 over 1 layer",
        "kurtosis with gains: within 20% of the source's in 2 of 3 products",
        "largest relative error of a product: 3.0e-07",
        "skipped blocks.2.attn ov: no matrix",
        "skipped blocks.3.attn: is XCA",
        "a note (layers 0-1, 3)",
    ]
    assert report.worst_error == 3e-7
    assert repr(report).splitlines()[0] == "<InitReport: fitted, seed 4, raw products>"
    assert list(report[0])[:5] == ["layer", "circuit", "head", "alpha", "beta"]
    told = report.to_json()
    assert told["notes"] == {"a note": [0, 1, 3]}
    assert told["products"][1]["relative_error"] is None
    assert told["products"][3]["requested_kurtosis"] is None


def filters_of(name, error, expected, **more):
    values = {"layer": 0, "filters": 12, "kernel": (3, 5), "rms_before": 0.1, "rms": 0.2, "effective_rank": 4.0}
    return FilterReport(
        name=name, covariance_error=error, expected_error=expected, relative_error=1e-7, **{**values, **more}
    )


def test_a_report_of_filters_tells_their_number_ranks_and_errors():
    rows = (filters_of("a", 0.5, 1.0), filters_of("b", 0.6, 0.5, filters=24, effective_rank=6.25))
    report = InitReport("conv-covariance", 4, {}, "raw", (), filters=rows)
    assert str(report).splitlines() == [
        "conv-covariance, seed 4",
        "filters: 36 in 2 layers, effective rank 4.0 to 6.2",
        "error of their covariance: 0.50 to 1.20 of what sampling makes",
        "largest relative error of a layer's filters: 1.0e-07",
    ]
    assert len(report) == 2
    assert list(report[0])[:2] == ["layer", "name"]
    assert report[0]["kernel"] == "3 × 5"
    known = InitReport("transfer-filters", 4, {}, "raw", (), filters=(filters_of("a", NAN, NAN),))
    assert "covariance" not in str(known)
    together = InitReport("norm-matched", 4, {}, "raw", (row_of(),), filters=rows)
    assert "largest relative error of a product or a layer's filters: 5.0e-01" in str(together)
    assert len(together) == 1
    none = InitReport("x", 4, {}, "raw", (row_of(relative_error=NAN),))
    assert math.isnan(none.worst_error)
    assert "largest" not in str(none)


def test_options_are_described_as_json(tmp_path):
    assert describe_option([1, (2.0, None)]) == [1, [2.0, None]]
    assert describe_option(tmp_path) == str(tmp_path)
    assert describe_option(torch.nn.Linear(1, 1)) == "<Linear>"
    assert [describe_option(value) for value in (None, "a", True, 0.5)] == [None, "a", True, 0.5]


def test_what_a_request_realises_is_known_but_for_heads_that_share(layer, grouped):
    pair = (0.5, 0.3)
    assert expected_parameters(layer, Request("qk", 0, *pair)) == realised(*pair, 13, 26)
    assert expected_parameters(layer, Request("ov", 0, *pair)) == realised(*pair, 13, 26)
    assert expected_parameters(layer, Request("ov", "all", *pair)) == pair
    assert expected_parameters(grouped, Request("ov", "all", *pair)) == realised(*pair, 10, 23)
    for circuit in ("qk", "ov"):
        assert math.isnan(expected_parameters(grouped, Request(circuit, 0, *pair)).alpha)
    assert expected_at(0.0, -0.4, 5, 20) == pytest.approx((0.4 * math.sqrt(0.25 * 0.75), -0.1))
    assert expected_at(0.0, -0.4, 20, 20) == (0, -0.4)


def test_parameters_of_products_that_are_not_square_are_not_known():
    rng = np.random.default_rng(0)
    oblong = FactoredProduct(rng.normal(size=(3, 7, 2)), rng.normal(size=(3, 6, 2)))
    found = parameters(oblong)
    assert len(found) == 3
    assert all(math.isnan(value) for pair in found for value in pair)
    square = FactoredProduct(rng.normal(size=(3, 7, 2)), rng.normal(size=(3, 7, 2)))
    dense = square.dense()
    assert [pair.beta for pair in parameters(square)] == pytest.approx(np.trace(dense, axis1=1, axis2=2) / 7)
    off = dense[:, ~np.eye(7, dtype=bool)]
    assert [pair.alpha for pair in parameters(square)] == pytest.approx(np.sqrt(7 * (off**2).mean(1)))
    assert parameters(square, balanced=True) == parameters(square.balanced())


def test_errors_of_factors_are_those_of_the_products():
    rng = np.random.default_rng(0)
    A, C = rng.normal(size=(2, 4, 7, 3))
    B, D = rng.normal(size=(2, 4, 6, 3))
    have, wanted = A @ B.swapaxes(1, 2), C @ D.swapaxes(1, 2)
    expected = np.linalg.norm(have - wanted, axis=(1, 2)) / np.linalg.norm(wanted, axis=(1, 2))
    np.testing.assert_allclose(factored_errors((A, B), (C, D)), expected)
    split = factored_errors((A * 3, B / 3), (A, B))
    assert split.max() < 1e-7  # never the root of a number below 0
    assert not np.isnan(np.stack([factored_errors((A * s, B / s), (A, B)) for s in rng.uniform(1, 2, 99)])).any()


@pytest.mark.parametrize(("width", "dtype"), [(512, torch.float64), (513, torch.float32)])
def test_sums_of_heads_are_formed_in_float32_above_width_512(width, dtype):
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, 2, width, 3))
    found = product_matrix(A, B)
    assert found.dtype == dtype
    np.testing.assert_allclose(found.numpy(), np.einsum("hir,hjr->ij", A, B), atol=1e-5)


def test_the_norm_of_a_product_that_cancels_is_zero():
    rng = np.random.default_rng(0)
    for _ in range(99):
        x, y, c = rng.normal(size=17), rng.normal(size=13), rng.normal(size=3)
        left, right = np.outer(x, np.append(c, c @ c)), np.vstack([np.outer(c, y), -y])
        assert _norm(left, right) <= 1e-6 * np.linalg.norm(left) * np.linalg.norm(right)


# Notes and refusals.


def test_what_acts_beside_a_circuit_is_said_of_that_circuit_alone(layer):
    def notes(flag, roles):
        return layer_notes(replace(layer.spec, leaves_out=(flag,)), roles)

    told = {flag: ("q" * bool(notes(flag, "qk")) + "v" * bool(notes(flag, "vo"))) for flag in FLAGS}
    of_qk = {"q_norm", "k_norm", "cosine", "rope", "rope_unknown", "rel_pos_bias", "position_gate", "talking_heads"}
    of_qk |= {"differential", "act_on_qk", "softmax_on_k", "conv_on_q", "q_pool", "kv_pool", "spatial_reduction"}
    of_ov = {"v_norm", "act_on_v", "norm_before_proj", "act_before_proj", "gate", "norm_after", "passthrough"}
    assert {flag for flag, roles in told.items() if "q" in roles} == of_qk | {"cascaded"}
    assert {flag for flag, roles in told.items() if "v" in roles} == (of_ov | {"local_values"}) & FLAGS.keys()
    (note,) = notes("q_norm", "qk")
    assert note == (
        "queries are normalised after their projection: a common factor of alpha and beta divides out, their ratio and "
        "the directions of the product stay"
    )
    assert notes("k_norm", "qk")[0].startswith("keys are normalised")
    assert notes("gate", "vo") == (FLAGS["gate"],)
    assert notes("rope", "vo") == ()


def test_a_batch_norm_behind_a_planned_projection_is_said(layer):
    spec = replace(layer.spec, v=replace(layer.spec.v, batch_norm="bn"))
    assert layer_notes(spec, "qk") == ()
    (note,) = layer_notes(spec, "vo")
    assert note.startswith("a BatchNorm stands behind a projection: its running statistics are folded in")


def test_layers_that_are_no_scores_between_tokens_are_left_whole(layer):
    assert whole_layer_reason(layer.spec) == ""
    latent = replace(layer.spec, leaves_out=("rope", "latent_query"))
    assert whole_layer_reason(latent).startswith("has a learned latent as query, not tokens")
    channel = replace(layer.spec, kind="channel", module_class="timm.XCA")
    assert whole_layer_reason(channel) == "is XCA (channel attention): its product never acts between tokens"


def test_gains_that_are_too_small_are_not_divided_by_and_said():
    gain = Gain(np.array([0.04, 0.0, -0.00004, 0.000039]), np.array([True, False, True, False]))
    assert gain.inverse() == pytest.approx([25, 0, -25000, 0])
    W = np.ones((1, 4, 2))
    zero, small = folding_notes({"q": gain}, {"q": W})
    assert zero == (
        "2 of 4 entries of the norm gain of q are below 0.001 of the largest: the product is left at zero there"
    )
    assert small == (
        "the norm gain of q is at most 0.04: the stored weights are as much larger as it is smaller than 1. "
        "Set it near 1 before, or training it multiplies the product"
    )
    assert folding_notes({"q": gain}, {"k": W}) == ()
    assert folding_notes({"o": Gain(np.array([0.05, -0.05]), np.ones(2, bool))}, {"o": W}) == ()
    (note,) = folding_notes({"o": Gain(np.array([-0.0499, 0.01]), np.ones(2, bool))}, {"o": W})
    assert note.startswith("the LayerScale of o is at most 0.05:")
    assert [coordinates(fold) for fold in ("raw", "effective", "balanced")] == ["raw", "effective", "effective"]


def test_a_gain_counts_as_usable_from_a_thousandth_of_the_largest(layer):
    scale = np.full(26, 2.0)
    scale[3:6] = 0.002, -0.00199, 0.0
    found = gains(layer.weights.replace(layer_scale=scale), "effective")
    assert sorted(found) == ["k", "o", "q", "v"]
    assert [place for place in range(26) if not found["o"].usable[place]] == [4, 5]
    assert gains(layer.weights, "raw") == {}
    with pytest.raises(UnusableScaleError, match=r"its LayerScale is zero, so no weights give it"):
        gains(layer.weights.replace(layer_scale=np.zeros(26)), "effective")
    with pytest.raises(UnusableScaleError, match="needs the preceding norm, which is not known"):
        gains(layer.weights.replace(leaves_out=("norm_unknown",)), "effective")
    gains(layer.weights.replace(leaves_out=("norm_unknown",)), "raw")


def test_a_number_is_finite_and_not_below_its_least():
    assert (number("a", 3), number("a", 0, 0), number("a", -2.5)) == (3.0, 0.0, -2.5)
    assert isinstance(number("a", 3), float)
    for value in (True, "1", NAN, math.inf, None, 1j):
        with pytest.raises(UsageError, match=r"^a = .* is not accepted: pass a finite number$"):
            number("a", value)
    with pytest.raises(UsageError, match=r"^a = -0\.5 is not accepted: pass a number of at least 0$"):
        number("a", -0.5, 0)


def test_initialisers_say_what_they_take():
    assert initialisers()["norm-matched"].passes_on
    assert not find_initialiser("mimetic").passes_on
    assert find_initialiser("Norm_Matched").takes("anything")
    assert [find_initialiser("fitted").takes(name) for name in ("params", "teacher")] == [True, False]
    assert find_initialiser("fitted").options["gains"] == "none"
    assert repr(find_initialiser("fitted")).startswith("<Initialiser fitted, params=Ellipsis, ov='layer'")
    assert find_initialiser("qk-only").summary == (
        "Draw QK as `mimetic` does and leave W_V, W_O and their biases as they are."
    )
    assert all(each.summary.endswith(".") and "\n" not in each.summary for each in initialisers().values())


# Streams.


def test_streams_of_a_seed_never_meet():
    streams = Streams(5)
    heads = (0, 1, 4095)
    starts = [
        streams._start(purpose, index, head)
        for purposes in (PURPOSES, FILTER_PURPOSES, GAIN_PURPOSES)
        for purpose in purposes
        for index in (0, 1, 17)
        for head in heads
    ]
    assert len(set(starts)) == len(starts) == 11 * 3 * 3
    base = streams._start("qk", 0, 0)
    where = {
        ("qk", 0, 4095): 4095,
        ("ov", 0, 0): 4096,
        ("padding", 0, 1): 7 * 4096 + 1,
        ("qk", 1, 0): 8 * 4096,
        ("filters", 0, 0): 2**31,
        ("directions", 1, 0): 2**31 + 3 * 4096,
        ("gains", 0, 2): 3 * 2**30 + 2,
        ("gains", 1, 0): 3 * 2**30 + 4096,
    }
    assert {place: (streams._start(*place) - base) % 2**32 for place in where} == where
    with pytest.raises(AssertionError, match="more heads"):
        streams.generator("qk", 0, 4096)
    assert Streams(0).seed == 0
    for wrong in (-1, 1.0, "1", None):
        with pytest.raises(UsageError, match="pass a whole number of at least 0"):
            Streams(wrong)
