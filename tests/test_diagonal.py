"""The fit: every statistic against dense float64, known answers, invariances."""

from pathlib import Path

import numpy as np
import pytest

from attnlens.circuits import FactoredProduct, WholeProduct
from attnlens.statistics.diagonal import DiagonalFit, fit_alpha_beta, fit_diagonal


def dense_statistics(M, k):
    """Compute every statistic the plain way, from the whole matrix."""
    d = len(M)
    off = M[~np.eye(d, dtype=bool)]
    diag = np.diag(M)
    s = np.linalg.svd(M, compute_uv=False)
    share = s[s > 1e-12 * s[0]] / s.sum()
    eigenvalues = np.linalg.eigvals(M)
    return {
        "alpha": np.sqrt(d) * np.sqrt((off**2).mean()),
        "beta": diag.mean(),
        "beta_stderr": diag.std(ddof=1) / np.sqrt(d),
        "identity_cosine": (M * np.eye(d)).sum() / (np.linalg.norm(M) * np.sqrt(d)),
        "identity_cosine_bound": np.sqrt(k / d),
        "diagonal_prominence": diag.mean() / off.std(),
        "frobenius_norm": np.linalg.norm(M),
        "spectral_norm": s[0],
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "copying_score": eigenvalues.real.sum() / np.abs(eigenvalues).sum(),
        "symmetric_share": np.linalg.norm((M + M.T) / 2) ** 2 / np.linalg.norm(M) ** 2,
        "effective_rank": np.exp(-(share * np.log(share)).sum()),
    }


def planted(alpha, beta, d, seed=0):
    noise = np.random.default_rng(seed).normal(size=(d, d)) / np.sqrt(d)
    return FactoredProduct(alpha * noise + beta * np.eye(d), np.eye(d))


def fit(product):
    return fit_diagonal(product, product.singular_values())


@pytest.mark.parametrize(("d", "k"), [(13, 5), (31, 7), (19, 19), (7, 1)])
def test_every_statistic_equals_the_dense_computation(d, k):
    rng = np.random.default_rng(d)
    product = FactoredProduct(rng.normal(size=(3, d, k)), rng.normal(size=(3, d, k)))
    found = fit(product)
    for head, M in enumerate(product.dense()):
        for name, expected in dense_statistics(M, k).items():
            assert getattr(found, name)[head] == pytest.approx(expected, rel=1e-8), name


def test_without_spectra_the_rest_is_unchanged_and_the_spectral_norm_is_exact():
    product = WholeProduct.of(planted(0.7, -0.4, 97).dense(), 97)
    whole, lean = fit(product), fit_diagonal(product, None)
    assert np.isnan(lean.copying_score)
    assert np.isnan(lean.effective_rank)
    for name in set(DiagonalFit.names()) - {"copying_score", "effective_rank"}:
        assert getattr(lean, name) == pytest.approx(getattr(whole, name), rel=1e-10), name


def test_planted_alpha_and_beta_are_recovered_within_their_standard_error():
    d, alpha, beta = 601, 0.7, -0.4
    found = fit(planted(alpha, beta, d))
    assert found.beta == pytest.approx(beta, abs=4 * alpha / d)  # sd of tr(alpha Z)/d is alpha / d
    assert found.alpha == pytest.approx(alpha, abs=4 * alpha / (np.sqrt(2) * d))
    assert found.beta_stderr == pytest.approx(alpha / d, rel=0.2)


def test_a_scaled_identity_is_exact():
    found = fit(planted(0.0, -2.5, 11))
    assert found.beta == -2.5
    assert found.alpha == 0
    assert found.beta_stderr == 0
    assert found.identity_cosine == pytest.approx(-1)
    assert found.copying_score == pytest.approx(-1)
    assert found.symmetric_share == pytest.approx(1)
    assert found.diagonal_prominence == -np.inf


def test_the_fit_scales_with_the_matrix():
    product = planted(0.7, -0.4, 31)
    scaled = fit(FactoredProduct(product.A * 3, product.B))
    plain = fit(product)
    for name in ("alpha", "beta", "beta_stderr", "frobenius_norm", "spectral_norm"):
        assert getattr(scaled, name) == pytest.approx(3 * getattr(plain, name)), name
    for name in ("identity_cosine", "diagonal_prominence", "stable_rank", "copying_score", "symmetric_share"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name)), name


def test_the_fit_does_not_depend_on_the_order_of_coordinates_or_on_transposition():
    rng = np.random.default_rng(5)
    A, B = rng.normal(size=(2, 23, 5))
    order = rng.permutation(23)
    plain = fit(FactoredProduct(A, B))
    for other in (fit(FactoredProduct(A[order], B[order])), fit(FactoredProduct(B, A))):
        for name in DiagonalFit.names():
            assert getattr(other, name) == pytest.approx(getattr(plain, name)), name


def test_unrelated_factors_have_no_diagonal():
    rng = np.random.default_rng(6)
    found = fit(FactoredProduct(rng.normal(size=(40, 101, 16)), rng.normal(size=(40, 101, 16))))
    assert np.abs((found.beta / found.beta_stderr).mean()) < 4 / np.sqrt(40)


def test_no_product_of_rank_k_exceeds_the_identity_cosine_bound():
    rng = np.random.default_rng(7)
    basis = np.linalg.qr(rng.normal(size=(29, 5)))[0]
    best = fit(FactoredProduct(basis, basis))  # a projection reaches the bound
    assert best.identity_cosine == pytest.approx(best.identity_cosine_bound)


def test_a_product_that_is_not_square_has_norms_but_no_diagonal():
    rng = np.random.default_rng(8)
    found = fit(FactoredProduct(rng.normal(size=(13, 5)), rng.normal(size=(11, 5))))
    for name in ("alpha", "beta", "beta_stderr", "identity_cosine", "diagonal_prominence", "copying_score"):
        assert np.isnan(getattr(found, name)), name
    assert found.frobenius_norm > found.spectral_norm > 0


@pytest.mark.parametrize("lead", [(), (5,), (3, 5)])
def test_alpha_and_beta_alone_are_those_of_the_whole_fit_for_every_product_of_a_stack(lead):
    rng = np.random.default_rng(0)
    square = FactoredProduct(*rng.standard_normal((2, *lead, 13, 7)))
    whole = fit_diagonal(square, None)
    for name, value in fit_alpha_beta(square)._asdict().items():
        assert value.shape == lead
        assert np.allclose(value, getattr(whole, name), rtol=1e-12, atol=0)
    oblong = FactoredProduct(rng.standard_normal((*lead, 13, 7)), rng.standard_normal((*lead, 11, 7)))
    for value in fit_alpha_beta(oblong):
        assert value.shape == lead
        assert np.isnan(value).all()


def test_a_zero_product_gives_zero_norms_and_undefined_ratios_without_a_warning():
    zero = FactoredProduct(np.zeros((13, 5)), np.zeros((13, 5)))
    assert fit_diagonal(WholeProduct.of(np.zeros((13, 13)), 13), None).spectral_norm == 0
    found = fit(zero)
    assert found.alpha == 0
    assert found.beta == 0
    assert found.frobenius_norm == 0
    assert np.isnan(found.identity_cosine)
    assert np.isnan(found.copying_score)


def test_every_statistic_is_in_the_documentation():
    text = (Path(__file__).parents[1] / "docs" / "measurements.md").read_text()
    assert [name for name in DiagonalFit.names() if f"`{name}`" not in text] == []
