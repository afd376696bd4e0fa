"""The limits that `verify-init` judges by are those its documentation states, and both routes to a draw are one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from attnlens.circuits import FactoredProduct
from attnlens.fit.fit_params import fit_params
from attnlens.inits import init_, products, verify_init
from attnlens.inits.apply import make_layer
from attnlens.inits.plan import Network
from attnlens.inits.products import draw_matrix, plan_ov_heads, plan_qk
from attnlens.inits.random import Streams
from attnlens.inits.registry import find_initialiser
from attnlens.inits.truncation import _krylov, unwanted_band
from attnlens.inits.verify.mistakes import (
    balanced_spread_error,
    diagonal_spread,
    off_diagonal_cosine,
    settled_alpha,
    spread_limits,
    tolerance_at,
)
from attnlens.models.live import open_live
from attnlens.statistics.inverse import Parameters
from tests.drawn_cases import NETWORKS, PLAIN, params, vit
from tests.filter_models import both


def layers_of(model):
    architecture, tensors = open_live(model)
    network = Network(architecture, tensors, Streams(7), lambda: model)
    return network, [make_layer(network, *pair) for pair in architecture.indexed()]


def test_limits_of_a_diagonals_spread():
    assert spread_limits(72) == pytest.approx((0.5, math.sqrt(2) * 1.5))
    assert balanced_spread_error(50, 8) == pytest.approx(6 * math.sqrt(0.01 + 1 / 64))


def test_a_product_without_an_off_diagonal_has_neither_spread_nor_cosine():
    exact = FactoredProduct(np.diag([1.0, 2.0, 4.0]), np.eye(3))
    noisy = FactoredProduct(np.array([[1.0, 2.0, 0.0], [0.0, 2.0, 2.0], [2.0, 0.0, 3.0]]), np.eye(3))
    assert np.isnan(diagonal_spread(exact))
    assert float(diagonal_spread(noisy)) == pytest.approx(1 / math.sqrt(2))  # sd 1, six entries of mean square 2
    assert off_diagonal_cosine(exact, noisy) == 0
    assert off_diagonal_cosine(noisy, noisy) == pytest.approx(1)


def test_tolerances_of_alpha_and_beta():
    expected, eps = Parameters(0.5, -0.3), 1e-3
    rounding = 8 * eps * 0.8
    assert tolerance_at(expected, 100, eps) == pytest.approx((0.05 + rounding, 0.03 + rounding))
    twice = tolerance_at(expected, 100, eps, drawn=2, rank=4)  # 6 sqrt(100 / 4) = 30 is more than 10
    assert twice == pytest.approx((math.sqrt(2) * 0.15 + rounding, math.sqrt(2) * 0.03 + rounding))
    assert tolerance_at(expected, 100, eps, rank=100) == tolerance_at(expected, 100, eps)
    settled = settled_alpha(expected, twice, eps)
    assert settled == pytest.approx(((1e-4 + 8 * eps) * 0.8, twice.beta))


def test_a_distance_is_the_larger_of_two_in_units_of_their_tolerances():
    tolerance = tolerance_at(Parameters(0.5, -0.3), 100, 0.0)
    measured = Parameters(0.5 + 0.025, -0.3 - 0.045)
    assert tolerance.distance(measured, Parameters(0.5, -0.3)) == pytest.approx(1.5)
    assert tolerance.distance(Parameters(math.nan, 0.0), Parameters(0.5, -0.3)) == math.inf


@pytest.mark.parametrize("network", PLAIN)
def test_what_a_rule_says_it_will_request_is_what_its_plan_requests(network):
    given = {"params": params("raw")}
    for name, options in (("mimetic", {}), ("qk-only", {}), ("ov-only", {}), ("fitted", given)):
        found, layers = layers_of(NETWORKS[network]())
        rule = find_initialiser(name).rule(found, options)
        for layer in layers:
            assert rule.requests(layer) == rule.plan(layer).requests
    found, layers = layers_of(NETWORKS[network]())
    rule = find_initialiser("fitted").rule(found, {**given, "ov": "head"})
    assert [rule.requests(layer) for layer in layers] == [rule.plan(layer).requests for layer in layers]


@pytest.mark.parametrize(
    ("pairs", "stacks"),
    [([(0.7, 0.7)] * 2, [2]), ([(0.7, 0.7), (0.7, 0.6)], [1, 1]), ([(0.0, 0.7)] * 2, [])],
)
def test_heads_that_request_the_same_go_through_the_linear_algebra_at_once(monkeypatch, pairs, stacks):
    _, (layer, *_) = layers_of(vit())
    seen = []
    whole = products.split
    for plan in (plan_qk, plan_ov_heads):
        alone = plan(layer, pairs, "normal").weights()
        monkeypatch.setattr(products, "split", lambda A, *more: (seen.append(len(A)), whole(A, *more))[1])
        together = plan(replace(layer, batched=True), pairs, "normal").weights()
        monkeypatch.undo()
        assert seen == stacks
        seen.clear()
        for role, weight in alone.items():
            assert together[role] == pytest.approx(weight, abs=1e-9)


@pytest.mark.parametrize("pair", [(0.7, 0.7), (0.4, -0.4)])
def test_the_krylov_space_converges_to_the_best_approximation(pair):
    width, count = 528, 24
    A = draw_matrix(pair, width, "normal", torch.Generator().manual_seed(0))
    band = unwanted_band(*pair, count, width)
    found = _krylov(A[None], count, band)
    assert found is not None
    image, basis = (part[0] for part in found)
    U, S, Vh = torch.linalg.svd(A)
    best = (U[:, :count] * S[:count]) @ Vh[:count]
    assert float((image @ basis.T - best).norm() / best.norm()) < 1e-5
    assert float(S[count + 19]) == pytest.approx(band.high, rel=0.05)
    assert band.low < 0.1 * band.high


@pytest.mark.parametrize(("change", "passes"), [(5e-5, True), (1.2e-4, False)])
@torch.no_grad()
def test_gains_of_channels_are_held_to_a_ten_thousandth(change, passes):
    source = fit_params(vit(9))
    model = vit()
    init_(model, "fitted", params=source, gains="channels", seed=3)
    model.blocks[0].attn.qkv.weight[:26, 5] *= 1 + change
    told = [c.problem for c in verify_init(model, init="fitted", params=source, gains="channels").checks if c.problem]
    assert (not any("log r of channel 5" in problem for problem in told)) == passes


@pytest.mark.parametrize(("change", "passes"), [(8e-6, True), (1.2e-5, False)])
@torch.no_grad()
def test_filters_and_products_are_held_to_a_hundred_thousandth_of_their_norm(change, passes):
    filters, model = both(), vit()
    init_(filters, "conv-covariance", seed=3)
    weight = filters.mix.weight
    weight.view(-1)[weight.abs().argmin()] += change * weight.norm()  # a common factor is the layer's own scale
    assert verify_init(filters, init="conv-covariance", seed=3).passed == passes
    init_(model, "mimetic", seed=3)
    model.blocks[0].attn.qkv.weight[:52] *= 1 + change / 2
    assert verify_init(model, init="mimetic", seed=3).passed == passes


def test_how_an_initialiser_and_its_reports_are_shown():
    assert repr(find_initialiser("identity")) == "<Initialiser identity, qk=0.7, ov=-0.4, noise=0.1, fold='raw'>"
    model = vit()
    report = init_(model, "identity", seed=3)
    assert repr(report).startswith("<InitReport: identity, seed 3")
    checked = repr(verify_init(model, init="identity", seed=3)).splitlines()[0]
    assert checked.startswith("<VerifyReport of ")
    assert checked.endswith(" against identity, seed 3: every check passed>")
