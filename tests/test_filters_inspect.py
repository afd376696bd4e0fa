"""`inspect` of depthwise filters: which layers, what is said of them, what chance gives, tables and figures."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from timm.layers import StdConv2d
from torch import nn

import attnlens
from attnlens.checkpoints import ModuleWeights
from attnlens.errors import CheckpointError, UnsupportedAttentionError, UsageError
from attnlens.filters.closed_form import Shape, closed_form
from attnlens.filters.covariance import second_moment
from attnlens.filters.figures import Covariance, colour_limit, draw_mosaics, mosaic
from attnlens.filters.statistics import COLUMNS, fit_filters
from attnlens.inits import init_, init_file
from attnlens.layouts.depthwise import FilterSpec, filter_modules, filter_parameters, read_filters, write_filters
from attnlens.layouts.spec import Refusal
from attnlens.models import described
from attnlens.models.architecture import describe_module
from attnlens.models.described import describe_architecture
from attnlens.scans.worker import measure
from attnlens.training.source import Source
from tests.filter_models import CONVNEXT, both, convmixer, convnext

# Which layers.


def test_depthwise_convolutions_are_found_with_several_filters_a_channel_and_others_are_not():
    found = list(filter_modules(both()))
    assert [(spec.path, spec.filters, spec.channels, spec.kernel) for spec in found] == [
        ("mix", 12, 12, (3, 5)),
        ("widen", 24, 12, (7, 7)),
    ]
    assert [spec.tensors() for spec in found] == [("mix.weight", "mix.bias"), ("widen.weight",)]
    assert filter_parameters(both()) == ["mix.weight", "widen.weight"]


@pytest.mark.parametrize(
    ("name", "layers", "kernel"), [("convnext_tiny", 18, (7, 7)), ("convmixer_1024_20_ks9_p14", 20, (9, 9))]
)
def test_timms_networks_have_their_layers(name, layers, kernel):
    with torch.device("meta"):
        found = list(filter_modules(timm.create_model(name)))
    assert len(found) == layers
    assert {spec.kernel for spec in found} == {kernel}


def test_filters_that_are_not_stored_are_refused_and_standardised_ones_labelled():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), StdConv2d(4, 4, kernel_size=3, groups=4))
    nn.utils.parametrizations.weight_norm(model[0])
    refused, labelled = filter_modules(model)
    assert isinstance(refused, Refusal)
    assert "other tensors" in refused.reason
    assert "standardised" in labelled.label
    inspection = attnlens.inspect(model)  # what a parametrisation computes is computed first, and read then
    assert inspection.filters.refused == ()
    assert inspection.filters.left_out() == {labelled.label: [1]}


def test_an_architecture_is_cached_with_its_filters(monkeypatch):
    first = describe_architecture("convnext_tiny", CONVNEXT)
    monkeypatch.setattr(described, "build", lambda *_: pytest.fail("built again"))
    again = describe_architecture("convnext_tiny", json.loads(json.dumps(CONVNEXT)))
    assert again == first
    assert len(again.filters) == 6
    assert again.specs == ()
    assert all(isinstance(spec, FilterSpec) for spec in again.filters)


def test_filters_written_are_filters_read():
    model = both()
    weights, (mix, _) = ModuleWeights(model), describe_module(both()).filters
    given = np.arange(12 * 15, dtype=float).reshape(12, 3, 5)
    write_filters(mix, given, weights, np.arange(12.0))
    np.testing.assert_array_equal(read_filters(mix, weights), given)
    assert model.mix.weight[7, 0, 2, 4] == 7 * 15 + 2 * 5 + 4
    np.testing.assert_array_equal(model.mix.bias.detach(), np.arange(12))
    with pytest.raises(CheckpointError, match=r"mix.weight has shape \(2, 2\), not \(12, 1, 3, 5\)"):
        read_filters(mix, {"mix.weight": np.zeros((2, 2))})


def test_a_bare_file_is_read_by_the_shapes_of_its_tensors(run, tmp_path):
    """The same layers, in the same order and with the same statistics, as the network that wrote the file."""
    from safetensors.torch import save_file

    model = convmixer(depth=11, in_chans=3)
    save_file(model.state_dict(), tmp_path / "bare.safetensors")
    found, wanted = attnlens.inspect(tmp_path / "bare.safetensors").filters, attnlens.inspect(model).filters
    place = COLUMNS.index("leaves_out")
    assert [row[:place] for row in found.stats.rows] == [row[:place] for row in wanted.stats.rows]
    assert [spec.bias for _, spec in found.specs] == [f"blocks.{layer}.0.fn.0.bias" for layer in range(11)]
    assert all("stride is not known" in label for label in found.left_out())
    assert run("inspect", "bare.safetensors", "-o", "out").out.count("5×5") == 11


def test_filters_of_one_input_channel_cannot_be_told_apart_in_a_bare_file_and_the_label_says_so(tmp_path):
    from safetensors.torch import save_file

    save_file(convmixer().state_dict(), tmp_path / "bare.safetensors")
    filters = attnlens.inspect(tmp_path / "bare.safetensors").filters
    assert [spec.path for _, spec in filters.specs][-1] == "stem.0"
    assert all("single input channel look the same" in spec.label for _, spec in filters.specs)


def test_a_bare_file_with_attention_needs_a_head_count_and_has_both_then(tmp_path):
    from safetensors.torch import save_file

    save_file(both().state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match="give num_heads"):
        attnlens.inspect(tmp_path / "bare.safetensors")
    inspection = attnlens.inspect(tmp_path / "bare.safetensors", num_heads=3)
    assert [spec.path for _, spec in inspection.filters.specs] == ["mix", "widen"]
    assert inspection.layers == (0,)


def test_a_bare_file_without_either_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file(nn.Conv2d(4, 4, 3).state_dict(), tmp_path / "bare.safetensors")
    with pytest.raises(UsageError, match="does not say which architecture"):
        attnlens.inspect(tmp_path / "bare.safetensors")


# What is said of a layer.


def drawn(covariance, count, kernel, seed=0):
    values, vectors = np.linalg.eigh(covariance)
    normal = np.random.default_rng(seed).normal(size=(count, len(covariance)))
    return (normal * np.sqrt(values.clip(0)) @ vectors.T).reshape(count, *kernel)


def test_statistics_of_a_layer_known_by_hand():
    filters = np.array([[[3.0, 0.0]], [[-3.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])  # S = diag(4.5, 0.5)
    fit, values = fit_filters(filters)
    np.testing.assert_allclose(values, [4.5, 0.5])
    assert fit.rms == pytest.approx(math.sqrt(2.5))
    assert fit.top_share == pytest.approx(0.9)
    assert fit.effective_rank == pytest.approx(25 / 20.5)
    assert fit.mean_share == pytest.approx(0.5**2 / 5)
    assert fit.noise_share == 1  # (25 + 20.5) / 4 > 20.5 - 12.5


def test_what_is_of_attention_alone_refuses_filters_alone_in_one_line():
    refused = "depthwise filters and no attention"
    model = convmixer()
    student = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=3)
    with pytest.raises(UnsupportedAttentionError, match=refused):
        attnlens.compose(model)
    with pytest.raises(UnsupportedAttentionError, match=refused):
        Source.of(model)
    with pytest.raises(UnsupportedAttentionError, match=refused):
        init_(student, "transfer-attention", teacher=model)
    assert len(attnlens.fit_params(model).filters) == len(attnlens.inspect(model).filters.specs) > 0


def test_a_scan_tells_a_model_of_filters_alone_as_failed(weights):
    found = measure({"name": "small", "model": str(weights)}, {}, 1)
    assert found["status"] == "failed"
    assert "no attention that was read: a scan is of attention" in found["error"]


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e14])
def test_no_scale_changes_what_is_said_of_a_layer(scale):
    filters = np.random.default_rng(0).normal(size=(20, 3, 3))
    (one, _), (other, _) = fit_filters(filters), fit_filters(filters * scale)
    assert other.rms == pytest.approx(one.rms * scale)
    assert (one.verdict, one.p_value) == (other.verdict, other.p_value)
    for name in ("effective_rank", "effective_rank_null", "explained", "explained_null", "isotropic_share"):
        assert getattr(other, name) == pytest.approx(getattr(one, name), rel=1e-5), name


def test_filters_that_are_all_alike_are_their_mean():
    fit, values = fit_filters(np.ones((30, 3, 3)))
    assert fit.mean_share == pytest.approx(1)
    assert fit.mean_share_null == pytest.approx(1 / 30, rel=0.15)
    assert values[1] == pytest.approx(0, abs=1e-12)


def test_filters_of_the_closed_form_are_named_so_and_others_structured():
    covariance = closed_form((5, 5), Shape(1.5, 0.2, 0.3, 0.2))
    fit, _ = fit_filters(drawn(covariance, 400, (5, 5)))
    assert fit.verdict == "closed form"
    assert fit.s == pytest.approx(1.5, rel=0.1)
    assert fit.isotropic_share == pytest.approx(0.3, abs=0.06)
    assert fit.explained_covariances > 0.8
    assert 1 - 2 * fit.noise_share < fit.explained < 1
    edges = np.diag([1.0, *[0.02] * 23, 1.0])  # all in two corners
    fit, _ = fit_filters(drawn(edges, 400, (5, 5)))
    assert fit.verdict == "structured"
    assert fit.explained < 0.2


def test_what_is_explained_of_variances_alone_is_no_closed_form():
    """Variances that fall off from the centre as smoothing has them, and covariances of another kind."""
    window = np.diag(closed_form((5, 5), Shape(1.0, 0.7, 0.0, 0.3)))
    signs = np.random.default_rng(0).choice([-1, 1], 25)
    common = np.outer(signs, signs) * np.sqrt(np.outer(window, window))
    fit, _ = fit_filters(drawn(0.8 * np.diag(window) + 0.2 * common, 900, (5, 5)))
    assert fit.explained > 0.5
    assert fit.explained_covariances < 0.2
    assert fit.verdict == "structured"


def test_what_chance_gives_is_what_isotropic_filters_have():
    """Of 40 layers without structure, few have p at or below .05, and means agree with the null's."""
    rng = np.random.default_rng(1)
    fits = [fit_filters(rng.normal(size=(60, 3, 3)), seed=seed)[0] for seed in range(40)]
    assert sum(fit.p_value <= 0.05 for fit in fits) <= 7  # binomial(40, .05): 8 or more once in 2,000
    assert 0.2 < np.mean([fit.p_value for fit in fits]) < 0.8
    assert sum(fit.verdict == "isotropic" for fit in fits) >= 38
    for name in ("effective_rank", "explained", "mean_share"):
        found, null = (np.array([getattr(fit, column) for fit in fits]) for column in (name, f"{name}_null"))
        assert found.mean() == pytest.approx(null.mean(), rel=4 * found.std() / found.mean() / math.sqrt(40)), name


def test_a_few_large_filters_make_no_structure():
    """The null has the layer's norms: with norms all alike it would call these filters structured."""
    rng = np.random.default_rng(2)
    norms = np.where(np.arange(200) < 8, 30.0, 1.0)[:, None, None]
    fit, _ = fit_filters(norms * rng.normal(size=(200, 3, 3)))
    assert fit.verdict == "isotropic"
    assert fit.effective_rank < 6
    assert fit_filters(rng.normal(size=(200, 3, 3)))[0].effective_rank_null > 8


# The command and its results.


def test_a_model_with_filters_alone_is_inspected():
    model = convmixer()
    init_(model, "conv-covariance", seed=1)
    inspection = attnlens.inspect(model)
    assert len(inspection.stats) == 0
    stats = inspection.filters.stats
    assert stats.columns == COLUMNS
    assert stats.column("layer").tolist() == [0, 1, 2, 3]
    assert {row["name"] for row in stats.records()} == {f"blocks.{layer}.0.fn.0" for layer in range(4)}
    flat = model.blocks[2][0].fn[0].weight.detach().double().numpy().reshape(24, 25)
    np.testing.assert_allclose(inspection.filters.covariance(2), flat.T @ flat / 24)
    np.testing.assert_allclose(inspection.filters.spectra[2].sum(), (flat**2).sum() / 24)
    assert set(inspection.figures()) == {"filter_covariance", "filter_profile", "filter_spectra"}
    assert "closed form" in inspection._repr_html_()


def test_a_model_with_both_shows_both_and_layers_are_chosen_of_each():
    inspection = attnlens.inspect(both())
    assert (inspection.layers, inspection.filters.layers) == ((0,), (0, 1))
    assert {"qk_heatmap", "filter_covariance"} < set(inspection.figures())
    chosen = attnlens.inspect(both(), layers=[1])
    assert (chosen.layers, chosen.filters.layers) == ((), (1,))
    with pytest.raises(UsageError, match=r"layer 2 of Both cannot be read: choose from \[0, 1\]"):
        attnlens.inspect(both(), layers=[2])
    with pytest.raises(UsageError, match=r"layer 0 of filters was not read: choose from \[1\]"):
        chosen.filters.read(0)


def test_zeros_are_called_zeros():
    model = convmixer()
    nn.init.zeros_(model.blocks[1][0].fn[0].weight)
    inspection = attnlens.inspect(model)
    assert [row["verdict"] == "zeros" for row in inspection.filters.stats.records()] == [False, True, False, False]
    assert inspection.to_json()["filters"]["stats"][1]["explained"] is None
    inspection.figures()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    init_file("convnext_tiny", path, init="conv-covariance", model_args=CONVNEXT)
    return path


def test_the_command_prints_the_table_and_writes_tables_and_figures(run, weights, tmp_path):
    done = run("inspect", weights, "-o", "out")
    assert done.code == 0, done.err
    assert "small: depthwise filters" in done.out
    assert done.out.count("7×7") == 6
    assert "wrote filters.csv, stats.json and figures (png) to out" in done.err
    names = {"filter_covariance.png", "filter_profile.png", "filter_spectra.png", "filters.csv", "stats.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    data = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert data["stats"] == []
    assert len(data["filters"]["stats"]) == 6
    assert len(data["filters"]["spectra"]["5"]) == 49
    header, *lines = (tmp_path / "out" / "filters.csv").read_text().splitlines()
    assert header.split(",") == list(COLUMNS)
    assert len(lines) == 6


def test_one_layer_is_chosen_on_the_command_line(run, weights):
    done = run("inspect", weights, "--layers", "3", "-o", "out", "--json")
    assert [row["layer"] for row in json.loads(done.out)["filters"]["stats"]] == [3]


# Figures.


def test_a_mosaic_has_block_p_at_the_place_of_p():
    covariance = np.arange(36.0).reshape(6, 6)  # a kernel of 2 x 3
    image = mosaic(covariance, (2, 3))
    assert image.shape == (2 * 3 - 1, 3 * 4 - 1)
    np.testing.assert_array_equal(image[0:2, 0:3], [[0, 1, 2], [3, 4, 5]])  # Sigma[p = (0, 0), q]
    np.testing.assert_array_equal(image[3:5, 8:11], [[30, 31, 32], [33, 34, 35]])  # p = (1, 2)
    assert np.isnan(image[2]).all()
    assert np.isnan(image[:, 3]).all()


def test_a_panels_colours_end_at_the_largest_covariance_of_two_positions():
    assert colour_limit(np.array([[9.0, -2.0], [-2.0, 1.0]])) == 2
    assert colour_limit(np.diag([4.0, 1.0])) == 4
    assert colour_limit(np.zeros((2, 2))) == 1


def test_every_layer_is_drawn_once_at_whole_pixels_and_too_many_are_refused(monkeypatch):
    panels = {layer: Covariance(np.eye(9), (3, 3), f"layer {layer}") for layer in range(11)}
    figure = draw_mosaics({"": panels}, model="m", title="t")
    assert len(figure.axes) == 11
    (image,) = figure.axes[4].get_images()
    assert image.get_array().shape == (11, 11)
    width = figure.axes[4].get_window_extent().width
    assert width == pytest.approx(round(width / 11) * 11)
    assert sum("layer" in text.get_text() for text in figure.texts) == 11
    monkeypatch.setattr("attnlens.filters.figures.MAX_ENTRIES", 11 * 11**2 - 1)
    with pytest.raises(UsageError, match="too large to draw: choose fewer layers"):
        draw_mosaics({"": panels}, model="m", title="t")


def test_second_moment_is_the_covariance_about_zero():
    filters = np.random.default_rng(0).normal(1.0, size=(7, 2, 3))
    flat = filters.reshape(7, 6)
    expected = np.cov(flat, rowvar=False, bias=True) + np.outer(flat.mean(0), flat.mean(0))
    np.testing.assert_allclose(second_moment(filters), expected)


def test_convnext_in_the_live_module_and_from_its_file_agree(weights):
    live = convnext()
    live.load_state_dict(timm.create_model("convnext_tiny", checkpoint_path=str(weights), **CONVNEXT).state_dict())
    assert attnlens.inspect(live).filters.stats.rows == attnlens.inspect(weights).filters.stats.rows
