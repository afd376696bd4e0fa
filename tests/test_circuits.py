"""Circuits against dense float64 products and against attention itself."""

import dataclasses
import gc
import weakref

import numpy as np
import pytest

from attnlens.circuits import (
    FOLDS,
    FactoredProduct,
    WholeProduct,
    layer_ov,
    ov_circuit,
    parse_folds,
    qk_circuit,
    side_by_side,
    sum_of,
)
from attnlens.circuits.factored import RIDGE
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.heads import InputNorm
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.statistics.inference import infer
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
    assert narrow.rank_bound == np.linalg.matrix_rank(narrow.dense()) == 6
    few = layer_ov(random_heads(heads=2, kv_heads=2, value_dim=5))
    assert few.A.shape == (13, 10)
    rows = layer_ov(random_heads(heads=3, kv_heads=3, value_dim=3, out_dim=5))
    assert rows.inner == 9
    assert rows.rank_bound == np.linalg.matrix_rank(rows.dense()) == 5
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


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_singular_values_of_a_factor_too_ill_conditioned_for_its_gram_matrix_are_exact_at_every_scale(size):
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.normal(size=(17, 5)))[0]
    values = size * np.logspace(0, -7, 5)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    found = FactoredProduct(basis * values @ turn, np.linalg.qr(rng.normal(size=(13, 5)))[0]).singular_values()
    np.testing.assert_allclose(found, values, rtol=1e-7)


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


def test_each_side_is_folded_with_the_norm_it_reads():
    rng = np.random.default_rng(6)
    gain_q, gain_k, gain_v = rng.normal(size=(3, 13))
    for centres in ((True, False, True), (False, True, False)):
        own = {"k": InputNorm(gain_k, centres[1]), "v": InputNorm(gain_v, centres[2])}
        heads = random_heads().replace(norm_gain=gain_q, norm_centres=centres[0], own_norms=own)
        C = [np.eye(13) - 1 / 13 if each else np.eye(13) for each in centres]
        for h in range(6):
            W_Q, W_K = gain_q[:, None] * heads.W_Q[h], gain_k[:, None] * heads.W_K[h // 2]
            W_OV = gain_v[:, None] * heads.W_V[h // 2] @ heads.W_O[h] * heads.layer_scale
            np.testing.assert_allclose(qk_circuit(heads, "effective").dense()[h], W_Q @ W_K.T, atol=1e-10)
            np.testing.assert_allclose(qk_circuit(heads, "centred").dense()[h], C[0] @ W_Q @ W_K.T @ C[1], atol=1e-10)
            np.testing.assert_allclose(ov_circuit(heads, "effective").dense()[h], W_OV, atol=1e-10)
            np.testing.assert_allclose(ov_circuit(heads, "centred").dense()[h], C[2] @ W_OV, atol=1e-10)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("value_dim", [1, 7])
def test_the_sum_for_diagonal_and_corners_is_the_layers_sum_and_so_are_its_parts(fold, value_dim):
    heads = random_heads(value_dim=value_dim)
    total = layer_ov(heads, fold)
    assert isinstance(total, WholeProduct) == (value_dim == 7)
    quick = sum_of(ov_circuit(heads, fold), heads, fold)
    np.testing.assert_allclose(quick.dense(), total.dense(), atol=1e-9)
    np.testing.assert_allclose(quick.diagonal(), np.diagonal(total.dense()), atol=1e-9)
    np.testing.assert_allclose(quick.dense(5), total.dense()[:5, :5], atol=1e-9)
    np.testing.assert_allclose(total.parts.dense().sum(0), total.dense(), atol=1e-9)
    assert total.parts.shape == (6, 13, 13)


def test_factors_side_by_side_keep_their_heads_together():
    factors = np.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    np.testing.assert_array_equal(side_by_side(factors), np.concatenate([factors[0], factors[1]], axis=1))


def test_a_layer_without_an_output_projection_has_no_ov_circuit():
    with pytest.raises(UnsupportedAttentionError, match=r"blocks\.2\.attn has no output projection"):
        ov_circuit(random_heads().replace(W_O=None))


def test_products_are_taken_out_of_a_stack_with_their_gains_and_put_into_one_of_one_dimension():
    stack = product(cols=13, stack=(2, 3)).balanced()
    dense = stack.dense()
    for index in ((1, 2), (0, 1)):
        np.testing.assert_array_equal(stack.head(index).dense(), dense[index])
        np.testing.assert_array_equal(stack.head(index).gains.rows, stack.gains.rows[index])
        np.testing.assert_array_equal(stack.head(index).gains.cols, stack.gains.cols[index])
    mask = np.array([[True, False, False], [False, True, True]])
    np.testing.assert_array_equal(stack.head(mask).dense(), dense[mask])
    np.testing.assert_array_equal(stack.stacked().dense(), dense.reshape(6, 13, 13))
    assert stack.head((1, 2)).gains is not None
    assert product(stack=(5,)).head(3).gains is None


def test_whole_products_are_taken_out_of_a_stack_and_keep_their_rank_bound():
    M = np.random.default_rng(7).normal(size=(2, 3, 13, 11))
    stack = WholeProduct(M, np.eye(11), 5)
    for one, expected in ((stack, M), (stack.head((1, 2)), M[1, 2]), (stack.stacked(), M.reshape(6, 13, 11))):
        np.testing.assert_array_equal(one.diagonal(), np.diagonal(expected, axis1=-2, axis2=-1))
        np.testing.assert_allclose(one.total(), expected.sum((-2, -1)))
        np.testing.assert_array_equal(one.dense(), expected)
        assert one.rank_bound == 5
        np.testing.assert_allclose(one.squared_norm(), (expected**2).sum((-2, -1)))
        for size, factor in zip(one.squared_sizes(), (expected, np.eye(11)), strict=True):
            np.testing.assert_allclose(size, np.broadcast_to((factor**2).sum((-2, -1)), expected.shape[:-2]))
    one = stack.head((1, 2))
    np.testing.assert_array_equal(one.T.dense(), M[1, 2].T)
    np.testing.assert_array_equal(one.dense(7), M[1, 2][:7, :7])
    assert one.T.rank_bound == 5
    np.testing.assert_allclose(one.singular_values(), np.linalg.svd(M[1, 2])[1][:5])


@pytest.mark.parametrize(("left", "right"), [(0, 0), (61, 0), (0, -70), (-300, 70), (200, 200)])
def test_the_unit_of_a_product_is_the_product_but_for_a_power_of_two(left, right):
    plain = product(cols=13, stack=(2,))
    parts = product(seed=1, cols=13, stack=(3,))
    far = FactoredProduct(np.ldexp(plain.A, left), np.ldexp(plain.B, right))
    unit, exponent = far.unit
    moved = abs(left) > 60 or abs(right) > 60
    assert (unit is far) == (not moved)
    np.testing.assert_array_equal(np.ldexp(unit.dense(), exponent[..., None, None] - left - right), plain.dense())
    if moved:
        assert 2**-10 < np.abs(unit.A).max() < 2
        assert 2**-10 < np.abs(unit.B).max() < 2
    unit, exponent = FactoredProduct(far.A[0], far.B[0], parts=parts).unit
    np.testing.assert_allclose(np.ldexp(unit.parts.dense(), exponent), parts.dense())
    whole = WholeProduct(np.ldexp(plain.dense()[0], left), np.eye(13), 5, parts=parts)
    unit, exponent = whole.unit
    assert (unit is whole) == (abs(left) <= 55)
    np.testing.assert_array_equal(np.ldexp(unit.dense(), exponent - left), plain.dense()[0])
    np.testing.assert_array_equal(unit.B, np.eye(13))
    np.testing.assert_allclose(np.ldexp(unit.parts.dense(), exponent), parts.dense())


@pytest.mark.parametrize("cols", [13, 11])
def test_squares_off_the_diagonal_are_weighted_by_column(cols):
    factors = product(rows=13, cols=cols, stack=(2,))
    weights = np.random.default_rng(8).uniform(size=(2, cols))
    off = ~np.eye(13, dtype=bool) if cols == 13 else True
    expected = (factors.dense() ** 2 * off * weights[:, None, :]).sum(-1)
    np.testing.assert_allclose(factors.offdiagonal_squares(weights), expected)
    for head in range(2):
        whole = WholeProduct.of(factors.dense()[head], 5)
        np.testing.assert_allclose(whole.offdiagonal_squares(weights[head]), expected[head])


def test_where_only_a_diagonal_is_left_the_squares_off_it_are_zero():
    basis = np.linalg.qr(np.random.default_rng(9).normal(size=(13, 13)))[0]
    assert not FactoredProduct(basis, 3 * basis).offdiagonal_squares(np.ones(13)).any()


def test_triangles_have_the_lengths_of_their_factors():
    tall = product(stack=(2,))
    for factor, R in zip((tall.A, tall.B), tall.triangles, strict=True):
        np.testing.assert_allclose(np.swapaxes(R, -1, -2) @ R, np.swapaxes(factor, -1, -2) @ factor, atol=1e-12)
        np.testing.assert_allclose(R, np.triu(R), atol=1e-12)


@pytest.mark.parametrize("size", [1, 5, 7, 8, 9, 31])
def test_the_spectral_norm_of_a_whole_matrix_is_that_of_its_largest_direction(size):
    rng = np.random.default_rng(size)
    for M in (rng.normal(size=(size, size)), rng.normal(size=(size, size + 4)), np.eye(size), np.zeros((size, size))):
        assert WholeProduct.of(M, size).spectral_norm() == pytest.approx(np.linalg.norm(M, 2), rel=1e-12)


def test_an_unknown_fold_is_refused_with_the_accepted_ones():
    with pytest.raises(UsageError, match="choose raw, effective, centred, balanced, both, all"):
        parse_folds("folded")
    assert parse_folds("both") == ("raw", "effective")
    assert parse_folds("all") == ("raw", "effective", "centred", "balanced")
    assert parse_folds("centred") == ("centred",)


def test_blocks_of_entries_are_those_of_the_dense_product():
    rng = np.random.default_rng(5)
    factors = product(rows=13, cols=11, rank=5)
    rows, cols = rng.integers(0, 13, (3, 7)), rng.integers(0, 11, (3, 2))
    dense = factors.A @ factors.B.T
    blocks = np.array([dense[np.ix_(*chosen)] for chosen in zip(rows, cols, strict=True)])
    for one in (factors, WholeProduct.of(dense, 5)):
        np.testing.assert_allclose(one.entries(rows, cols), blocks, atol=1e-12)


def test_overlaps_of_a_whole_product_are_those_of_its_singular_vectors():
    M = np.random.default_rng(6).normal(size=(13, 13))
    u, s, vt = np.linalg.svd(M)
    _, overlaps = WholeProduct.of(M, 13).spectral_form()
    np.testing.assert_allclose(overlaps((), vt.T), s**3 * np.einsum("ij,ji->i", vt, u), rtol=1e-9)


def test_every_whole_product_of_a_stack_has_a_squared_trace_of_its_own():
    M = np.random.default_rng(3).normal(size=(2, 3, 79, 79))
    found = WholeProduct.of(M, 79).squared_trace()
    np.testing.assert_allclose(found, np.trace(M @ M, axis1=-2, axis2=-1), rtol=1e-10)


def test_every_whole_product_of_a_stack_is_centred_by_itself():
    M = np.random.default_rng(7).normal(size=(3, 5, 5))
    C = np.eye(5) - 1 / 5
    np.testing.assert_allclose(WholeProduct.of(M, 5).centred(True, True).dense(), C @ M @ C, atol=1e-12)
    np.testing.assert_allclose(WholeProduct.of(M, 5).centred(True, False).dense(), C @ M, atol=1e-12)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_overlaps_of_rank_deficient_factors_are_those_of_their_singular_vectors_at_every_scale(size):
    rng = np.random.default_rng(9)
    A = size * rng.normal(size=(17, 3)) @ rng.normal(size=(3, 7))
    B = rng.normal(size=(17, 7))
    u, s, vt = np.linalg.svd(A @ B.T)
    form, overlaps = FactoredProduct(A, B).spectral_form()
    squares, vectors = np.linalg.eigh(form)
    np.testing.assert_allclose(squares[:-4:-1], s[:3] ** 2, rtol=1e-9)
    found = overlaps((), vectors[:, :-4:-1])
    np.testing.assert_allclose(found, s[:3] ** 3 * np.einsum("ji,ij->i", u[:, :3], vt[:3]), rtol=1e-8)


def test_a_product_of_zeros_has_overlaps_of_zero():
    for zero in (product(cols=13).scaled(np.zeros(13), None), WholeProduct.of(np.zeros((13, 13)), 13)):
        form, overlaps = zero.spectral_form()
        np.testing.assert_array_equal(overlaps((), np.eye(len(form))), 0.0)


def test_sums_of_squares_that_cancel_are_never_negative():
    rng = np.random.default_rng(11)
    outer, row, turn = rng.normal(size=(2, 13, 3)), rng.normal(size=3), np.linalg.qr(rng.normal(size=(3, 3)))[0]
    for side in (0, 1):
        factors = [outer[0] - np.outer(outer[0] @ row, row) / (row @ row), outer[1]]
        factors[1][::2] = rng.normal(size=(7, 1)) * row  # rows of B that A does not see: zero up to rounding
        product_of_zeros = FactoredProduct(*(each @ turn for each in (factors if side else factors[::-1])))
        assert min(each.min() for each in product_of_zeros.squared_margins()) >= 0


@pytest.mark.parametrize("scale", [1.0, 1e-40])
@pytest.mark.parametrize("whole", [False, True])
def test_a_products_memory_is_free_with_the_last_of_it(whole, scale):
    circuit = product(rows=13, cols=13)
    circuit = WholeProduct.of(scale * circuit.dense(), 5) if whole else FactoredProduct(scale * circuit.A, circuit.B)
    held = weakref.ref(circuit.A)
    gc.disable()  # what only the collector frees lives on through many layers
    try:
        infer(circuit)
        fit_diagonal(circuit, circuit.singular_values())
        del circuit
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("rows", "cols", "width", "rank"), [(3, 11, 5, 3), (11, 3, 5, 3), (11, 13, 5, 5), (7, 7, 7, 7)]
)
def test_no_rank_is_beyond_rows_columns_and_inner_width(rows, cols, width, rank):
    rng = np.random.default_rng(0)
    product = FactoredProduct(rng.normal(size=(rows, width)), rng.normal(size=(cols, width)))
    assert product.rank_bound == np.linalg.matrix_rank(product.dense()) == rank
    assert len(product.singular_values()) == rank


def test_a_whole_matrix_without_full_rank_has_a_gram_matrix_above_zero():
    rng = np.random.default_rng(1)
    whole = WholeProduct.of(rng.normal(size=(17, 3)) @ rng.normal(size=(3, 17)), 3)
    gram, _ = whole.spectral_form()
    exact = whole.dense().T @ whole.dense()
    ridge = np.linalg.eigvalsh(gram - exact)
    np.testing.assert_allclose(ridge, RIDGE * np.trace(exact), rtol=0.02)


@pytest.mark.parametrize("circuit", [qk_circuit, ov_circuit])
def test_gains_of_another_width_are_refused_where_they_would_be_folded(circuit):
    heads = dataclasses.replace(random_heads(), norm_gain=np.ones(5))
    assert np.isfinite(circuit(heads, "raw").dense()).all()
    for fold in ("effective", "centred", "balanced"):
        with pytest.raises(UnsupportedAttentionError, match="has 5 gains, the projection 13 channels"):
            circuit(heads, fold)
