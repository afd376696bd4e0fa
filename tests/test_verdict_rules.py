"""Each rule of the verdict at its boundary: what decides is changed alone, all else says identity."""

import math
from dataclasses import fields

import numpy as np
import pytest
from scipy.stats import norm
from scipy.stats import t as student

from attnlens.circuits import FactoredProduct, WholeProduct
from attnlens.statistics.diagonal import DiagonalFit, fit_diagonal
from attnlens.statistics.inference import Inference, infer
from attnlens.statistics.trace import trace_p_value
from attnlens.statistics.verdicts import Verdict, judge

CLEAR = {
    "beta_low": 0.2,
    "beta_high": 0.4,
    "identity_z": 9.0,
    "share_low_rank": 0.1,
    "bulk_trace_share": 0.9,
    "directions_above": 3.0,
    "directions": 16.0,
    "spread_ratio": 1.0,
    "typical_ratio": 5.0,
    "sign_agreement": 0.98,
    "expected_agreement": 1.0,
    "factor_cosine": 0.1,
    "channels": 64.0,
}
"""A product that is an identity by every rule."""
NEGATIVE = {"beta": -0.3, "beta_low": -0.4, "beta_high": -0.2, "identity_z": -9.0}
LEAST = 0.75 - 1 / 8  # of 64 channels that should all agree: three of four, less two standard errors of 1/2 / sqrt(64)


def word(p=1e-6, beta=0.3, **changed):
    """Judge one product whose findings are those of `CLEAR` but for what is changed."""
    return judged(p, beta, **changed).verdict


def judged(p=1e-6, beta=0.3, **changed):
    values = {field.name: np.array(math.nan) for field in fields(Inference)}
    values |= {name: np.array(value) for name, value in (CLEAR | changed).items()}
    fit = DiagonalFit(*(np.array(beta) for _ in fields(DiagonalFit)))
    (found,) = judge(fit, Inference(**values), np.array(p))
    return found


SHORT = {"sign_agreement": LEAST - 1e-9}
FEW = {"bulk_trace_share": 0.5 - 1e-9}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, Verdict.IDENTITY),
        (NEGATIVE, Verdict.NEGATIVE_IDENTITY),
        ({"p": math.nan}, Verdict.NOT_DESCRIBED),
        # p >= LEVEL
        ({"p": 0.05 - 1e-9}, Verdict.IDENTITY),
        ({"p": 0.05}, Verdict.NONE),
        ({"p": 0.05, "sign_agreement": 0.3, "typical_ratio": 2.0}, Verdict.NONE),
        ({"p": 0.05, "sign_agreement": 0.3, "typical_ratio": 2.0 + 1e-9}, Verdict.MIXED),
        ({"p": 0.05, "spread_ratio": 2.0}, Verdict.NONE),
        ({"p": 0.05, "spread_ratio": 2.0 + 1e-9}, Verdict.NOT_DESCRIBED),
        # agreement short
        ({"sign_agreement": LEAST}, Verdict.IDENTITY),
        (SHORT, Verdict.MIXED),
        (SHORT | {"typical_ratio": 2.0}, Verdict.NOT_DESCRIBED),
        (SHORT | {"expected_agreement": 0.98}, Verdict.IDENTITY),
        ({"sign_agreement": 0.5 + 0.5 * 0.3 - 1 / 8, "expected_agreement": 0.8}, Verdict.IDENTITY),
        ({"sign_agreement": 0.5 + 0.5 * 0.3 - 1 / 8 - 1e-9, "expected_agreement": 0.8}, Verdict.MIXED),
        ({"sign_agreement": 0.75 - 1 / 16, "channels": 256.0}, Verdict.IDENTITY),
        ({"sign_agreement": 0.75 - 1 / 16 - 1e-9, "channels": 256.0}, Verdict.MIXED),
        # the interval of beta, and the side the channels are on
        ({"beta_low": 0.0}, Verdict.NOT_DESCRIBED),
        ({"beta_low": -0.1}, Verdict.NOT_DESCRIBED),
        ({"identity_z": -9.0}, Verdict.NOT_DESCRIBED),
        (NEGATIVE | {"beta_high": 0.0}, Verdict.NOT_DESCRIBED),
        (NEGATIVE | {"identity_z": 9.0}, Verdict.NOT_DESCRIBED),
        # few directions
        ({"bulk_trace_share": 0.5}, Verdict.IDENTITY),
        (FEW, Verdict.IDENTITY_LOW_RANK),
        (FEW | NEGATIVE, Verdict.NEGATIVE_LOW_RANK),
        ({"share_low_rank": 0.5}, Verdict.IDENTITY),
        ({"share_low_rank": 0.5 + 1e-9}, Verdict.IDENTITY_LOW_RANK),
        (NEGATIVE | {"share_low_rank": 0.6}, Verdict.NEGATIVE_LOW_RANK),
        ({"bulk_trace_share": norm.ppf(0.975) / 9 + 1e-9}, Verdict.IDENTITY_LOW_RANK),
        ({"bulk_trace_share": norm.ppf(0.975) / 9 - 1e-9}, Verdict.NOT_DESCRIBED),
        (NEGATIVE | {"bulk_trace_share": norm.ppf(0.975) / 9 + 1e-9}, Verdict.NEGATIVE_LOW_RANK),
        (NEGATIVE | {"bulk_trace_share": norm.ppf(0.975) / 9 - 1e-9}, Verdict.NOT_DESCRIBED),
        ({"bulk_trace_share": -0.4}, Verdict.NOT_DESCRIBED),
    ],
)
def test_a_verdict_changes_where_its_rule_says(changed, expected):
    assert word(**changed) == expected


@pytest.mark.parametrize(("p", "said"), [(0.0, "p < 1e-307"), (1e-306, "p = 1e-306"), (0.0123, "p = 0.012")])
def test_a_chance_too_small_for_a_number_is_not_called_zero(p, said):
    assert judged(p).reason.startswith(f"{said}, ")


def test_what_is_said_of_the_signs_and_of_a_typical_channel_is_said_of_the_balanced_matrix():
    rng = np.random.default_rng(0)
    d = 29
    for planted in (0.0, 0.2, -1.5):
        A, B = rng.normal(size=(2, d, 7)) * np.exp(rng.normal(size=(2, d, 1)))
        product = FactoredProduct(A, B + planted * A)
        N = product.balanced().dense()
        diagonal, noise = np.diag(N), np.sqrt((N[~np.eye(d, dtype=bool)] ** 2).mean())
        quartile = norm.ppf(0.75)  # the median of |x| for a standard normal x
        median = np.median(np.abs(diagonal))
        beyond = math.sqrt(max(median**2 - (quartile * noise) ** 2, 0))
        expected = {
            "spread_ratio": diagonal.var(ddof=1) / noise**2,
            "typical_ratio": min((median / quartile) ** 2, (diagonal**2).mean()) / noise**2,
            "sign_agreement": max((diagonal > 0).sum(), (diagonal < 0).sum()) / d,
            "expected_agreement": norm.cdf(max(abs(diagonal.mean()), beyond) / noise),
            "channels": d,
            "directions": 7,
        }
        if (diagonal > 0).sum() * np.sign(diagonal.mean()) < (diagonal < 0).sum() * np.sign(diagonal.mean()):
            expected["sign_agreement"] = 1 - expected["sign_agreement"]
        found = infer(product)
        for name, value in expected.items():
            assert getattr(found, name) == pytest.approx(value, rel=1e-7), name


def test_the_p_value_that_decides_is_that_of_the_balanced_matrix_without_what_rows_and_columns_share():
    rng = np.random.default_rng(1)
    d, k = 29, 7
    A, B = rng.normal(size=(2, d, k)) + rng.normal(size=(2, 1, k))
    B += 0.2 * A
    balanced = FactoredProduct(A, B).balanced()
    a, b = (factor - factor.mean(0) for factor in (balanced.A, balanced.B))
    norms = [np.linalg.norm(m) for m in (b.T @ a, a @ b.T, a, b)]
    z = np.trace(a @ b.T) / (norms[0] * norms[1] / (norms[2] * norms[3]))
    found = infer(FactoredProduct(A, B))
    assert found.identity_z == pytest.approx(z)
    assert found.p_value == pytest.approx(2 * norm.sf(abs(z)))
    assert trace_p_value(FactoredProduct(-balanced.A, balanced.B))[0] == pytest.approx(-z)


def test_channels_that_depend_on_each_other_are_worth_no_less_than_one():
    rng = np.random.default_rng(5)
    d = 31
    A, B = rng.normal(size=(2, d, 7))
    B += (0.3 - (A * B).sum(1) / (A**2).sum(1))[:, None] * A  # now <A_i, B_i> = 0.3 ||A_i||^2
    A /= np.linalg.norm(A, axis=1)[:, None]
    B -= ((A * B).sum(1) - 0.3)[:, None] * A  # and the diagonal 0.3 throughout: its spread says nothing of its error
    product = FactoredProduct(A, B)
    M = product.dense()
    np.testing.assert_allclose(np.diag(M), 0.3)
    off = ~np.eye(d, dtype=bool)
    pairs = (M**2 + M.T**2) / 2
    excess = np.where(off, pairs - pairs[off].mean(), 0)
    variance = (4 * (excess.sum(1) ** 2).sum() - 2 * (excess**2).sum()) / (d * (d - 1)) ** 2
    found, alpha = infer(product), np.sqrt(d * pairs[off].mean())
    assert found.alpha_stderr == pytest.approx(alpha * np.sqrt(variance) / (2 * pairs[off].mean()) * np.sqrt(d))
    quantile = student.ppf(0.975, 4)  # of five channels: with fewer the quantile says more of the law than of alpha
    assert np.log(found.alpha_high / alpha) == pytest.approx(quantile * found.alpha_stderr / alpha)
    assert np.log(found.alpha_low / alpha) == pytest.approx(-quantile * found.alpha_stderr / alpha)


def test_the_same_findings_are_judged_alike_in_a_stack_of_any_shape():
    rng = np.random.default_rng(2)
    A, B = rng.normal(size=(2, 2, 3, 61, 17))
    B[1] += A[1]
    product = FactoredProduct(A, B)
    fit, found = fit_diagonal(product, None), infer(product)
    words = [one.verdict for one in judge(fit, found, found.p_value)]
    assert words == [Verdict.NONE] * 3 + [Verdict.IDENTITY] * 3


def test_factors_are_tied_up_to_rounding_only_where_they_leave_directions_out():
    rng = np.random.default_rng(3)
    A = rng.normal(size=(97, 31))

    def reason(product):
        fit, found = fit_diagonal(product, None), infer(product)
        return judge(fit, found, found.p_value)[0].reason

    assert "tied" in reason(FactoredProduct(A, A * (1 + 1e-6 * rng.normal(size=A.shape))))
    assert "tied" not in reason(FactoredProduct(A, A * (1 + 1e-3 * rng.normal(size=A.shape))))
    basis = np.linalg.qr(rng.normal(size=(31, 31)))[0]
    assert "tied" not in reason(FactoredProduct(basis, basis))
    assert "tied" not in reason(WholeProduct.of(np.eye(31), 31))


def test_three_channels_have_an_inference_and_two_have_none():
    rng = np.random.default_rng(4)
    for d in (2, 3):
        found = infer(FactoredProduct(*rng.normal(size=(2, d, 2))))
        assert np.isnan(found.p_value) == np.isnan(found.beta_stderr) == (d == 2)
