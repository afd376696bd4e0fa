"""Balancing: gains from the factors alone against the whole matrix, what is invariant, zeros, and the fold itself."""

import json

import numpy as np
import pytest

import attnlens
from attnlens.balance import RESIDUAL, balance
from attnlens.circuits import FactoredProduct, WholeProduct, layer_ov, ov_circuit, qk_circuit
from attnlens.errors import UsageError
from attnlens.statistics.gains import describe_gains, gain_profiles
from tests.conftest import random_heads
from tests.test_inspect import SMALL, dense_sum, folder, small_vit  # noqa: F401  (folder is a fixture)


def unequal(seed=0, *, stack=(2, 3), d=29, k=7, spread=1.0):
    """Draw factors whose rows differ in scale, with some identity in each product."""
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(2, *stack, d, k))
    gains = np.exp(spread * rng.normal(size=(2, *stack, d, 1)))
    return FactoredProduct(gains[0] * A, gains[1] * (B + 0.3 * A))


def mean_squares(N):
    """Return the mean square of every row and every column of N off the diagonal."""
    squares = N**2 * ~np.eye(N.shape[-1], dtype=bool)
    return [squares.sum(axis) / (N.shape[-1] - 1) for axis in (-1, -2)]


def test_every_row_and_column_of_a_balanced_product_has_the_same_mean_square_off_the_diagonal():
    balanced = unequal().balanced()
    for found in mean_squares(balanced.dense()):
        np.testing.assert_allclose(found, np.broadcast_to(found.mean(-1, keepdims=True), found.shape), rtol=2e-9)
    assert (balanced.gains.residual <= RESIDUAL).all()


def test_the_gains_times_the_balanced_product_are_the_product():
    product = unequal(1)
    balanced = product.balanced()
    gains = balanced.gains
    whole = gains.rows[..., :, None] * balanced.dense() * gains.cols[..., None, :]
    np.testing.assert_allclose(whole, product.dense(), rtol=1e-12)
    for side in (gains.rows, gains.cols):
        assert (side > 0).all()
        np.testing.assert_allclose((side**2).mean(-1), 1, rtol=1e-13)


def test_gains_that_were_multiplied_in_are_found_again():
    rng = np.random.default_rng(2)
    d = 31
    rows, cols = np.exp(rng.normal(size=(2, d)))
    signs = rng.choice([-1.0, 1.0], size=(d, d))  # every entry of one size: balanced already
    found = balance(WholeProduct.of(rows[:, None] * signs * cols, d))
    np.testing.assert_allclose(found.rows, rows / np.sqrt((rows**2).mean()), rtol=1e-9)
    np.testing.assert_allclose(found.cols, cols / np.sqrt((cols**2).mean()), rtol=1e-9)


def test_factors_and_whole_matrices_give_the_same_balanced_product():
    product = unequal(3, stack=(), d=31, k=37)
    whole = WholeProduct.of(product.dense(), 37).balanced()
    np.testing.assert_allclose(product.balanced().dense(), whole.dense(), rtol=1e-8)
    np.testing.assert_allclose(product.T.balanced().dense(), whole.dense().T, rtol=1e-8)
    np.testing.assert_allclose(whole.T.dense(), whole.dense().T)


def test_a_stack_is_balanced_as_its_products_alone():
    product = unequal(4)
    stacked = product.balanced()
    alone = product.head((1, 2)).balanced()
    np.testing.assert_allclose(stacked.dense()[1, 2], alone.dense(), rtol=1e-12)
    np.testing.assert_allclose(stacked.head((1, 2)).gains.rows, alone.gains.rows, rtol=1e-12)


def test_channel_gains_change_a_balanced_product_by_their_signs_and_one_factor_alone():
    rng = np.random.default_rng(5)
    product = unequal(5, stack=())
    rows, cols = rng.normal(size=(2, 29))
    plain, scaled = product.balanced().dense(), product.scaled(rows, cols).balanced().dense()
    ratio = scaled / plain * np.sign(rows)[:, None] * np.sign(cols)
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-8)
    assert ratio[0, 0] > 0


def test_the_gauge_of_the_factors_does_not_change_a_balanced_product():
    product = unequal(6, stack=())
    gauge = np.random.default_rng(6).normal(size=(7, 7))
    other = FactoredProduct(product.A @ gauge, product.B @ np.linalg.inv(gauge).T)
    np.testing.assert_allclose(other.balanced().dense(), product.balanced().dense(), rtol=1e-7)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-30, 1e30, 1e200])
def test_balancing_does_not_depend_on_the_scale(scale):
    product = unequal(7, stack=(3,))
    found, expected = balance(FactoredProduct(product.A * scale, product.B)), balance(product)
    np.testing.assert_allclose(found.rows, expected.rows, rtol=1e-10)
    np.testing.assert_allclose(found.cols, expected.cols, rtol=1e-10)


def test_a_dead_row_or_column_has_no_gain_and_the_others_are_balanced_without_it():
    product = unequal(8, stack=())
    product.A[3] = 0
    product.B[[3, 11]] = 0
    gains = product.balanced().gains
    assert np.flatnonzero(~gains.alive_rows).tolist() == [3]
    assert np.flatnonzero(~gains.alive_cols).tolist() == [3, 11]
    assert gains.rows[3] == gains.cols[3] == gains.cols[11] == 1
    np.testing.assert_allclose((gains.rows[gains.alive_rows] ** 2).mean(), 1)
    N = product.balanced().dense()
    alive = gains.alive_rows[:, None] & gains.alive_cols & ~np.eye(29, dtype=bool)
    for axis, side in ((1, gains.alive_rows), (0, gains.alive_cols)):
        means = (N**2 * alive).sum(axis)[side] / alive.sum(axis)[side]
        np.testing.assert_allclose(means, means[0], rtol=1e-8)
    assert describe_gains(product.balanced()).dead_channels == 3


@pytest.mark.parametrize("whole", [True, False])
def test_an_identity_has_nothing_off_the_diagonal_and_stays_what_it_is(whole):
    basis = np.linalg.qr(np.random.default_rng(9).normal(size=(37, 37)))[0]
    product = WholeProduct.of(-0.3 * np.eye(37), 37) if whole else FactoredProduct(-0.3 * basis, basis)
    balanced = product.balanced()
    assert not balanced.gains.alive_rows.any()
    np.testing.assert_allclose(balanced.dense(), -0.3 * np.eye(37), atol=1e-15)
    assert np.isnan(describe_gains(balanced).row_gain_spread)


def test_a_product_that_is_zero_stays_zero():
    balanced = FactoredProduct(np.zeros((2, 13, 3)), np.ones((2, 13, 3))).balanced()
    assert not balanced.dense().any()
    assert (balanced.gains.residual == 0).all()


def test_a_product_that_is_not_square_is_balanced_over_all_its_entries():
    rng = np.random.default_rng(10)
    product = FactoredProduct(np.exp(rng.normal(size=(13, 1))) * rng.normal(size=(13, 5)), rng.normal(size=(11, 5)))
    squares = product.balanced().dense() ** 2
    np.testing.assert_allclose(squares.mean(1), squares.mean(), rtol=2e-9)
    np.testing.assert_allclose(squares.mean(0), squares.mean(), rtol=2e-9)


def test_two_blocks_that_hardly_touch_are_balanced_all_the_same():
    rng = np.random.default_rng(11)
    M = rng.normal(size=(26, 26))
    M[:13, 13:] *= 1e-2
    M[13:, :13] *= 3e-2
    balanced = WholeProduct.of(M, 26).balanced()
    assert balanced.gains.residual <= RESIDUAL
    for found in mean_squares(balanced.dense()):
        np.testing.assert_allclose(found, found.mean(), rtol=1e-8)


def test_zeros_that_no_gains_balance_are_said_by_the_residual():
    M = np.zeros((7, 7))
    M[:, 0] = M[0] = 1.0  # rows 1 to 6 live on column 0 alone, which cannot give each of them a whole share
    balanced = WholeProduct.of(M, 7).balanced()
    assert balanced.gains.residual > RESIDUAL
    assert np.isfinite(balanced.dense()).all()


def test_the_balanced_fold_is_the_balanced_effective_product():
    weights = random_heads()
    for circuit in (qk_circuit, ov_circuit, layer_ov):
        expected = circuit(weights, "effective").balanced()
        np.testing.assert_allclose(circuit(weights, "balanced").dense(), expected.dense(), rtol=1e-12)
    assert layer_ov(weights, "effective").gains is None


def test_raw_and_effective_qk_are_one_matrix_once_balanced_but_for_signs_and_one_factor():
    weights = random_heads(1)
    raw, effective = (qk_circuit(weights, fold).balanced().dense() for fold in ("raw", "effective"))
    signs = np.sign(weights.norm_gain)
    ratio = effective / raw * signs[:, None] * signs
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1, :1], ratio.shape), rtol=1e-7)


def test_the_gains_are_described_as_the_whole_matrices_have_them():
    product = unequal(12, stack=(3,))
    balanced = product.balanced()
    found = describe_gains(balanced)
    for head in range(3):
        M, N = product.dense()[head], balanced.dense()[head]
        rows, cols = balanced.gains.rows[head], balanced.gains.cols[head]
        off = N[~np.eye(29, dtype=bool)] - N[~np.eye(29, dtype=bool)].mean()
        assert found.row_gain_spread[head] == pytest.approx(np.log(rows).std())
        assert found.column_gain_spread[head] == pytest.approx(np.log(cols).std())
        assert found.gain_share[head] == pytest.approx(np.corrcoef(np.diag(M), rows * cols)[0, 1] ** 2)
        assert found.offdiagonal_kurtosis[head] == pytest.approx((off**4).mean() / (off**2).mean() ** 2 - 3)
    assert np.isnan(describe_gains(product).row_gain_spread).all()


def test_dividing_the_gains_out_leaves_gaussian_noise():
    rng = np.random.default_rng(13)
    A, B = rng.normal(size=(2, 4, 151, 64))
    gains = np.exp(0.7 * rng.normal(size=(2, 4, 151, 1)))
    before, after = (describe_gains(p).offdiagonal_kurtosis for p in _as_balanced(gains[0] * A, gains[1] * B))
    assert (before > 5).all()
    assert (np.abs(after) < 0.3).all()


def _as_balanced(A, B):
    """Return a product with gains of 1, so that it is described as it is, and the same balanced."""
    balanced = FactoredProduct(A, B).balanced()
    return FactoredProduct(A, B, gains=balanced.gains), balanced


def test_inspect_measures_balanced_products_like_those_of_any_fold(folder):  # noqa: F811
    path, model = folder
    found = attnlens.inspect(path, fold="balanced")
    total = WholeProduct.of(dense_sum(model, 1, True), 39).balanced()
    row = next(found.stats.select(layer=1, head="all").records())
    off = total.dense()[~np.eye(39, dtype=bool)]
    assert found.folds == ("balanced",)
    assert row["beta"] == pytest.approx(np.diag(total.dense()).mean())
    assert row["alpha"] == pytest.approx(np.sqrt(39 * (off**2).mean()))
    assert row["sign_agreement"] == pytest.approx((np.diag(total.dense()) * row["beta"] > 0).mean())
    assert row["row_gain_spread"] == pytest.approx(np.log(total.gains.rows).std())
    np.testing.assert_allclose(found.spectra[1, "qk", "balanced"], found.circuits(1, fold="balanced").singular_values())
    np.testing.assert_allclose(found.corners("balanced", 7).of("ov")[0][1]["all"], total.dense()[:7, :7], rtol=1e-7)
    both = attnlens.inspect(path)
    assert np.isnan(both.stats.column("row_gain_spread")).all()
    assert both.folds == ("raw", "effective")
    assert attnlens.inspect(path, fold="all").folds == ("raw", "effective", "centred", "balanced")


def test_the_gains_of_an_inspection_are_drawn_by_layer_and_channel(folder):  # noqa: F811
    found = attnlens.inspect(folder[0], fold="balanced")
    profiles = gain_profiles(found.gains)
    sums = found.circuits(2, "all", circuit="ov", fold="balanced").gains
    np.testing.assert_allclose(profiles["OV, what is written"].log_gains[2], np.log2(sums.cols), atol=1e-8)
    queries = found.circuits(0, fold="balanced").gains.rows
    np.testing.assert_allclose(profiles["QK, query side"].log_gains[0], np.log2(queries).mean(0), atol=1e-8)
    expected = np.corrcoef(profiles["QK, key side"].log_gains)
    assert profiles["QK, key side"].correlation == pytest.approx(expected[np.triu_indices(3, 1)].mean())
    figure = found.figures("balanced", 7)["gains"]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert sum(title.startswith(("QK, ", "OV, ")) for title in titles) == 4
    image = next(axes for axes in figure.axes if axes.get_title(loc="left").startswith("OV, what is written")).images[0]
    np.testing.assert_array_equal(image.get_array(), profiles["OV, what is written"].log_gains)
    assert "gains" not in attnlens.inspect(folder[0]).figures(size=7)


def test_balanced_products_are_judged_compared_and_reported(folder, run):  # noqa: F811
    path = str(folder[0])
    params = attnlens.fit_params(path, fold="balanced")
    stats = attnlens.inspect(path, fold="balanced").stats.select(layer=1, head="all")
    entry = next(e for e in params.select("ov", "all", 1))
    assert params.fold == entry.fold == "balanced"
    assert entry.alpha == pytest.approx(stats.column("alpha")[0])
    comparison = attnlens.compare(path, path, fold="balanced")
    assert comparison.distances[0]["identity_share"] == 0
    done = run("report", path, "--fold", "balanced", "--output", "page.html")
    assert done.code == 0, done.err
    done = run("inspect", path, "--fold", "balanced", "--json", "--output", "out")
    assert done.code == 0, done.err
    assert json.loads(done.out)["folds"] == ["balanced"]
    done = run("scan", path, "--fold", "balanced", "--output", "scanned", "--json")
    assert done.code == 0, done.err
    assert '"balanced"' in done.out


def test_heads_that_are_balanced_each_by_itself_do_not_compose(folder):  # noqa: F811
    with pytest.raises(UsageError, match="divides gains of its own out of each product"):
        attnlens.compose(folder[0], fold="balanced")
