"""Weights of every size that is read: statistics that are free of scale, figures, and what is refused in one line."""

import json

import matplotlib.image
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import attnlens
from attnlens.circuits import CIRCUITS, FactoredProduct, WholeProduct, layer_ov
from attnlens.composition import composition_scores
from attnlens.errors import UnsupportedAttentionError
from attnlens.figures import heatmaps, save_figures, scales
from attnlens.layouts.read_write import LARGEST
from attnlens.reports.matrices import BINS, CODES, HALF, _drawn, encode
from attnlens.statistics.corners import Corners
from attnlens.statistics.diagonal import fit_diagonal
from tests.conftest import random_heads

WIDTH, LAYERS, HEADS = 16, 2, 2
IN_UNITS = ("alpha", "beta", "beta_stderr", "frobenius_norm", "spectral_norm")


def state(scale=1.0, dtype=torch.float64, *, heads=(1.0, 1.0), gain=1.0, channels=None, norm=True):
    """Return weights of two layers by names that show their roles; ``heads`` are the sizes of each head's weights."""
    rng, found = np.random.default_rng(0), {}
    rows = np.repeat(heads, WIDTH // HEADS)
    for layer in range(LAYERS):
        qkv = rng.normal(size=(3, WIDTH, WIDTH)) * rows[:, None]
        proj = rng.normal(size=(WIDTH, WIDTH)) * rows
        if channels is not None:
            qkv, proj = qkv * channels, proj * channels[:, None]
        arrays = {"attn.qkv.weight": qkv.reshape(-1, WIDTH) * scale, "attn.proj.weight": proj * scale}
        if norm:
            sizes = {"norm1.weight": gain, "norm1.bias": 0.0, "ls1.gamma": gain}
            arrays |= {name: np.full(WIDTH, size) for name, size in sizes.items()}
        found |= {f"blocks.{layer}.{name}": torch.from_numpy(array).to(dtype) for name, array in arrays.items()}
    return found


def inspected(weights, fold="all"):
    return attnlens.inspect(weights, num_heads=HEADS, fold=fold)


def test_inspect_ends_well_at_every_size(run, tmp_path):
    cases = {
        "long": state(1e10, torch.float32),
        "longer": state(1e14, torch.float32),
        "longest": state(1e14, gain=9e14),
        "short": state(1e-44, torch.float32),
        "shorter": state(1e-60),
        "shortest": state(1e-38, torch.bfloat16),
        **{f"subnormal{power}": state(10.0**-power) for power in (155, 158, 160, 161, 162, 300)},
    }
    for name, weights in cases.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
        done = run("inspect", f"{name}.safetensors", "--num-heads", HEADS, "--fold", "all", "-o", name)
        assert (done.code, "internal" in done.err, "Warning" in done.err) == (0, False, False), (name, done.err)
        rows = json.loads((tmp_path / name / "stats.json").read_text())["stats"]
        assert all(row["identity_cosine"] is not None and row["stable_rank"] is not None for row in rows), name
        for row in (row for row in rows if row["fold"] == "balanced"):
            assert None not in (row["gain_share"], row["offdiagonal_kurtosis"], row["row_gain_spread"]), name
        assert name.startswith("subnormal") or all(row["alpha"] > 0 for row in rows), name


@pytest.mark.parametrize("exponent", [-400, -260, -100, 40])
def test_what_is_said_of_weights_times_a_power_of_two_is_said_of_the_weights_to_the_bit(exponent):
    plain, scaled = inspected(state()), inspected(state(2.0**exponent))
    for one, other in zip(plain, scaled, strict=True):
        for name, value in one.items():
            expected = np.ldexp(value, 2 * exponent) if name in IN_UNITS else value
            np.testing.assert_array_equal(other[name], expected, err_msg=name)
    fits = [attnlens.fit_params(weights, num_heads=HEADS).entries for weights in (state(), state(2.0**exponent))]
    for one, other in zip(*fits, strict=True):
        assert (other.verdict, other.p_value, other.offdiagonal_kurtosis) == (
            *(one.verdict, one.p_value, one.offdiagonal_kurtosis),
        )
        for name in ("alpha_low", "beta_high", "null_sd", "request_alpha", "diagonal_median"):
            assert getattr(other, name) == np.ldexp(getattr(one, name), 2 * exponent)
    scores = [attnlens.compose(weights, num_heads=HEADS)["score"] for weights in (state(), state(2.0**exponent))]
    np.testing.assert_array_equal(*scores)


@pytest.mark.parametrize("exponent", [-510, -600, -1000])
def test_ratios_of_products_that_float64_does_not_hold_are_those_of_the_products(exponent):
    plain, scaled = inspected(state()), inspected(state(2.0**exponent))
    for one, other in zip(plain, scaled, strict=True):
        for name in ("identity_cosine", "stable_rank", "symmetric_share", "gain_share", "offdiagonal_kurtosis"):
            np.testing.assert_allclose(other[name], one[name], rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("folds", ["raw", "effective", "balanced"])
def test_products_too_small_for_a_fit_are_refused_by_name(folds):
    small = rf"^blocks\.0\.attn: the entries of the (raw|{folds}) QK product of head 1 are too small to be measured"
    with pytest.raises(UnsupportedAttentionError, match=small):
        attnlens.fit_params(state(heads=(1.0, 1e-155)), num_heads=HEADS, fold=folds)
    attnlens.fit_params(state(heads=(1.0, 1e-145)), num_heads=HEADS, fold=folds)
    attnlens.fit_params(state(heads=(1.0, 0.0)), num_heads=HEADS, fold=folds)  # zero is no small size


def test_a_sum_over_heads_too_small_for_a_fit_is_refused_by_name():
    weights = state()
    for name in weights:
        if "qkv" in name:
            weights[name][2 * WIDTH :] *= 1e-310
    with pytest.raises(UnsupportedAttentionError, match="the raw OV product of head 0 are too small"):
        attnlens.fit_params(weights, num_heads=HEADS, fold="raw")


def test_fit_params_says_in_a_line_what_is_too_small_and_writes_figures_of_what_is_not(run, tmp_path):
    for name, scale, code in (("tiny", 1e-160, 1), ("small", 1e-60, 0), ("large", 1e14, 0)):
        save_file(state(scale), tmp_path / f"{name}.safetensors")
        done = run("fit-params", f"{name}.safetensors", "--num-heads", HEADS, "-o", f"{name}.json")
        assert done.code == code, done.err
        assert "internal" not in done.err
        if code:
            assert done.err.startswith("attnlens: blocks.0.attn: the entries of the raw QK product of head 0")
            assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("heads", [(1e14, 1e-200), (1e-140, 1e14), (0.0, 1e14), (0.0, 0.0)])
def test_heads_of_very_different_sizes_stand_beside_each_other(heads, tmp_path):
    weights = state(heads=heads)
    found = inspected(weights)
    for fold in found.folds:
        save_figures(found.figures(fold), tmp_path)
    for row in found.stats.select(circuit="qk", fold="raw"):
        assert np.isfinite(row["stable_rank"]) == (heads[row["head"]] != 0)
    save_figures(attnlens.compose(weights, num_heads=HEADS).figures(), tmp_path)
    save_figures(attnlens.compare(weights, state(), num_heads=HEADS).figures(), tmp_path)
    page = attnlens.report(weights, num_heads=HEADS, fold="all")
    json.dumps(page.to_json(), allow_nan=False)
    assert ("too small to be measured" in page) == (1e-200 in heads)


def test_the_distance_in_alpha_is_left_out_where_float64_does_not_hold_it():
    for scale, known in ((1e-150, True), (1e-160, False)):
        found = attnlens.compare(state(scale), state(), num_heads=HEADS).distances
        for row in found:
            assert row["identity_share"] == pytest.approx(0, abs=1e-9)
            assert row["log_alpha"] == (pytest.approx(300) if known else None)


# Products.


def test_a_sum_that_would_leave_float64_keeps_its_factors():
    heads = random_heads(value_dim=13)
    whole = layer_ov(heads)
    assert isinstance(whole, WholeProduct)
    small = heads.replace(W_V=np.ldexp(heads.W_V, -600), W_O=np.ldexp(heads.W_O, -500))
    apart = layer_ov(small)
    assert not isinstance(apart, WholeProduct)
    fits = [fit_diagonal(product.unit[0], None) for product in (whole, apart)]
    for name in ("identity_cosine", "stable_rank", "symmetric_share"):
        np.testing.assert_allclose(*(getattr(fit, name) for fit in fits), rtol=1e-12)
    unit, exponent = apart.unit
    np.testing.assert_allclose(np.ldexp(unit.dense(), exponent + 1100), whole.dense(), rtol=1e-12)
    np.testing.assert_allclose(unit.parts.dense().sum(0), unit.dense(), atol=1e-12)
    for factor in (unit.parts.A, unit.parts.B):
        assert 2**-10 < np.abs(factor).max() < 2**10


def test_composition_of_products_at_any_scale():
    rng = np.random.default_rng(3)
    A, B, C, D = rng.normal(size=(4, 3, 13, 5))
    plain = composition_scores(FactoredProduct(A, B), FactoredProduct(C, D))
    tiny = FactoredProduct(np.ldexp(A, -700), np.ldexp(B, -300))
    for found, expected in zip(composition_scores(tiny, FactoredProduct(C, D)), plain, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("decades", [30, 60, 174])
def test_channels_many_decades_apart_have_gains_that_are_numbers(decades, tmp_path):
    found = inspected(state(channels=np.logspace(14 - decades, 14, WIDTH)))
    assert np.isfinite(found.stats.select(fold="balanced")["balance_residual"]).all()
    save_figures(found.figures("balanced"), tmp_path)


# Figures.


@pytest.mark.parametrize("scale", [1e-270, 1e-88, 1e20, 1e28, 1e60])
def test_a_heatmap_has_the_colours_of_the_same_product_at_an_ordinary_size(scale):
    rng = np.random.default_rng(1)
    plain = {layer: {head: rng.normal(size=(7, 7)) for head in range(2)} for layer in range(3)}
    far = {layer: {head: scale * panel for head, panel in row.items()} for layer, row in plain.items()}
    one, other = heatmaps.colour_scale(plain), heatmaps.colour_scale(far)
    assert other.limit == pytest.approx(scale * one.limit, rel=1e-9)
    mosaics = heatmaps.compose(plain).image, heatmaps.compose(far).image
    np.testing.assert_allclose(other(mosaics[1]), one(mosaics[0]), atol=1e-6)


def test_a_head_beyond_all_limits_is_drawn_at_the_end_of_the_scale():
    panels = {0: {0: np.full((2, 2), 1e60), **{head: np.full((20, 20), 1e-270) for head in range(1, 5)}}}
    scale = heatmaps.colour_scale(panels)
    assert scale.limit == 1e-270
    assert scale(np.array([1e60, 1e-270, -1e60])).tolist() == [np.inf, 1.0, -np.inf]


def test_corners_are_kept_in_float64_where_float32_would_lose_them():
    weights = random_heads()
    for scale, kind in ((1.0, np.float32), (1e15, np.float64), (1e-12, np.float64)):
        corners = Corners("raw", 4)
        product = CIRCUITS["qk"](weights.replace(W_Q=scale * weights.W_Q, W_K=scale * weights.W_K), "raw")
        corners.observe(weights, "qk", "raw", product)
        panels, _ = corners.of("qk")
        assert {panel.dtype for panel in panels[2].values()} == {np.dtype(kind)}
        np.testing.assert_allclose(panels[2][0], product.head(0).dense(4), rtol=1e-6)


def test_what_is_too_small_to_be_drawn_is_drawn_as_zero():
    assert scales.drawable(np.array([1.0, 1e-279, -1e-281, 5e-324, 0.0])).tolist() == [1.0, 1e-279, 0.0, 0.0, 0.0]
    assert scales.drawable(np.array([1e60, -1e-239, 1e-241])).tolist() == [1e60, -1e-239, 0.0]
    assert np.isnan(scales.drawable(np.array([np.nan, 1.0]))).tolist() == [True, False]
    for scale, drawn in ((1e-135, True), (1e-150, False)):
        figures = inspected(state(scale), "raw").figures()
        words = [text.get_text().replace("\n", " ") for text in figures["qk_heatmap"].texts]
        assert any("Products below 1e-280 are drawn as zero." in text for text in words) != drawn
        (image,) = (axes.images[0] for axes in figures["qk_heatmap"].axes if axes.images)
        assert (np.ptp(image.norm(image.get_array())) > 0.5) == drawn


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e-320, 1e30])
def test_a_page_draws_matrices_of_every_size(scale):
    rng = np.random.default_rng(2)
    matrix = rng.normal(size=(7, 7)) * scale
    found = encode(matrix)
    plain = encode(matrix / scale if scale > 1e-300 else np.zeros((7, 7)))
    assert found["text"] == plain["text"]
    assert found["width"] > 0
    assert (found["text"] == CODES[HALF] * 49) == (scale < 1e-300)
    for diagonal in (rng.normal(size=31) * scale, np.full(31, scale), scale * (1 + 1e-16 * rng.normal(size=31))):
        histogram = _drawn(matrix, diagonal)["histogram"]
        assert sum(histogram["counts"]) == 31
        assert len(histogram["counts"]) == BINS
        assert histogram["low"] < histogram["high"]


def test_weights_that_make_the_identity_have_a_page_and_figures_of_their_fit(tmp_path):
    eye = {
        f"blocks.{layer}.attn.{name}.weight": torch.eye(WIDTH, dtype=torch.float64).repeat(times, 1)
        for layer in range(LAYERS)
        for name, times in (("qkv", 3), ("proj", 1))
    }
    for scale in (1.0, LARGEST):
        weights = {name: scale * tensor for name, tensor in eye.items()}
        assert "<html" in attnlens.report(weights, num_heads=HEADS, fold="raw")
        save_figures(attnlens.fit_params(weights, num_heads=HEADS, fold="raw").figures(), tmp_path)


# Corners where norms are not known.


def test_corners_turn_to_the_preferred_fold_once_it_is_there_and_drop_the_other():
    weights, found = random_heads(), Corners("raw", 8, bounded=True, preferred="effective")
    products = {fold: CIRCUITS["qk"](weights, fold) for fold in ("raw", "effective")}
    found.observe(weights, "qk", "raw", products["raw"])
    found.observe(random_heads(layer=3), "qk", "raw", products["raw"])
    assert (found.fold, sorted(found.of("qk")[0])) == ("raw", [2, 3])
    found.size = 3  # as many heads would have it
    found.observe(weights, "qk", "effective", products["effective"])
    found.observe(random_heads(layer=4), "qk", "raw", products["raw"])
    panels, shapes = found.of("qk")
    assert (found.fold, found.size, list(panels), shapes) == ("effective", 8, [2], {2: (13, 13)})
    np.testing.assert_allclose(panels[2][1], products["effective"].head(1).dense(8), rtol=1e-6)


def test_the_default_crop_shrinks_where_no_norm_is_known(run, tmp_path, monkeypatch):
    monkeypatch.setattr("attnlens.statistics.corners.HEATMAP_ENTRIES", 400)
    monkeypatch.setattr(attnlens.Inspection, "corners", None)  # nothing is read again
    save_file(state(norm=False), tmp_path / "bare.safetensors")
    save_file(state(), tmp_path / "normed.safetensors")
    for name, fold in (("bare", "raw"), ("normed", "effective")):
        done = run("inspect", f"{name}.safetensors", "--num-heads", HEADS, "-o", name)
        assert done.code == 0, done.err
        assert f"figures ({fold}, png)" in done.err
        assert "heatmaps show 8 dimensions" in done.err  # 6 panels of OV: 8 x 8 each
        assert matplotlib.image.imread(tmp_path / name / "ov_heatmap.png").size
