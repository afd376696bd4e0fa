"""Intervals, null distributions and verdicts: against dense matrices, exhaustive enumeration and fresh draws."""

import itertools
import math
import re

import numpy as np
import pytest
from scipy import stats

from attnlens.circuits import FactoredProduct, WholeProduct
from attnlens.errors import UsageError
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.statistics.inference import Inference, infer, noise_edge
from attnlens.statistics.inverse import realised
from attnlens.statistics.nulls import (
    own_diagonal,
    pairing_draws,
    pairing_moments,
    pairing_p_value,
    rotation_draws,
    rotation_p_value,
    sign_flip_draws,
    sign_flip_p_value,
)
from attnlens.statistics.verdicts import LEVEL, Verdict, corrected, judge


def product_of(seed, d, k, stack=()):
    """Draw factors with unequal channels, a common row and unequal columns: nothing about them is symmetric."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((*stack, d, k)) + 0.5 * rng.standard_normal(k)
    B = rng.standard_normal((*stack, d, k)) * np.exp(0.5 * rng.standard_normal((d, 1))) + 0.3
    return FactoredProduct(A, B)


def own(product):
    return own_diagonal(product, product.squared_margins())


def plain(rng, d, alpha, beta, noise=None):
    Z = rng.standard_normal((d, d)) if noise is None else noise(rng, (d, d))
    return WholeProduct.of(alpha * Z / math.sqrt(d) + beta * np.eye(d), d)


def truncated(rng, d, k, alpha, beta):
    U, s, Vt = np.linalg.svd(alpha * rng.standard_normal((d, d)) / math.sqrt(d) + beta * np.eye(d))
    return FactoredProduct(U[:, :k] * s[:k], Vt[:k].T)


def judged(product, p=None):
    fit, inference = fit_diagonal(product, product.singular_values()), infer(product)
    return judge(fit, inference, inference.p_value if p is None else np.asarray(p))


def holds(inference, alpha, beta):
    return (
        float(inference.alpha_low) <= alpha <= float(inference.alpha_high),
        float(inference.beta_low) <= beta <= float(inference.beta_high),
    )


# Every statistic against the whole matrix.


@pytest.mark.parametrize(("d", "k"), [(31, 7), (61, 67), (13, 1)])
def test_the_own_diagonal_is_that_of_the_matrix_less_its_common_row_and_column(d, k):
    product = product_of(d, d, k, (2,))
    for M, found in zip(product.dense(), own(product), strict=True):
        C = np.eye(d) - 1 / d
        rows, cols = (np.linalg.norm(C @ M @ C, axis=axis) for axis in (1, 0))
        rows, cols = np.maximum(rows, np.median(rows)), np.maximum(cols, np.median(cols))
        left, right = np.eye(d) - np.outer(rows, 1 / rows) / d, np.eye(d) - np.outer(1 / cols, cols) / d
        np.testing.assert_allclose(found, np.diagonal(left @ M @ right), atol=1e-9 * np.abs(M).max())


@pytest.mark.parametrize(("d", "k"), [(31, 7), (211, 13), (61, 67)])
def test_standard_error_shares_and_tails_equal_the_dense_computation(d, k):
    product = product_of(d + 1, d, k, (2,))
    inference = infer(product)
    for head, M in enumerate(product.dense()):
        off, diag, energy = ~np.eye(d, dtype=bool), np.diagonal(M), (M**2).sum()
        pairs = (M**2 + M.T**2) / 2
        mean = pairs[off].mean()
        excess = np.where(off, pairs - mean, 0)
        variance = (4 * (excess.sum(1) ** 2).sum() - 2 * (excess**2).sum()) / (d * (d - 1)) ** 2
        C = product.B[head].T @ product.A[head]
        rest = C - np.trace(C) / k * np.eye(k)
        aligned = k * (M**2).sum() / ((product.A[head] ** 2).sum() * (product.B[head] ** 2).sum())
        spread = max((rest**2).sum() / (k - 1), ((rest + rest.T) ** 2).sum() / (2 * k)) * aligned
        dependence = math.sqrt(min(max(spread / (d * diag.var(ddof=1)), 1), d))
        U, s, Vt = np.linalg.svd(M)
        edge = noise_edge(min(k, d), d) * energy / min(k, d)
        above = s**2 > edge
        trace = sum(s[i] * U[:, i] @ Vt[i] for i in np.flatnonzero(above))
        expected = {
            "alpha_stderr": math.sqrt(d * mean) * math.sqrt(variance) / (2 * mean) * dependence,
            "beta_stderr": math.sqrt(spread) / d,
            "null_sd": math.sqrt((C**2).sum() / k * aligned) / d,
            "directions_above": above.sum(),
            "factor_cosine": np.trace(M) / np.linalg.norm(product.A[head]) / np.linalg.norm(product.B[head]),
            "share_identity": d * diag.mean() ** 2 / energy,
            "share_diagonal_spread": ((diag - diag.mean()) ** 2).sum() / energy,
            "share_low_rank": (s[above] ** 2 - edge).sum() / energy,
            "bulk_trace_share": 1 - trace / diag.sum(),
            "offdiagonal_kurtosis": stats.kurtosis(M[off]),
            "diagonal_median": np.median(diag),
            "top_channel_share": np.sort(np.abs(diag))[-math.ceil(d / 100) :].sum() / np.abs(diag).sum(),
        }
        for name, value in expected.items():
            assert getattr(inference, name)[head] == pytest.approx(value, rel=1e-7, abs=1e-9), name


def test_sampled_pairs_come_close_to_all_pairs():
    product = product_of(5, 401, 17)
    M = product.dense()
    off = ~np.eye(401, dtype=bool)
    assert infer(product).offdiagonal_kurtosis == pytest.approx(stats.kurtosis(M[off]), rel=0.1)


def test_a_matrix_and_its_factors_give_the_same_inference():
    product = product_of(6, 31, 31)
    factored, whole = infer(product), infer(WholeProduct.of(product.dense(), 31))
    of_factors = {"rotation_p_value", "p_value", "identity_z", "null_sd", "factor_cosine", "beta_stderr"}
    of_factors |= {f"{name}_{end}" for name in ("alpha", "beta") for end in ("low", "high", "stderr")}
    for name in set(Inference.names()) - of_factors:
        assert getattr(factored, name) == pytest.approx(getattr(whole, name), rel=1e-6), name


def test_inference_follows_scale_and_ignores_the_order_of_channels_and_transposition():
    product, order = product_of(7, 61, 13), np.random.default_rng(0).permutation(61)
    base = infer(product)
    scaled = infer(FactoredProduct(-3 * product.A, product.B))
    others = [
        infer(FactoredProduct(product.A[order], product.B[order])),
        infer(FactoredProduct(product.B, product.A)),
    ]
    for name in Inference.names():
        for other in others:
            assert getattr(other, name) == pytest.approx(getattr(base, name), rel=1e-6), name
    assert (scaled.beta_low, scaled.beta_high) == pytest.approx((-3 * base.beta_high, -3 * base.beta_low))
    assert (scaled.alpha_low, scaled.null_sd) == pytest.approx((3 * base.alpha_low, 3 * base.null_sd))
    assert scaled.p_value == pytest.approx(float(base.p_value))
    assert scaled.identity_z == pytest.approx(-float(base.identity_z))


def test_the_noise_edge_is_the_largest_singular_value_of_a_product_of_random_factors():
    rng = np.random.default_rng(8)
    for d, k in ((600, 600), (600, 150), (600, 30)):
        product = FactoredProduct(*rng.standard_normal((2, d, k)))
        largest = product.spectral_norm() ** 2 * k / product.squared_norm()
        assert largest == pytest.approx(noise_edge(k, d), rel=0.06)
    assert noise_edge(1, 10**9) == pytest.approx(1, rel=1e-3)


# Intervals.


@pytest.mark.parametrize(
    ("noise", "alpha", "beta"),
    [
        (None, 1.0, 0.0),
        (None, 0.7, 0.7),
        (lambda rng, size: rng.standard_t(5, size) / math.sqrt(5 / 3), 0.1, -1.0),
        (lambda rng, size: rng.uniform(-math.sqrt(3), math.sqrt(3), size), 0.7, -0.4),
    ],
)
def test_intervals_of_full_draws_hold_the_parameters_at_their_level(noise, alpha, beta):
    rng = np.random.default_rng(9)
    held = np.mean([holds(infer(plain(rng, 61, alpha, beta, noise)), alpha, beta) for _ in range(400)], axis=0)
    assert np.all((held > 0.92) & (held < 0.98))  # 0.95 +- 2.8 binomial standard errors


def test_intervals_of_planted_factors_hold_the_parameters_at_their_level():
    rng = np.random.default_rng(10)
    d, k, planted = 97, 31, 0.2
    held = []
    for _ in range(300):
        A, B = rng.standard_normal((2, d, k))
        inference = infer(FactoredProduct(A, B + planted * A))
        held.append(holds(inference, math.sqrt(d * k * (1 + planted**2)), planted * k))
    assert np.all((np.mean(held, axis=0) > 0.91) & (np.mean(held, axis=0) < 0.985))


def test_intervals_of_truncated_draws_hold_the_realised_parameters_and_that_of_beta_is_no_wider_than_need_be():
    rng = np.random.default_rng(11)
    for alpha, beta in ((0.7, 0.7), (0.1, 0.7)):
        truth = realised(alpha, beta, 24, 97)
        found = [infer(truncated(rng, 97, 24, alpha, beta)) for _ in range(100)]
        held = np.mean([holds(each, *truth) for each in found], axis=0)
        assert held[0] == 1.0
        assert held[1] > 0.9
        betas = [(each.beta_low + each.beta_high) / 2 for each in found]
        assert 0.9 < np.mean([each.beta_stderr for each in found]) / np.std(betas) < 1.7


def test_a_higher_level_gives_a_wider_interval_of_the_same_estimate():
    product = product_of(12, 61, 13)
    narrow, wide = infer(product, level=0.5), infer(product, level=0.99)
    assert wide.beta_low < narrow.beta_low < narrow.beta_high < wide.beta_high
    assert wide.alpha_low < narrow.alpha_low < narrow.alpha_high < wide.alpha_high
    quantile = stats.t.ppf(0.75, 60)
    assert (narrow.beta_high - narrow.beta_low) / 2 == pytest.approx(quantile * float(narrow.beta_stderr), rel=1e-9)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_that_is_no_probability_is_refused(level):
    with pytest.raises(UsageError, match=r"level .* is not a coverage probability: use a number between 0 and 1"):
        infer(product_of(0, 13, 5), level=level)


def test_without_a_diagonal_there_is_no_inference():
    rng = np.random.default_rng(13)
    found = infer(FactoredProduct(rng.standard_normal((3, 13, 5)), rng.standard_normal((3, 11, 5))))
    assert all(
        np.isnan(getattr(found, name)).all() and getattr(found, name).shape == (3,) for name in Inference.names()
    )


# Null distributions.


def test_the_sign_flip_p_value_is_close_to_all_sign_patterns():
    """Within 10% where it decides; within a factor of 2 in the tail, where 14 terms leave few patterns to count."""
    rng = np.random.default_rng(14)
    patterns = np.array(list(itertools.product((1.0, -1.0), repeat=14)))
    for _ in range(40):
        terms = rng.standard_normal(14) + rng.uniform(0, 1)
        exact = np.mean(np.abs(patterns @ np.abs(terms)) >= abs(terms.sum()) * (1 - 1e-12))
        error = abs(math.log(float(sign_flip_p_value(terms)) / exact))
        assert error < (0.1 if exact > 0.02 else math.log(2) + 1e-9)


def test_the_sign_flip_p_value_ends_at_its_exact_minimum_and_at_one():
    assert sign_flip_p_value(np.ones(384)) == 2.0**-383
    assert sign_flip_p_value(np.array([1.0, -1.0])) == 1
    assert sign_flip_p_value(np.zeros(5)) == 1
    assert np.isnan(sign_flip_p_value(np.array([1.0, np.nan])))


def test_pairing_moments_are_those_of_all_permutations():
    product = product_of(15, 6, 3)
    M = product.dense()
    means = [M[np.arange(6), list(order)].mean() for order in itertools.permutations(range(6))]
    mean, deviation = pairing_moments(product, product.squared_norm())
    assert (mean, deviation) == pytest.approx((np.mean(means), np.std(means)), rel=1e-9)


def test_closed_forms_agree_with_seeded_draws():
    product = product_of(16, 61, 23)
    draws = 1500
    for closed, drawn in (
        (sign_flip_p_value(own(product)), sign_flip_draws(own(product), draws)),
        (pairing_p_value(product, product.squared_norm()), pairing_draws(product, draws)),
        (rotation_p_value(product), rotation_draws(product, draws)),
    ):
        assert float(drawn) == pytest.approx(float(closed), abs=4 * math.sqrt(closed * (1 - closed) / draws) + 0.005)
    first, again, other = (infer(product, permutations=99, seed=seed).sign_p_value for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("closed", [rotation_p_value, lambda each: pairing_p_value(each, each.squared_norm())])
def test_a_closed_form_for_a_stack_is_that_of_each_of_its_products(closed):
    products = [product_of(seed, 61, 23) for seed in (16, 17, 18)]
    stack = FactoredProduct(np.stack([each.A for each in products]), np.stack([each.B for each in products]))
    assert np.allclose(closed(stack), [closed(each) for each in products], rtol=1e-9, atol=0)


NULLS = {
    "normal": lambda rng: rng.standard_normal((2, 61, 17)),
    "t3": lambda rng: rng.standard_t(3, (2, 61, 17)),
    "common row": lambda rng: rng.standard_normal((2, 61, 17)) + 3 * rng.standard_normal((2, 1, 17)),
}


@pytest.mark.parametrize("null", NULLS)
def test_p_values_are_uniform_where_nothing_links_the_factors(null):
    rng = np.random.default_rng(17)
    found = [infer(FactoredProduct(*NULLS[null](rng))) for _ in range(400)]
    for name in ("p_value", "sign_p_value", "pairing_p_value"):
        p = np.array([getattr(inference, name) for inference in found])
        assert stats.kstest(p, "uniform").pvalue > 0.01
        assert np.mean(p < 0.05) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(p))


def test_large_channels_on_both_sides_mislead_the_pairing_but_not_the_signs():
    rng = np.random.default_rng(18)
    p = []
    for _ in range(300):
        A, B = rng.standard_normal((2, 61, 17))
        A[:4] *= 30
        B[:4] *= 30
        inference = infer(FactoredProduct(A, B))
        p.append((inference.p_value, inference.sign_p_value, inference.pairing_p_value))
    decides, signs, pairing = np.mean(np.array(p) < 0.05, axis=0)
    assert 0.02 < decides < 0.09
    assert signs < 0.09
    assert pairing > 0.4


def test_a_large_factor_column_misleads_the_rotation_silences_the_test_that_decides_and_leaves_the_signs():
    rng = np.random.default_rng(19)
    p = []
    for _ in range(300):
        A, B = rng.standard_normal((2, 61, 17))
        A[:, 0] *= 30
        B[:, 0] *= 30
        inference = infer(FactoredProduct(A, B))
        p.append((inference.p_value, inference.sign_p_value, inference.rotation_p_value))
    decides, signs, rotation = np.mean(np.array(p) < 0.05, axis=0)
    assert decides < 0.05
    assert signs < 0.09
    assert rotation > 0.8


# Verdicts.


def test_holms_correction_keeps_the_shape_skips_nan_and_matches_a_direct_count():
    p = np.array([[0.01, np.nan, 0.04], [0.03, 0.5, 0.02]])
    expected = {0.01: 0.05, 0.02: 0.08, 0.03: 0.09, 0.04: 0.09, 0.5: 0.5}  # (m - j + 1) p, never below the one before
    found = corrected(p)
    assert np.isnan(found[0, 1])
    assert [found[p == value].item() for value in expected] == pytest.approx(list(expected.values()))


@pytest.mark.parametrize(("beta", "word"), [(0.4, Verdict.IDENTITY), (-0.4, Verdict.NEGATIVE_IDENTITY)])
def test_planted_identity_is_called_by_its_sign(beta, word):
    rng = np.random.default_rng(20)
    assert [j.verdict for j in judged(plain(rng, 97, 0.7, beta))] == [word]
    assert [j.verdict for j in judged(truncated(rng, 97, 24, 0.7, beta))] == [word]


def test_noise_is_called_none():
    rng = np.random.default_rng(21)
    A, B = rng.standard_normal((2, 40, 97, 24))
    product = FactoredProduct(A, B)
    assert {j.verdict for j in judged(product, corrected(infer(product).p_value))} == {Verdict.NONE}


def test_a_diagonal_in_a_few_channels_is_not_described():
    M = plain(np.random.default_rng(22), 97, 0.3, 0.0).dense()
    M[np.arange(8), np.arange(8)] += 6.0
    (found,) = judged(WholeProduct.of(M, 97), 1e-6)
    assert found.verdict == Verdict.NOT_DESCRIBED
    assert "few channels hold the diagonal" in found.reason


def test_a_trace_in_a_few_directions_is_not_described():
    rng = np.random.default_rng(23)
    u = rng.choice([-1.0, 1.0], 97) / math.sqrt(97)
    M = plain(rng, 97, 0.1, 0.0).dense() + 5 * np.outer(u, u)  # rank one: the same diagonal in every channel
    (found,) = judged(WholeProduct.of(M, 97))
    assert found.verdict == Verdict.NOT_DESCRIBED
    assert re.search(r"1 of 97 directions hold (0\.9\d|1\.\d\d) of the trace", found.reason)


@pytest.mark.parametrize("positive", [48, 60, 37])
def test_a_large_diagonal_without_a_common_sign_is_mixed_whatever_its_mean(positive):
    rng = np.random.default_rng(24)
    M = plain(rng, 97, 0.1, 0.0).dense() + np.diag(np.where(rng.permutation(97) < positive, 1.0, -1.0))
    (found,) = judged(WholeProduct.of(M, 97))
    assert found.verdict == Verdict.MIXED
    counted = re.search(r"(\d+) of 97 channels have its sign", found.reason)
    assert counted
    assert int(counted[1]) in (positive, 97 - positive)


@pytest.mark.parametrize(("sign", "word"), [(1, Verdict.IDENTITY), (-1, Verdict.NEGATIVE_IDENTITY)])
def test_most_channels_of_one_sign_make_an_identity(sign, word):
    rng = np.random.default_rng(31)
    M = sign * (plain(rng, 97, 0.1, 0.0).dense() + np.diag(np.where(rng.permutation(97) < 88, 1.0, -1.0)))
    (found,) = judged(WholeProduct.of(M, 97))
    assert found.verdict == word
    assert "88 of 97 channels have its sign" in found.reason


@pytest.mark.parametrize(("sign", "word"), [(1, Verdict.IDENTITY_LOW_RANK), (-1, Verdict.NEGATIVE_LOW_RANK)])
def test_an_identity_beside_a_few_large_directions_is_said_with_both(sign, word):
    rng = np.random.default_rng(32)
    left, right = (np.linalg.qr(rng.standard_normal((97, 3)))[0] for _ in range(2))
    M = sign * plain(rng, 97, 0.3, 0.3).dense() + 8 * left @ right.T
    (found,) = judged(WholeProduct.of(M, 97))
    assert found.verdict == word
    assert "3 of 97 directions hold" in found.reason


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_a_cyclic_shift_has_no_identity(noise):
    rng = np.random.default_rng(33)
    shift = np.roll(np.eye(97), 1, axis=0)
    words = {judged(WholeProduct.of(shift + plain(rng, 97, noise, 0.0).dense(), 97))[0].verdict for _ in range(20)}
    assert not any("identity" in word.value for word in words)


def test_few_large_channels_against_the_others_make_no_identity():
    rng = np.random.default_rng(34)
    A = rng.standard_normal((97, 31))
    B = rng.standard_normal((97, 31)) - 0.7 * A
    A[:3] *= 20
    B[:3] = 20 * (B[:3] + 3 * A[:3] / 20)
    (found,) = judged(FactoredProduct(A, B))
    assert fit_diagonal(FactoredProduct(A, B), None).beta > 0
    assert found.verdict == Verdict.NOT_DESCRIBED
    assert re.search(r"few large channels outweigh .* 9\d of 97 channels have the sign of a negative", found.reason)


def test_tied_factors_are_remarked_upon_and_others_are_not():
    A = np.random.default_rng(35).standard_normal((97, 31))
    assert judged(FactoredProduct(A, A))[0].reason.endswith("its trace is positive whatever W holds")
    assert judged(FactoredProduct(3 * A, A))[0].reason.endswith("its trace is positive whatever W holds")
    assert "tied" not in judged(FactoredProduct(A, A + 1e-3 * A[::-1]))[0].reason
    assert "tied" not in judged(WholeProduct.of(np.eye(97), 97))[0].reason


def test_the_mean_of_all_entries_is_no_identity():
    rng = np.random.default_rng(25)
    M = plain(rng, 97, 0.5, 0.0).dense() + 0.5  # every entry alike, the diagonal too
    fit = fit_diagonal(WholeProduct.of(M, 97), None)
    assert fit.beta > 8 * fit.beta_stderr
    (found,) = judged(WholeProduct.of(M, 97))
    assert found.verdict == Verdict.NONE
    (found,) = judged(FactoredProduct(np.full((97, 7), 0.3), np.full((97, 7), 0.2)))  # and nothing else
    assert found.verdict == Verdict.NONE


def test_the_level_decides_on_the_corrected_p_value():
    product = plain(np.random.default_rng(26), 97, 0.7, 0.2)
    assert judged(product, LEVEL)[0].verdict == Verdict.NONE
    assert judged(product, LEVEL * 0.999)[0].verdict == Verdict.IDENTITY
    assert judged(product, np.nan)[0].verdict == Verdict.NOT_DESCRIBED
