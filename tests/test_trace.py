"""The null that decides: its variance against draws, its level where channels and units depend, no scale, one seed."""

import math

import numpy as np
import pytest

import attnlens
from attnlens.circuits import FactoredProduct, WholeProduct, layer_ov, ov_circuit, qk_circuit
from attnlens.statistics.diagonal import DiagonalFit, fit_diagonal
from attnlens.statistics.inference import Inference, infer
from attnlens.statistics.trace import null_variance, sampling_variance, trace_p_value
from attnlens.statistics.verdicts import Verdict, corrected, judge
from benchmarks.null_level import rotated, structures
from tests.conftest import random_heads

SETTINGS = (
    "normal",
    "AR(1) channels, 0.9",
    "channel spectrum i^-1",
    "channel spectrum i^-2",
    "shared subspace of 8, times 3",
    "mean direction, times 11",
    "columns j^-1/2",
    "columns j^-1",
    "spectrum i^-1 and columns j^-1/2",
    "lognormal gains, 1",
)


def drawn(name, d=61, k=17, n=400, seed=0):
    draw = structures(np.random.default_rng(seed), d, k)[name]
    return np.ascontiguousarray(np.swapaxes(np.stack([draw() for _ in range(n)]), 0, 1))


def test_the_null_variance_is_that_of_the_dense_norms():
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, 3, 29, 7))
    for found, a, b in zip(null_variance(FactoredProduct(A, B)), A, B, strict=True):
        squares = [(m**2).sum() for m in (b.T @ a, a @ b.T, a, b)]
        assert found == pytest.approx(squares[0] * squares[1] / (squares[2] * squares[3]))


def test_with_columns_alike_the_null_variance_is_the_exact_one_of_random_rotations():
    rng = np.random.default_rng(1)
    A, B = rng.normal(size=(29, 7)), np.linalg.qr(rng.normal(size=(29, 7)))[0]  # B^T B = I
    rotations = np.linalg.qr(rng.normal(size=(20_000, 7, 7)))
    signed = rotations.Q * np.sign(np.diagonal(rotations.R, axis1=-2, axis2=-1))[:, None, :]
    traces = np.einsum("ir,nrs,is->n", A, signed, B)
    assert null_variance(FactoredProduct(A, B)) == pytest.approx(traces.var(), rel=0.05)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_null_variance_is_that_of_draws_whatever_channels_and_units_depend_on(name):
    product = FactoredProduct(*drawn(name, n=1500))
    traces = product.diagonal().sum(-1)
    assert null_variance(product).mean() == pytest.approx((traces**2).mean(), rel=0.25)


def test_the_variance_of_a_sum_is_the_sum_of_its_parts():
    for narrow in (False, True):
        weights = random_heads(heads=2, kv_heads=2, value_dim=3) if narrow else random_heads()
        for fold in ("raw", "effective", "centred"):
            heads, total = ov_circuit(weights, fold), layer_ov(weights, fold)
            for variance in (null_variance, sampling_variance):
                assert variance(total) == pytest.approx(variance(heads).sum())
        total = layer_ov(weights, "balanced")
        np.testing.assert_allclose(total.parts.dense().sum(0), total.dense(), atol=1e-9 * np.abs(total.dense()).max())


@pytest.mark.parametrize("name", SETTINGS)
def test_the_level_and_the_intervals_hold_whatever_channels_and_units_depend_on(name):
    product = FactoredProduct(*drawn(name))
    found, fit = infer(product), fit_diagonal(product, None)
    error = math.sqrt(0.05 * 0.95 / 400)
    assert 0.02 - 2 * error < np.mean(found.p_value < 0.05) < 0.07 + 2 * error
    assert np.mean((found.beta_low <= 0) & (found.beta_high >= 0)) > 0.9
    alpha = np.sqrt((fit.alpha**2).mean())
    assert np.mean((found.alpha_low <= alpha) & (alpha <= found.alpha_high)) > 0.9
    words = [judgement.verdict for judgement in judge(fit, found, found.p_value)]
    assert np.mean(["identity" in word.value for word in words]) < 0.05 + 2 * error
    assert np.mean([word == Verdict.MIXED for word in words]) < 0.02


def test_channels_that_depend_on_each_other_mislead_the_signs():
    found = infer(FactoredProduct(*drawn("AR(1) channels, 0.9")))
    assert np.mean(found.sign_p_value < 0.05) > 0.3


def test_the_test_finds_a_diagonal_of_three_standard_errors_of_noise_three_times_in_four():
    rng = np.random.default_rng(2)
    A, B = rng.normal(size=(2, 600, 64, 16))
    product = FactoredProduct(A, B + 3 / math.sqrt(64 * 16) * A)
    found = infer(product)
    assert np.mean(found.p_value < 0.05) > 0.75
    words = [judgement.verdict for judgement in judge(fit_diagonal(product, None), found, found.p_value)]
    assert np.mean([word == Verdict.IDENTITY for word in words]) > 0.72


def test_p_values_do_not_depend_on_rotation_and_scale_of_a_heads_units_nor_on_channel_gains():
    rng = np.random.default_rng(3)
    A, B = rng.normal(size=(2, 61, 17))
    B += 0.1 * A
    basis = np.linalg.qr(rng.normal(size=(17, 17)))[0]
    gains = np.exp(rng.normal(size=(2, 61, 1)))
    plain = infer(FactoredProduct(A, B)).p_value
    for other in ((A @ basis, B @ basis), (1e3 * A, 1e-3 * B), (gains[0] * A, gains[1] * B)):
        assert infer(FactoredProduct(*other)).p_value == pytest.approx(float(plain), rel=1e-6)


def everything(A, B):
    product = FactoredProduct(A, B)
    fit, inference = fit_diagonal(product, product.singular_values()), infer(product)
    z, p = trace_p_value(product)
    verdicts = judge(fit, inference, corrected(inference.p_value))
    return fit, inference, (z, p), [judgement.verdict for judgement in verdicts]


IN_UNITS = {"alpha", "beta", "frobenius_norm", "spectral_norm", "null_sd", "diagonal_median"}
IN_UNITS |= {f"{name}_{end}" for name in ("alpha", "beta") for end in ("stderr", "low", "high")}


def test_what_centring_takes_away_leaves_no_diagonal_behind():
    """Rows in common plus columns in common: centred, rounding alone is left, and its trace means nothing."""
    rng = np.random.default_rng(5)
    rows, columns = rng.normal(size=(2, 8, 61, 1))
    ones = np.ones_like(rows)
    turned = np.linalg.qr(rng.normal(size=(2, 2))).Q
    product = FactoredProduct(np.concatenate([rows, ones], -1) @ turned, np.concatenate([ones, columns], -1) @ turned)
    left = np.abs(product.centred(True, True).diagonal().sum(-1))
    assert (left > 0).any(), "there is no rounding to be taken for a diagonal"
    z, p = trace_p_value(product)
    np.testing.assert_array_equal(z, 0.0)
    np.testing.assert_array_equal(p, 1.0)


@pytest.mark.parametrize("planted", [0.0, 0.3])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 2.0**-70, 1e12, 2.0**70, 1e30, 1e150])
def test_nothing_that_is_said_of_a_product_depends_on_its_scale(scale, planted):
    rng = np.random.default_rng(4)
    A, B = rng.normal(size=(2, 5, 61, 17))
    B += planted * A
    fit, inference, test, words = everything(A, B)
    for factors in ((scale * A, B), (A, scale * B)):
        other_fit, other_inference, other_test, other_words = everything(*factors)
        assert other_words == words
        exact = math.frexp(scale)[0] == 0.5  # a power of two: to the bit
        for names, one, other in (
            (DiagonalFit.names(), fit, other_fit),
            (Inference.names(), inference, other_inference),
        ):
            for name in names:
                expected = getattr(one, name) * (scale if name in IN_UNITS else 1.0)
                np.testing.assert_allclose(getattr(other, name), expected, rtol=0 if exact else 1e-7, err_msg=name)
        np.testing.assert_allclose(other_test, test, rtol=0 if exact else 1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e150])
def test_a_whole_matrix_is_measured_at_any_scale(scale):
    rng = np.random.default_rng(5)
    M = rng.normal(size=(31, 31))
    one, other = (fit_diagonal(WholeProduct.of(m, 31), None) for m in (M, scale * M))
    for name in ("spectral_norm", "frobenius_norm", "alpha", "beta"):
        assert getattr(other, name) == pytest.approx(scale * float(getattr(one, name)), rel=1e-9)
    assert WholeProduct.of(scale * M, 31).spectral_norm() == pytest.approx(scale * np.linalg.norm(M, 2), rel=1e-9)
    assert infer(WholeProduct.of(scale * M, 31)).p_value == pytest.approx(
        float(infer(WholeProduct.of(M, 31)).p_value), rel=1e-7
    )


@pytest.fixture(scope="module")
def real_layers(dinov2_file):
    inspection = attnlens.inspect("vit_small_patch14_dinov2", dinov2_file)
    return [inspection.heads(layer) for layer in inspection.layers]


@pytest.mark.weights
@pytest.mark.parametrize("fold", ["effective", "balanced"])
def test_rotated_units_of_a_real_network_have_a_diagonal_by_chance_alone_which_signs_do_not_see(real_layers, fold):
    null = [rotated(weights, np.random.default_rng(seed)) for seed, weights in enumerate(real_layers)]
    measured = [
        (fit_diagonal(p, None), infer(p))
        for weights in null
        for p in (qk_circuit(weights, fold), ov_circuit(weights, fold), layer_ov(weights, fold))
    ]
    p, signs = (
        np.concatenate([np.ravel(getattr(found, name)) for _, found in measured])
        for name in ("p_value", "sign_p_value")
    )
    assert len(p) == 156
    assert np.mean(p < 0.05) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 156)
    assert np.mean(signs < 0.05) > 0.1
    family = np.split(corrected(p), np.cumsum([np.size(found.p_value) for _, found in measured])[:-1])
    words = [
        word.verdict for (fit, found), own in zip(measured, family, strict=True) for word in judge(fit, found, own)
    ]
    assert not any("identity" in word.value for word in words)


@pytest.mark.weights
@pytest.mark.parametrize("fold", ["effective", "balanced"])
def test_most_real_heads_get_a_word_and_the_summed_ov_is_a_negative_identity(dinov2_file, fold):
    params = attnlens.fit_params("vit_small_patch14_dinov2", checkpoint=dinov2_file, fold=fold)
    sums = params.select("ov", "all")
    assert [entry.verdict for entry in sums if entry.layer <= 10] == ["negative identity"] * 11
    assert sum(e.verdict == "not described by this model" for e in params.select("qk", "each")) <= 20
    if fold == "balanced":
        assert max(entry.offdiagonal_kurtosis for entry in params.entries if entry.fold == fold) < 1
