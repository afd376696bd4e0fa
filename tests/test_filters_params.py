"""Filters in the parameter file: what is fitted, how it is checked on loading, and how it carries over."""

import json

import numpy as np
import pytest
import torch
from sklearn.covariance import LedoitWolf
from torch import nn

import attnlens
from attnlens.errors import ParamsError, UsageError
from attnlens.filters.closed_form import Shape, closed_form
from attnlens.filters.covariance import second_moment
from attnlens.filters.entries import triangle
from attnlens.filters.fit import shrunk
from attnlens.filters.trained import trained_shape
from attnlens.fit.params import InitParams
from attnlens.inits import init_, init_file
from tests.filter_models import CONVNEXT, both, convmixer, vit


@pytest.fixture(scope="module")
def source():
    model = convmixer(dim=200)
    init_(model, "conv-covariance", relative_s=0.1, blur=0.3, slope=0.2, contrast=0.2, seed=1)
    return model


@pytest.fixture(scope="module")
def params(source):
    return attnlens.fit_params(source)


def filters_of(model, layer):
    return model.blocks[layer][0].fn[0].weight.detach().double().numpy()[:, 0]


# What is fitted.


def test_a_model_without_attention_is_fitted_by_its_filters(params, source):
    assert params.entries == []
    assert (params.sources[0].num_layers, params.sources[0].num_filter_layers) == (0, 4)
    assert [entry.depth for entry in params.filters] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    entry = params.filters[2]
    assert (entry.name, entry.kernel, entry.filters) == ("blocks.2.0.fn.0", (5, 5), 200)
    flat = filters_of(source, 2).reshape(200, 25)
    reference = LedoitWolf(assume_centered=True).fit(flat)
    assert entry.shrinkage == pytest.approx(reference.shrinkage_)
    np.testing.assert_allclose(entry.matrix(), reference.covariance_ / np.trace(reference.covariance_), rtol=1e-6)
    assert entry.rms == pytest.approx(np.sqrt((flat**2).mean()))
    assert [entry.verdict for entry in params.filters] == ["closed form"] * 4


def test_shrinkage_is_towards_equal_variances_by_the_estimator_that_is_named(source):
    filters = filters_of(source, 0)
    S = second_moment(filters)
    isotropy = np.eye(25) * np.trace(S) / 25
    found = {name: shrunk(filters.reshape(200, 25), name) for name in ("ledoit-wolf", "oas", "none")}
    for covariance, share in found.values():
        np.testing.assert_allclose(covariance, (1 - share) * S + share * isotropy, atol=1e-14)
    shares = [share for _, share in found.values()]
    assert shares[2] == 0 < shares[1] != shares[0] < 0.5
    assert attnlens.fit_params(source, shrinkage="oas").filters[0].shrinkage == pytest.approx(shares[1])
    with pytest.raises(UsageError, match="choose ledoit-wolf, oas, none"):
        attnlens.fit_params(source, shrinkage="lasso")


def test_what_carries_over_are_medians_over_layers_of_stride_1_and_of_those_above():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(500, 500, 5, stride, groups=500) for stride in (1, 2, 1, 1, 2, (2, 1))))
    init_(model, "conv-covariance", seed=1)
    params = attnlens.fit_params(model)
    one, above = params.filter_medians
    assert (one.strided, one.layers, one.widths) == (False, 3, 3)
    assert (above.strided, above.layers, above.widths) == (True, 3, 3)
    for found in (one, above):
        own = [entry for entry in params.filters if entry.strided == found.strided]
        assert found.blur == pytest.approx(np.median([entry.blur_share for entry in own]))
        assert found.relative_s == pytest.approx(np.median([entry.relative_s for entry in own]))
        put_in = trained_shape(found.strided)
        assert found.relative() == pytest.approx(put_in, abs=0.04)
        np.testing.assert_allclose(
            params.filter_covariance(0.3, (7, 7), "parametric", found.strided),
            closed_form((7, 7), found.relative().at((7, 7))),
        )


def test_a_layer_is_drawn_from_layers_of_its_own_kind_of_stride_where_there_are_any(params):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(300, 300, 5, stride, groups=300) for stride in (1, 2, 1)))
    init_(model, "conv-covariance", seed=1)
    mixed = attnlens.fit_params(model)
    found = mixed.filter_covariance(0.1, (5, 5), "full", True)
    np.testing.assert_allclose(found, mixed.filters[1].matrix(), rtol=1e-7)
    ends = (mixed.filters[0].matrix() + mixed.filters[2].matrix()) / 2
    np.testing.assert_allclose(mixed.filter_covariance(0.5, (5, 5), "full", False), ends, rtol=1e-7)
    for form in ("full", "parametric"):  # the source has layers of stride 1 alone
        np.testing.assert_array_equal(
            params.filter_covariance(0.4, (5, 5), form, True), params.filter_covariance(0.4, (5, 5), form, False)
        )


def test_a_width_at_an_end_of_its_range_enters_no_median():
    model = convmixer(dim=400)
    for block, s in zip(model.blocks, (1.0, 2.0, 400.0, 400.0), strict=True):
        root = np.linalg.cholesky(closed_form((5, 5), Shape(s, 0.3, 0.2, 0.2)))
        normal = np.random.default_rng(0).normal(size=(400, 25)) @ root.T
        with torch.no_grad():
            block[0].fn[0].weight.copy_(torch.from_numpy(normal.reshape(400, 1, 5, 5)))
    params = attnlens.fit_params(model)
    assert [entry.s_bound for entry in params.filters] == ["", "", "upper", "upper"]
    (found,) = params.filter_medians
    assert (found.layers, found.widths) == (4, 2)
    assert 1.0 < found.relative_s * 25 < 2.0


def test_layers_without_structure_have_no_width():
    model = convmixer(dim=100)
    layer = model.blocks[0][0].fn[0]
    wide = closed_form((5, 5), Shape(5.0, 0.6, 0.2, 0.2))
    root = np.linalg.cholesky(wide + 1e-9 * np.eye(25))
    drawn = np.random.default_rng(0).normal(size=(100, 25)) @ root.T
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(drawn.reshape(100, 1, 5, 5)))
    params = attnlens.fit_params(model)
    assert [entry.verdict for entry in params.filters] == ["closed form", *["isotropic"] * 3]
    (found,) = params.filter_medians
    assert (found.layers, found.widths) == (4, 1)
    assert found.relative_s == pytest.approx(0.2, rel=0.2)
    assert found.blur + found.slope + found.contrast < 0.2


def test_a_layer_of_zeros_is_left_out_and_said():
    model = convmixer()
    nn.init.zeros_(model.blocks[1][0].fn[0].weight)
    params = attnlens.fit_params(model)
    assert [entry.layer for entry in params.filters] == [0, 2, 3]
    assert any("blocks.1.0.fn.0 holds zeros only" in text for text in params.sources[0].not_read)


# The file.


def test_a_saved_file_loads_to_the_same_parameters(params, tmp_path):
    path = params.save(tmp_path / "params.json")
    loaded = InitParams.load(path)
    assert loaded == params
    assert loaded.to_json() == path.read_text()
    assert loaded._repr_html_().count("closed form") >= 4


def test_a_file_of_version_1_still_loads():
    now = attnlens.fit_params(vit())
    old = json.loads(now.to_json())
    del old["filters"], old["filter_medians"]
    old["schema_version"] = 1
    for source in old["sources"]:
        del source["num_filter_layers"]
    assert InitParams.parse(json.dumps(old)) == now


def of_version_2(params):
    """The file as version 2 had it: the same covariances, another closed form beside them."""
    old = json.loads(params.to_json())
    del old["filter_medians"]
    trend = {"coefficients": [0.1], "residual_sd": 0.0}
    old |= {"schema_version": 2, "filter_trend": {"log_relative_s": trend, "isotropic_share": trend, "n": 4}}
    kept = {"source", "layer", "name", "depth", "kernel", "filters", "rms", "estimator", "shrinkage", "covariance"}
    kept |= {"effective_rank", "p_value", "verdict"}
    other = {"s": 9.0, "relative_s": 0.36, "isotropic_share": 0.1, "cosine": 0.5, "explained": 0.2, "explained_null": 0}
    old["filters"] = [{name: entry[name] for name in kept} | other for entry in old["filters"]]
    return old


def test_a_file_of_version_2_loads_with_the_closed_form_fitted_to_its_covariances(params):
    loaded = InitParams.parse(json.dumps(of_version_2(params)))
    assert [entry.matrix().tolist() for entry in loaded.filters] == [
        entry.matrix().tolist() for entry in params.filters
    ]
    for found, wanted in zip(loaded.filters, params.filters, strict=True):
        assert found.shape[:4] == pytest.approx(wanted.shape[:4], rel=1e-3)
        assert (found.verdict, found.stride, found.explained_null) == (wanted.verdict, (1, 1), None)
    assert loaded.filter_medians[0].relative() == pytest.approx(params.filter_medians[0].relative(), rel=1e-3)
    assert InitParams.parse(loaded.to_json()) == loaded


def test_a_file_of_version_2_that_holds_no_covariance_is_refused_by_field(params):
    old = of_version_2(params)
    old["filters"][1]["covariance"].pop()
    with pytest.raises(ParamsError, match=r"filters\.1: .*has 324 numbers, not 325"):
        InitParams.parse(json.dumps(old))


def edited(params, change):
    data = json.loads(params.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d["filters"][1]["covariance"].pop(), r"filters\.1: .*has 324 numbers, not 325"),
        (lambda d: d["filters"][0]["covariance"].__setitem__(0, -0.5), "not positive semi-definite with trace 1"),
        (lambda d: d["filters"][0].update(kernel=[3, 3]), "3 x 3 filters has 325 numbers, not 45"),
        (lambda d: d["filters"][0].update(source=1), r"filters\.0\.source is 1, but there is 1 source"),
        (lambda d: d.update(filters=[]), "entries and filters are both empty"),
        (lambda d: d.update(filter_medians=[]), "go together"),
        (lambda d: d["filters"][2].update(s=0), r"filters\.2\.s"),
    ],
)
def test_a_file_that_holds_no_covariance_is_refused_by_field(params, change, text):
    with pytest.raises(ParamsError, match=text):
        InitParams.parse(edited(params, change))


def test_rounding_of_a_stored_covariance_is_below_single_precision():
    covariance = np.cov(np.random.default_rng(0).normal(size=(9, 40)))
    unit = covariance / np.trace(covariance)
    stored = np.array(triangle(covariance))
    np.testing.assert_allclose(stored, unit[np.tril_indices(9)], rtol=5.1e-8)


# How it carries over.


def test_the_same_architecture_is_drawn_with_its_own_covariances(params):
    twin = convmixer(dim=1500)
    report = init_(twin, "conv-covariance", params=params)
    for layer, row in enumerate(report.filters):
        S = second_moment(filters_of(twin, layer))
        np.testing.assert_allclose(S / np.trace(S), params.filters[layer].matrix(), atol=0.02)
        assert row.covariance_error < 2 * row.expected_error


@pytest.mark.parametrize("form", ["full", "parametric"])
def test_deeper_wider_and_larger_networks_have_the_widths_of_the_source(params, form):
    target = convmixer(dim=800, depth=7, kernel_size=7)
    init_(target, "conv-covariance", params=params, form=form)
    found = attnlens.inspect(target).filters.stats.column("relative_s")
    np.testing.assert_allclose(found, 0.1, rtol=0.35)


def test_covariances_are_positive_semi_definite_at_any_depth_and_kernel(params):
    for form in ("full", "parametric"):
        for depth in np.linspace(0, 1, 5):
            for kernel in ((3, 3), (5, 5), (6, 4), (9, 9)):
                found = params.filter_covariance(depth, kernel, form)
                assert np.linalg.eigvalsh(found)[0] > -1e-12
                assert np.trace(found) == pytest.approx(1)


def test_half_way_between_layers_is_the_mean_of_their_covariances(params):
    found = params.filter_covariance(0.5, (5, 5), "full")
    np.testing.assert_allclose(found, (params.filters[1].matrix() + params.filters[2].matrix()) / 2, atol=1e-9)


def test_several_sources_are_averaged_and_attention_does_not_disturb(params, source):
    together = attnlens.fit_params(source, both(), vit())
    assert [len([e for e in together.filters if e.source == place]) for place in range(3)] == [4, 2, 0]
    found = together.filter_covariance(0.0, (5, 5), "full")
    assert not np.allclose(found, params.filter_covariance(0.0, (5, 5), "full"), atol=1e-3)
    alone = attnlens.fit_params(source, vit())
    np.testing.assert_allclose(
        alone.filter_covariance(0.3, (7, 7), "full"), params.filter_covariance(0.3, (7, 7), "full")
    )
    for request, only in zip(alone.for_model(vit()), attnlens.fit_params(vit()).for_model(vit()), strict=True):
        np.testing.assert_array_equal(request.qk, only.qk)


def test_filters_along_one_axis_are_not_made_of_square_ones(params):
    model = nn.Sequential(nn.Conv2d(8, 8, (1, 7), groups=8), nn.Conv2d(8, 8, 3, groups=8))
    report = init_(model, "conv-covariance", params=params)
    assert [item.reason for item in report.skipped] == [
        "has 1 x 7 filters, and the parameters hold none that extend alike"
    ]
    assert [row.layer for row in report.filters] == [1]


# The command and the figures.


def test_the_command_prints_writes_and_draws(run, tmp_path):
    init_file("convnext_tiny", tmp_path / "net.safetensors", init="conv-covariance", model_args=CONVNEXT)
    done = run("fit-params", "net.safetensors", "--shrinkage", "oas", "--figures", "figures")
    assert done.code == 0, done.err
    assert "net: filter covariances (oas)" in done.out
    assert done.out.count("7×7") == 6
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"filter_fit.png"}
    assert {entry.estimator for entry in InitParams.load(tmp_path / "params.json").filters} == {"oas"}


def test_every_source_with_filters_has_its_figure(source):
    drawn = attnlens.fit_params(source, both()).figures()
    assert set(drawn) == {"filter_fit_0", "filter_fit_1", "fit_profile", "realised_requested", "tails"}
    assert len(drawn["filter_fit_0"].axes) == 2 * 4
