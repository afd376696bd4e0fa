"""Kernels by depth and the attention matrices between them: what they multiply to, their signs, their row sums."""

import math

import numpy as np
import pytest

from attnlens.errors import UsageError
from attnlens.signal import variants as mixing
from attnlens.signal.kernels import (
    LEAST,
    NegativeAttentionError,
    Tokens,
    exponential_kernels,
    mean_cosine,
    preserving_attention,
    schedule,
    split_rows,
    uniform_kernels,
)
from attnlens.signal.variants import Mix, make_mixes, predicted_kernels

VARIANTS = ("e-spa", "u-spa")


def softmaxed(mix):
    """Return D softmax(log P), the numbers attention computes at zero logits."""
    with np.errstate(divide="ignore"):
        P = np.exp(np.log(mix.P))
    return mix.D[:, None] * (P / P.sum(1, keepdims=True))


def error_of_product(mixes):
    """Return ||A A^T - Sigma_L|| / ||Sigma_L|| of what attention computes in all layers."""
    product = np.eye(len(mixes.layers[0].P))
    for mix in mixes.layers:
        product = softmaxed(mix) @ product
    target = mixes.kernels[-1]
    return np.linalg.norm(product @ product.T - target) / np.linalg.norm(target)


@pytest.mark.parametrize("attention", VARIANTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("tokens", "depth"), [(2, 1), (17, 7), (64, 6), (256, 1), (256, 48)])
def test_the_product_of_all_layers_is_the_kernel_and_no_entry_is_negative(attention, causal, tokens, depth):
    mixes = make_mixes(attention, Tokens(tokens, causal), depth, {})
    assert error_of_product(mixes) < 1e-11  # the claim is 1e-6
    assert mixes.least > -1e-14  # rounding
    assert all((mix.P[np.tril_indices(tokens)] > 0).all() and (causal or (mix.P > 0).all()) for mix in mixes.layers)
    assert mixes.product_error() == pytest.approx(error_of_product(mixes), abs=1e-12)
    target = mixes.kernels[-1]
    expected = math.exp(-0.005) if attention == "e-spa" else 0.8
    assert target[0, 1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("attention", VARIANTS)
@pytest.mark.parametrize("causal", [True, False])
def test_every_layer_leads_from_its_kernel_to_the_next(attention, causal):
    mixes = make_mixes(attention, Tokens(31, causal), 5, {})
    for mix, before, after in zip(mixes.layers, mixes.kernels, mixes.kernels[1:], strict=False):
        A = mix.matrix()
        np.testing.assert_allclose(A @ before @ A.T, after, atol=1e-12)
        np.testing.assert_allclose(mix.P.sum(1), 1, rtol=1e-13)
        assert (mix.P[np.triu_indices(31, 1)] == 0).all() == causal


@pytest.mark.parametrize("attention", VARIANTS)
def test_dividing_columns_by_their_sums_is_found_out(attention, monkeypatch):
    def split_columns(A):
        return A.sum(0), A / A.sum(0)[None, :]

    monkeypatch.setattr(mixing, "split_rows", split_columns)
    wrong = make_mixes(attention, Tokens(64, causal=True), 6, {})
    assert error_of_product(wrong) > 0.01
    assert wrong.product_error() > 0.01  # the report shows it too


def test_the_causal_matrices_of_e_spa_are_those_of_the_closed_form():
    """From the inverse of an AR(1) Cholesky factor: with c = exp(-g) and s = sqrt(1 - c^2), primes for layer l - 1."""
    depth, count = 6, 23
    steps = preserving_attention(exponential_kernels(depth, 0.005, Tokens(count, True).distances()), causal=True)
    s = schedule(math.sqrt(1 - math.exp(-0.01)), depth)
    c = np.sqrt(1 - s**2)
    for layer, step in enumerate(steps, 1):
        now, before, ratio = c[layer], c[layer - 1], s[layer] / s[layer - 1]
        A = np.zeros((count, count))
        for i in range(count):
            for j in range(1, i):
                A[i, j] = ratio * now ** (i - j - 1) * (now - before)
            A[i, i] = ratio if i else 1.0
            if i:
                A[i, 0] = now ** (i - 1) * (now - before * ratio)
        np.testing.assert_allclose(step.A, np.maximum(A, LEAST * A.max() * np.tril(A * 0 + 1)), rtol=1e-9, atol=1e-15)


def test_the_bidirectional_matrices_of_u_spa_are_those_of_the_closed_form():
    """All kernels have the eigenvectors of 1 1^T: A = p (I - 1 1^T / T) + q 1 1^T / T."""
    kernels = uniform_kernels(5, 0.8, 19)
    rho = [1 - 0.2 ** (layer / 5) for layer in range(6)]
    for layer, step in enumerate(preserving_attention(kernels, causal=False), 1):
        p = math.sqrt((1 - rho[layer]) / (1 - rho[layer - 1]))
        q = math.sqrt((1 + 18 * rho[layer]) / (1 + 18 * rho[layer - 1]))
        np.testing.assert_allclose(step.A, p * np.eye(19) + (q - p) / 19, rtol=1e-10)
        np.testing.assert_allclose(step.A.sum(1), q, rtol=1e-12)


def test_on_a_grid_the_matrices_are_kronecker_products_of_those_of_its_sides():
    grid = make_mixes("e-spa", Tokens(15, False, grid=(3, 5)), 4, {"distance": "grid", "gamma": 0.3})
    rows, cols = (make_mixes("e-spa", Tokens(side, False), 4, {"gamma": 0.3}) for side in (3, 5))
    for mix, down, across in zip(grid.layers, rows.layers, cols.layers, strict=True):
        np.testing.assert_allclose(mix.matrix(), np.kron(down.matrix(), across.matrix()), atol=1e-13)


def test_a_class_token_over_the_grid_would_need_negative_attention_and_is_refused():
    tokens = Tokens(65, causal=False, prefix=1, grid=(8, 8))
    distances = tokens.distances("grid")
    assert distances[0, 1] == 3.5 + 3.5 + 1
    assert distances[1, 9] == 1  # one row further
    with pytest.raises(NegativeAttentionError, match=r"which no softmax gives.*build the network without them"):
        make_mixes("e-spa", tokens, 6, {"distance": "grid"})
    assert make_mixes("e-spa", tokens, 6, {}).product_error() < 1e-11


def test_a_matrix_with_negative_entries_is_refused_and_not_clipped():
    kernels = [np.eye(3), np.array([[1, -0.5, 0], [-0.5, 1, 0], [0, 0, 1.0]])]
    for causal in (True, False):
        with pytest.raises(NegativeAttentionError, match=r"layer 0: .* entries down to -0"):
            preserving_attention(kernels, causal)


def test_the_schedule_multiplies_by_the_same_number_and_ends_at_gamma():
    kernels = exponential_kernels(7, 0.02, Tokens(4, False).distances())
    g = [-math.log(kernel[0, 1]) for kernel in kernels[1:]]
    a = [math.sqrt(1 - math.exp(-2 * value)) for value in g]
    assert g[-1] == pytest.approx(0.02)
    np.testing.assert_allclose(np.divide(a[1:], a[:-1]), a[0], rtol=1e-10)
    assert (kernels[0] == np.eye(4)).all()


def test_rows_are_split_into_sums_and_shares():
    D, P = split_rows(np.array([[3.0, 1.0], [0.0, 2.0]]))
    assert D.tolist() == [4, 2]
    assert P.tolist() == [[0.75, 0.25], [0, 1]]


def test_a_mix_is_the_sum_of_its_terms():
    P = np.array([[1.0, 0.0], [0.5, 0.5]])
    whole = Mix(P, D=np.array([2.0, 4.0]), a=3.0, b=5.0, c=7.0)
    assert whole.matrix().tolist() == [[3 + 10 - 7, 0], [10 - 3.5, 3 + 10 - 3.5]]
    assert Mix(P).matrix().tolist() == P.tolist()
    for name in ("value-skipinit", "shaped"):
        for causal in (True, False):
            start = make_mixes(name, Tokens(5, causal), 1, {}).layers[0].matrix()
            np.testing.assert_allclose(start, np.eye(5), atol=1e-15)


@pytest.mark.parametrize("tokens", [5, 64])
def test_softmax_with_skips_collapses_as_the_closed_form_says(tokens):
    """Sigma <- Sigma + mean(Sigma) 1 1^T doubles the mean's part in every layer: cosine (2^l - 1) / (2^l - 1 + T)."""
    mixes = make_mixes("softmax", Tokens(tokens, causal=False), 8, {})
    found = predicted_kernels(mixes, skips=True, norms=False, attend_only=True)
    expected = [(2**layer - 1) / (2**layer - 1 + tokens) for layer in range(9)]
    np.testing.assert_allclose([mean_cosine(kernel) for kernel in found], expected, rtol=1e-12)
    without = predicted_kernels(mixes, skips=False, norms=False, attend_only=True)
    np.testing.assert_allclose([mean_cosine(kernel) for kernel in without], [0, *[1] * 8], atol=1e-12)


@pytest.mark.parametrize("norms", [True, False])
def test_theory_without_skips_and_mlps_is_the_kernel(norms):
    for attention in VARIANTS:
        mixes = make_mixes(attention, Tokens(12, causal=True), 4, {})
        found = predicted_kernels(mixes, skips=False, norms=norms, attend_only=True)
        np.testing.assert_allclose(found, mixes.kernels, atol=1e-12)


@pytest.mark.parametrize(
    ("attention", "options", "text"),
    [
        ("e-spa", {"gamma": 0}, "gamma = 0 is not accepted: pass a number above 0"),
        ("e-spa", {"gamma": 1e-14}, "singular to rounding: choose less similar tokens"),
        ("e-spa", {"distance": "hops"}, "distance = 'hops' is not accepted: pass 'sequence' or 'grid'"),
        ("e-spa", {"distance": "grid"}, "'grid' needs patches on a grid"),
        ("u-spa", {"rho": 1}, "rho = 1 is not accepted: pass a number between 0 and 1"),
        ("u-spa", {"gamma": 1}, "'u-spa' has no option 'gamma': it accepts rho"),
        ("shaped", {"rho": 1}, "'shaped' has no option 'rho': it accepts none"),
        ("keep", {"rho": 1}, "'keep' has no option 'rho': it accepts none"),
        ("espa", {}, "no attention is named 'espa': did you mean e-spa"),
        ("linear", {}, "no attention is named 'linear': choose from softmax, value-skipinit, "),
    ],
)
def test_what_is_not_accepted_is_said(attention, options, text):
    with pytest.raises(UsageError, match=text):
        make_mixes(attention, Tokens(9, causal=True), 3, options)


@pytest.mark.parametrize("value", ["nan", math.nan, True, 1e308, 10**400, None, [1.0]])
def test_what_is_no_number_is_refused_as_gamma_and_rho(value):
    with pytest.raises(UsageError, match="gamma"):
        exponential_kernels(2, value, np.zeros((2, 2)))
    with pytest.raises(UsageError, match="rho"):
        uniform_kernels(2, value, 2)
