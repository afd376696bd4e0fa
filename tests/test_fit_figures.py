"""Figures of fits and comparisons: the numbers drawn, the labels, and that nothing lies over anything else."""

import math

import numpy as np
import pytest
import torch

import attnlens
from tests.test_inspect import small_vit


@pytest.fixture(scope="module")
def params():
    return attnlens.fit_params(small_vit(init_values=0.1))


@pytest.fixture(scope="module")
def figures(params):
    return params.figures()


def panel(figure, label, column):
    """Return the axes of the row with this y label, in QK's (0) or OV's (1) column."""
    first = next(axes for axes in figure.axes if axes.get_ylabel() == label)
    return figure.axes[figure.axes.index(first) + column]


def points(axes, crossed=False, fill="full"):
    """Return what is drawn with marks, lines through them or not: crosses, or all others."""
    return [
        np.column_stack(line.get_data())
        for line in axes.lines
        if line.get_marker() != "None" and (line.get_marker() == "x") == crossed and line.get_fillstyle() == fill
    ]


def words(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_every_figure_is_drawn_with_its_labels(figures):
    assert {name: sorted({a.get_ylabel() for a in f.axes} - {""}) for name, f in figures.items()} == {
        "fit_profile": ["alpha (log scale)", "beta (arcsinh scale)"],
        "realised_requested": ["requested alpha (log scale)", "requested beta (arcsinh scale)"],
        "tails": ["excess kurtosis (arcsinh scale)", "share of squared norm"],
    }
    for figure in figures.values():
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        assert titles == ["QK, every head", "OV, summed over heads"] * 2


def test_the_profile_shows_raw_beside_effective_with_intervals_and_the_null_band(params, figures):
    axes = panel(figures["fit_profile"], "beta (arcsinh scale)", 0)
    raw, effective = points(axes)
    np.testing.assert_array_equal(raw[:, 1], [e.beta for e in params.select("qk", "each", fold="raw")])
    np.testing.assert_array_equal(effective[:, 1], [e.beta for e in params.select("qk", "each")])
    assert raw[0, 0] < 0 < effective[0, 0]  # to the left and right of layer 0
    bars = [c for c in axes.collections if hasattr(c, "get_segments") and len(c.get_segments()) == 9]
    ends = np.array([segment[:, 1] for segment in bars[1].get_segments()])
    np.testing.assert_allclose(ends, [[e.beta_low, e.beta_high] for e in params.select("qk", "each")])
    low, high = axes.get_ylim()
    assert low < ends.min() < ends.max() < high
    bands = [c for c in axes.collections if c not in bars]
    expected = 2 * np.median([e.null_sd for e in params.select("qk", "each", 0)])
    first = bands[1].get_paths()[0].vertices
    assert np.abs(first[first[:, 0] < 0.5][:, 1]).max() == pytest.approx(expected)
    assert words(figures["fit_profile"]) == ["raw weights", "effective (norm gain and any LayerScale folded in)"]


def test_realised_against_requested_has_one_scale_on_both_axes(params, figures):
    figure = figures["realised_requested"]
    for name, scale in (("alpha", "log"), ("beta", "arcsinh")):
        axes = panel(figure, f"requested {name} ({scale} scale)", 0)
        entries = [entry for entry in params.select("qk", "each") if entry.reachable]
        drawn = points(axes)[0]
        expected = [[getattr(e, name), getattr(e, f"request_{name}")] for e in entries]
        np.testing.assert_array_equal(drawn, expected)
        assert axes.get_xlabel() == f"realised {name}"
        assert axes.get_xlim() == axes.get_ylim()
        assert axes.get_xscale() == axes.get_yscale()
        assert np.all((drawn > axes.get_xlim()[0]) & (drawn < axes.get_xlim()[1]))


def test_requests_beyond_the_bound_are_crossed_and_explained():
    model = small_vit()
    with torch.no_grad():
        basis = torch.linalg.qr(torch.randn(39, 13, generator=torch.Generator().manual_seed(0)))[0].T
        model.blocks[0].attn.qkv.weight[:13] = basis
        model.blocks[0].attn.qkv.weight[39:52] = basis
    params = attnlens.fit_params(model, fold="raw")
    figure = params.figures()["realised_requested"]
    (crosses,) = [
        drawn for drawn in points(panel(figure, "requested beta (arcsinh scale)", 0), crossed=True) if len(drawn)
    ]
    (nearest,) = [entry for entry in params.entries if not entry.reachable]
    np.testing.assert_array_equal(crosses, [[nearest.beta, nearest.request_beta]])
    assert words(figure)[-1] == "beyond the bound of its rank: nearest request"


def test_tails_and_shares_are_those_of_the_file_and_the_legend_says_which_is_which(params, figures):
    figure = figures["tails"]
    entries = params.select("ov", "all")
    (kurtosis,) = points(panel(figure, "excess kurtosis (arcsinh scale)", 1))
    np.testing.assert_array_equal(kurtosis[:, 1], [e.offdiagonal_kurtosis for e in entries])
    axes = panel(figure, "share of squared norm", 1)
    (filled,), (empty,) = points(axes), points(axes, fill="none")
    np.testing.assert_array_equal(filled[:, 1], [e.share_identity for e in entries])
    np.testing.assert_array_equal(empty[:, 1], [e.share_low_rank for e in entries])
    assert words(figure)[1:] == ["share in beta·I", "share above the noise's edge"]
    styles = [handle.get_fillstyle() for handle in figure.legends[0].legend_handles][1:]
    assert styles == ["full", "none"]


def test_no_label_lies_over_another_row(figures):
    for figure in figures.values():
        figure.canvas.draw()
        renderer = figure.canvas.get_renderer()
        boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
        for upper, lower in ((0, 2), (1, 3)):
            assert boxes[upper].y0 > boxes[lower].y1
        legend = figure.legends[0].get_window_extent(renderer)
        assert legend.y0 > max(box.y1 for box in boxes)
        assert legend.x1 < figure.bbox.x1
        assert min(box.y0 for box in boxes) > 0


def test_a_zero_product_is_left_out_of_the_panels_it_has_no_number_for():
    model = small_vit()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.zero_()
    figure = attnlens.fit_params(model).figures()["tails"]
    (drawn,) = points(panel(figure, "excess kurtosis (arcsinh scale)", 1))
    assert [math.isnan(value) for value in drawn[:, 1]] == [False, True, False]


def test_several_models_have_a_colour_and_a_mark_each():
    params = attnlens.fit_params(small_vit(), small_vit(1))
    axes = panel(params.figures()["fit_profile"], "alpha (log scale)", 0)
    looks = [(line.get_color(), line.get_marker()) for line in axes.lines if line.get_marker() != "None"]
    assert [len(set(each)) for each in zip(*looks, strict=True)] == [2, 2]
    first, second = points(axes)
    np.testing.assert_array_equal(first[:, 1], [e.alpha for e in params.select("qk", "each") if e.source == 0])
    np.testing.assert_array_equal(second[:, 1], [e.alpha for e in params.select("qk", "each") if e.source == 1])


def test_a_comparison_draws_every_profile_against_relative_depth():
    comparison = attnlens.compare(small_vit(), small_vit(1))
    figure = comparison.figures()["comparison"]
    assert len(figure.axes) == 6
    labels = {"alpha (log scale)": "alpha", "beta (arcsinh scale)": "beta", "identity cosine ÷ bound": "identity_share"}
    for label, statistic in labels.items():
        for column, circuit in enumerate(("qk", "ov")):
            drawn = points(panel(figure, label, column))
            for data, profile in zip(drawn, comparison.select(circuit, statistic), strict=True):
                np.testing.assert_array_equal(data, np.column_stack([profile.depth, profile.values]))
    assert words(figure) == list(comparison.models)
    assert figure.axes[-1].get_xlabel() == "relative depth"
