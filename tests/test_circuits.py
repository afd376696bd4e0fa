"""Circuits against dense float64 products and against attention itself."""

import numpy as np
import pytest

from attnlens.circuits import FactoredProduct, WholeProduct, layer_ov, ov_circuit, parse_folds, qk_circuit
from attnlens.errors import UsageError
from tests.conftest import random_heads


def product(seed=0, rows=13, cols=11, rank=5, stack=()):
    rng = np.random.default_rng(seed)
    return FactoredProduct(rng.normal(size=(*stack, rows, rank)), rng.normal(size=(*stack, cols, rank)))


def test_every_operation_of_a_factored_product_equals_the_dense_one():
    square = product(rows=13, cols=13, stack=(2, 3))
    dense = square.A @ np.swapaxes(square.B, -1, -2)
    np.testing.assert_allclose(square.dense(), dense, atol=1e-12)
    np.testing.assert_allclose(square.dense(7), dense[..., :7, :7], atol=1e-12)
    np.testing.assert_allclose(square.diagonal(), np.diagonal(dense, axis1=-2, axis2=-1), atol=1e-12)
    np.testing.assert_allclose(square.total(), dense.sum((-1, -2)), atol=1e-11)
    np.testing.assert_allclose(square.squared_norm(), (dense**2).sum((-1, -2)), rtol=1e-12)
    np.testing.assert_allclose(square.squared_trace(), np.trace(dense @ dense, axis1=-2, axis2=-1), rtol=1e-10)
    np.testing.assert_allclose(square.singular_values(), np.linalg.svd(dense)[1][..., :5], rtol=1e-9)
    np.testing.assert_allclose(square.spectral_norm(), np.linalg.norm(dense, 2, axis=(-2, -1)), rtol=1e-12)


@pytest.mark.parametrize(("rows", "cols"), [(31, 31), (31, 29), (5, 5)])
def test_a_whole_product_answers_as_its_factors_do(rows, cols):
    factors = product(rows=rows, cols=cols, rank=37)
    whole = WholeProduct.of(factors.dense(), 37)
    gain, scale = np.random.default_rng(1).normal(size=rows), np.random.default_rng(2).normal(size=cols)
    pairs = [(whole, factors), (whole.scaled(gain, scale), factors.scaled(gain, scale))]
    pairs.append((whole.centred(True, True), factors.centred(True, True)))
    for one, other in pairs:
        assert one.shape == other.shape
        assert one.rank_bound == other.rank_bound
        np.testing.assert_allclose(one.dense(), other.dense(), atol=1e-10)
        np.testing.assert_allclose(one.A @ one.B.T, other.dense(), atol=1e-10)
        np.testing.assert_allclose(one.total(), other.total(), atol=1e-9)
        np.testing.assert_allclose(one.squared_norm(), other.squared_norm())
        np.testing.assert_allclose(one.spectral_norm(), np.linalg.norm(one.dense(), 2), rtol=1e-12)
        np.testing.assert_allclose(one.singular_values(), np.linalg.svd(one.dense())[1], rtol=1e-9, atol=1e-9)
        if rows == cols:
            np.testing.assert_allclose(one.diagonal(), other.diagonal(), atol=1e-10)
            np.testing.assert_allclose(one.squared_trace(), other.squared_trace(), rtol=1e-9)
            np.testing.assert_allclose(one.eigenvalues().sum(), one.diagonal().sum(), rtol=1e-9)


def test_a_layers_sum_is_kept_factored_only_where_that_is_smaller():
    narrow = layer_ov(random_heads(heads=2, kv_heads=2, value_dim=3))
    assert narrow.A.shape == (13, 6)
    wide = layer_ov(random_heads())
    assert wide.A.shape == (13, 13)
    assert wide.rank_bound == 13


def test_eigenvalues_of_the_core_are_those_of_the_dense_product():
    small = product(rows=13, cols=13)
    expected = np.linalg.eigvals(small.dense())
    found = small.eigenvalues()
    kept = expected[np.argsort(-np.abs(expected))[:5]]
    assert max(np.abs(kept - value).min() for value in found) < 1e-10


def test_singular_values_hold_for_rank_deficient_and_badly_scaled_factors():
    rng = np.random.default_rng(1)
    A = rng.normal(size=(17, 5)) * np.array([1.0, 1e-3, 1e-6, 1e-9, 0.0])
    B = rng.normal(size=(13, 5))
    found = FactoredProduct(A, B).singular_values()
    expected = np.linalg.svd(A @ B.T, compute_uv=False)[:5]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-13)


def test_singular_values_hold_when_the_rank_exceeds_rows_or_columns():
    wide = product(rows=5, cols=3, rank=7)
    np.testing.assert_allclose(wide.singular_values()[:3], np.linalg.svd(wide.dense())[1], rtol=1e-9)


def test_qk_circuit_gives_the_attention_logits_of_each_head():
    heads = random_heads()
    x = np.random.default_rng(3).normal(size=(4, heads.embed_dim))
    for h, W_QK in enumerate(qk_circuit(heads).dense()):
        q, k = x @ heads.W_Q[h], x @ heads.W_K[h // 2]
        np.testing.assert_allclose(x @ W_QK @ x.T, q @ k.T, atol=1e-10)


def test_a_transposed_or_regrouped_key_matrix_would_be_seen():
    heads = random_heads()
    dense = qk_circuit(heads).dense()
    assert np.abs(dense[1] - dense[1].T).max() > 1
    assert np.abs(dense[1] - heads.W_Q[1] @ heads.W_K[1].T).max() > 1  # head 1 uses key head 0, not 1


def test_effective_circuits_are_what_gain_and_layer_scale_make_of_the_network():
    heads = random_heads()
    x = np.random.default_rng(4).normal(size=(4, heads.embed_dim))
    normed = x * heads.norm_gain
    for h in range(heads.num_heads):
        logits = (normed @ heads.W_Q[h]) @ (normed @ heads.W_K[h // 2]).T
        np.testing.assert_allclose(x @ qk_circuit(heads, "effective").dense()[h] @ x.T, logits, atol=1e-9)
        moved = (normed @ heads.W_V[h // 2]) @ heads.W_O[h] * heads.layer_scale
        np.testing.assert_allclose(x @ ov_circuit(heads, "effective").dense()[h], moved, atol=1e-9)


def test_centred_circuits_apply_layer_norms_mean_removal():
    heads = random_heads()
    x = np.random.default_rng(5).normal(size=(4, heads.embed_dim))
    centred = (x - x.mean(-1, keepdims=True)) * heads.norm_gain
    logits = (centred @ heads.W_Q[0]) @ (centred @ heads.W_K[0]).T
    np.testing.assert_allclose(x @ qk_circuit(heads, "centred").dense()[0] @ x.T, logits, atol=1e-9)
    moved = (centred @ heads.W_V[0]) @ heads.W_O[0] * heads.layer_scale
    np.testing.assert_allclose(x @ ov_circuit(heads, "centred").dense()[0], moved, atol=1e-9)


def test_an_rms_norm_does_not_centre():
    heads = random_heads().replace(norm_centres=False)
    np.testing.assert_array_equal(qk_circuit(heads, "centred").dense(), qk_circuit(heads, "effective").dense())


def test_layer_ov_is_the_sum_over_heads():
    heads = random_heads()
    for fold in ("raw", "effective", "centred"):
        np.testing.assert_allclose(layer_ov(heads, fold).dense(), ov_circuit(heads, fold).dense().sum(0), atol=1e-9)


def test_an_unknown_fold_is_refused_with_the_accepted_ones():
    with pytest.raises(UsageError, match="raw, effective, centred, balanced, both or all"):
        parse_folds("folded")
    assert parse_folds("both") == ("raw", "effective")
