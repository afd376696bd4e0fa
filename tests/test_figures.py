"""Figures: the arrays that are drawn and the words beside them; the same bytes each time; nothing global touched."""

import base64
import io
import math
import re
import subprocess
import sys
from dataclasses import replace

import matplotlib as mpl
import numpy as np
import pytest
import timm
import torch
from matplotlib.collections import LineCollection
from PIL import Image

import attnlens
from attnlens.errors import OutputError, UsageError
from attnlens.figures import heatmaps, profiles, save_figures, spectra, style
from attnlens.statistics.corners import Corners

LAYERS, HEADS, EMBED_DIM, HEAD_DIM = 3, 3, 39, 13
# Layers that are not neighbours, heads that differ in number, panels that differ in shape and are not square.
RAGGED = {1: (2, (5, 7)), 4: (5, (11, 7)), 5: (1, (5, 3))}


@pytest.fixture(scope="module")
def inspection():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, depth=LAYERS, embed_dim=EMBED_DIM, num_heads=HEADS, init_values=0.1
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return attnlens.inspect(model)


@pytest.fixture(scope="module")
def figures(inspection):
    return inspection.figures("effective", 7)


@pytest.fixture(scope="module")
def drawn_again(inspection):
    return inspection.figures("effective", 7)


def ragged_panels(scale=1.0):
    rng = np.random.default_rng(0)
    return {layer: {h: scale * rng.normal(size=shape) for h in range(n)} for layer, (n, shape) in RAGGED.items()}


def draw(panels, full=(97, 89), **more):
    how = {"model": "some_model", "circuit": "qk", "fold": "raw", **more}
    with style.look():
        return heatmaps.draw_heatmap(panels, dict.fromkeys(panels, full), **how)


def image_of(figure):
    (image,) = figure.axes[0].images
    return image


def labels(figure, kind):
    """Map the layer or head labels of a heatmap to where they stand along their side of the image."""
    texts = [text for text in figure.axes[0].texts if text.get_gid() == kind]
    return {text.get_text(): text.get_position()[0 if kind == "head" else 1] for text in texts}


def words(figure):
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    return " ".join(" ".join(text.get_text().split()) for text in texts)


def panel_at(figure, layer, head, shape):
    """Cut the panel out of the image whose middle the layer's and head's labels name."""
    rows, columns = shape
    top = labels(figure, "layer")[str(layer)] - (rows - 1) / 2
    left = labels(figure, "head")[str(head)] - (columns - 1) / 2
    assert top == int(top)
    assert left == int(left)
    return image_of(figure).get_array()[int(top) : int(top) + rows, int(left) : int(left) + columns]


@pytest.mark.parametrize("circuit", ["qk", "ov"])
def test_every_product_is_drawn_where_its_labels_say(inspection, figures, circuit):
    figure = figures[f"{circuit}_heatmap"]
    for layer in range(LAYERS):
        for head in range(HEADS):
            product = inspection.circuits(layer, head, circuit=circuit, fold="effective").dense()
            np.testing.assert_array_equal(panel_at(figure, layer, head, (7, 7)), product[:7, :7].astype(np.float32))


def test_the_sum_over_heads_stands_apart_in_the_ov_heatmap_only(inspection, figures):
    figure = figures["ov_heatmap"]
    for layer in range(LAYERS):
        total = inspection.circuits(layer, "all", circuit="ov", fold="effective").dense()[:7, :7]
        np.testing.assert_allclose(panel_at(figure, layer, "sum", (7, 7)), total, rtol=1e-5)
    places = list(labels(figure, "head").values())
    assert places[-1] - places[-2] > places[1] - places[0]
    assert "sum" not in labels(figures["qk_heatmap"], "head")
    assert list(labels(figures["qk_heatmap"], "layer")) == ["0", "1", "2"]


@pytest.mark.parametrize("circuit", ["qk", "ov"])
def test_between_the_panels_there_is_nothing(figures, circuit):
    drawn = image_of(figures[f"{circuit}_heatmap"]).get_array()
    assert np.isfinite(drawn.filled(np.nan)).sum() == 7 * 7 * LAYERS * (HEADS + (circuit == "ov"))


def test_layers_may_have_different_heads_shapes_and_indices():
    panels = ragged_panels()
    mosaic = heatmaps.compose(panels)
    for (layer, head), (top, left) in mosaic.corners.items():
        rows, columns = panels[layer][head].shape
        found = mosaic.image[top : top + rows, left : left + columns]
        np.testing.assert_array_equal(found, panels[layer][head].astype(np.float32))
    assert np.isfinite(mosaic.image).sum() == sum(n * rows * columns for n, (rows, columns) in RAGGED.values())
    figure = draw(panels)
    assert list(labels(figure, "layer")) == ["1", "4", "5"]
    assert list(labels(figure, "head")) == ["0", "1", "2", "3", "4"]
    np.testing.assert_array_equal(image_of(figure).get_array().filled(np.nan), mosaic.image)


def test_the_colour_scale_is_symmetric_and_clipped_at_the_percentile_it_names():
    panels = ragged_panels()
    figure = draw(panels)
    norm = image_of(figure).norm
    entries = np.concatenate([np.abs(panel).ravel() for row in panels.values() for panel in row.values()])
    assert norm.vmin == -norm.vmax
    assert norm.vmax == pytest.approx(np.percentile(entries, 99.5))
    assert norm(0.0) == 0.5
    assert "99.5th percentile" in words(figure)
    assert f"±{norm.vmax:.2g}" in words(figure)
    assert "entry of W_QK (arcsinh scale)" in [axes.get_ylabel() for axes in figure.axes]


def test_the_colour_scale_goes_there_and_back():
    norm = heatmaps.ArcsinhNorm(0.3, 7.0)
    entries = np.array([-7.0, -1.0, -0.01, 0.0, 0.2, 7.0])
    assert norm(entries[[0, -1]]).tolist() == pytest.approx([0, 1])
    assert np.all(np.diff(norm(entries)) > 0)
    np.testing.assert_allclose(norm.inverse(norm(entries)), entries, atol=1e-12)


def test_one_large_layer_does_not_blank_the_diagonal_of_the_others():
    rng = np.random.default_rng(0)
    panels = {layer: {0: rng.normal(size=(31, 31)) * 0.001 + 0.005 * np.eye(31)} for layer in range(5)}
    panels[5] = {0: rng.normal(size=(31, 31))}
    scale = heatmaps.colour_scale(panels)
    assert np.diag(scale(panels[0][0])).mean() > 0.58  # a linear scale would give 0.501
    assert scale(panels[0][0]).mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("layers", "heads", "size"), [(1, 1, 64), (12, 12, 64), (13, 7, 57), (3, 2, 1), (40, 16, 64)])
def test_every_entry_covers_whole_device_pixels(layers, heads, size):
    panels = {layer: dict(enumerate(np.ones((heads, size, size)))) for layer in range(layers)}
    figure = draw(panels)
    rows, columns = image_of(figure).get_array().shape
    box = figure.axes[0].get_window_extent()
    zoom = box.width / columns
    assert zoom >= 1 - 1e-9
    assert zoom == pytest.approx(round(zoom))
    assert box.height / rows == pytest.approx(zoom)
    for edge in (box.x0, box.y0):
        assert edge == pytest.approx(round(edge))
    assert figure.get_dpi() == style.DPI
    assert image_of(figure).get_interpolation() == "none"


def test_labels_thin_out_where_they_would_touch():
    panels = {layer: {0: np.ones((1, 1))} for layer in range(700)}
    panels[0] = dict(enumerate(np.ones((700, 1, 1))))
    figure = draw(panels)
    assert list(labels(figure, "head"))[:2] == ["0", "20"]
    assert list(labels(figure, "layer"))[:2] == ["0", "20"]


@pytest.mark.parametrize("circuit", ["qk", "ov"])
def test_the_heading_says_model_circuit_fold_and_how_much_is_shown(inspection, figures, circuit):
    text = words(figures[f"{circuit}_heatmap"])
    assert text.startswith(inspection.model)
    assert style.CIRCUIT_WORDS[circuit] in text
    assert "effective (norm gain" in text
    assert "first 7 × 7 of 39 × 39 entries" in text


@pytest.mark.parametrize("size", [39, 64])
def test_a_size_that_crops_nothing_shows_whole_products(inspection, size):
    panels = {0: {0: inspection.circuits(0, 0).dense(size)}}
    figure = draw(panels, full=(39, 39))
    assert "all 39 × 39 entries" in words(figure)
    assert "raw weights" in words(figure)
    assert image_of(figure).get_array().shape == (39, 39)


def test_the_heading_says_where_layers_differ_in_width():
    panels = {0: {0: np.ones((5, 5))}, 1: {0: np.ones((7, 7))}}
    with style.look():
        figure = heatmaps.draw_heatmap(panels, {0: (5, 5), 1: (19, 19)}, model="m", circuit="ov", fold="centred")
    assert "first 7 × 7 of 5 × 5 to 19 × 19 entries of each product, or all where there are fewer" in words(figure)
    assert "centred (norm gain, any LayerScale and centring folded in)" in words(figure)


def test_products_of_zeros_are_drawn_blank():
    figure = draw({0: {0: np.zeros((5, 5))}})
    assert image_of(figure).norm(image_of(figure).get_array()).tolist() == [[0.5] * 5] * 5
    figure.canvas.draw()


def test_an_image_too_large_for_memory_is_refused():
    panel = np.broadcast_to(0.0, (4000, 4000))
    with pytest.raises(UsageError, match=r"show a smaller corner of each product, or fewer layers"):
        heatmaps.compose({layer: {0: panel} for layer in range(3)})


def drawn_lines(axes, gid):
    return [line for line in axes.lines if line.get_gid() == gid]


def test_the_profile_draws_every_product_of_every_fold_and_its_mean(inspection, figures):
    axes = figures["depth_profile"].axes
    assert [a.get_title(loc="left") for a in axes[:3]] == ["QK, every head", "OV, every head", "OV, summed over heads"]
    selections = ({"circuit": "qk"}, {"circuit": "ov"}, {"circuit": "ov", "head": "all"})
    for column, selection in enumerate(selections):
        for fold in ("raw", "effective"):
            table = inspection.stats.select(fold=fold, **selection)
            kept = np.array([(row[1] == "all") == (column == 2) for row in table.rows])
            bound = table.column("identity_cosine_bound")
            wanted = {name: table.column(name)[kept] for name in ("alpha", "beta")}
            wanted["cosine"] = (table.column("identity_cosine") / bound)[kept]
            for row, (name, values) in enumerate(wanted.items()):
                (points,) = drawn_lines(axes[3 * row + column], f"{name} {fold}")
                (mean,) = drawn_lines(axes[3 * row + column], f"mean {name} {fold}")
                np.testing.assert_array_equal(points.get_ydata(), values)
                np.testing.assert_allclose(mean.get_ydata(), values.reshape(LAYERS, -1).mean(1))
                np.testing.assert_array_equal(mean.get_xdata(), range(LAYERS))


def test_the_profile_marks_two_standard_errors_zero_and_whole_layers(inspection, figures):
    figure = figures["depth_profile"]
    axes = figure.axes[3]
    table = inspection.stats.select(circuit="qk", fold="raw")
    segments = next(c for c in axes.collections if isinstance(c, LineCollection)).get_segments()
    ends = np.array(segments)[:, :, 1]
    np.testing.assert_allclose(ends.mean(1), table.column("beta"))
    np.testing.assert_allclose(np.diff(ends)[:, 0], 4 * table.column("beta_stderr"))
    assert any(np.all(np.asarray(line.get_ydata()) == 0) for line in axes.lines)
    assert [label.get_text() for label in figure.axes[6].get_xticklabels()] == ["0", "1", "2"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["raw weights", "effective (norm gain and any LayerScale folded in)"]


def test_a_profile_of_raw_weights_alone_names_no_other_fold(inspection):
    with style.look():
        figure = profiles.draw_profile(inspection.stats.select(fold="raw"), ("raw",), model="m")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["raw weights"]
    assert not any("effective" in str(line.get_gid()) for axes in figure.axes for line in axes.lines)


def test_the_spectra_draw_every_head_coloured_by_layer(inspection, figures):
    figure = figures["spectra"]
    for axes, circuit in zip(figure.axes, ("qk", "ov"), strict=False):
        (curves,) = axes.collections
        drawn = {}
        for segment, layer in zip(curves.get_segments(), curves.get_array(), strict=True):
            drawn.setdefault(int(layer), []).append(segment[:, 1])
        for layer in range(LAYERS):
            np.testing.assert_array_equal(drawn[layer], inspection.spectra[layer, circuit, "effective"])
        assert axes.get_yscale() == "log"
        assert style.CIRCUIT_WORDS[circuit] in axes.get_title(loc="left")
    assert "effective (norm gain and any LayerScale folded in)" in words(figure)
    assert figure.axes[-1].get_ylabel() == "layer"


def test_singular_values_that_are_rounding_do_not_stretch_the_axis():
    with style.look():
        values = np.array([[1.0, 0.1, 1e-17, 0.0]])
        figure = spectra.draw_spectra({(0, "qk", "raw"): values}, "raw", model="m")
    assert 0.01 < figure.axes[0].get_ylim()[0] < 0.1


def test_a_model_without_ov_circuits_is_told_so(inspection):
    kept = {key: values for key, values in inspection.spectra.items() if key[1] == "qk"}
    stats = inspection.stats.select(circuit="qk")
    drawn = replace(inspection, spectra=kept, stats=stats).figures("raw", 7)
    assert "There is no W_OV = W_V W_O to draw" in words(drawn["ov_heatmap"])
    assert [axes.get_title(loc="left") for axes in drawn["depth_profile"].axes] == ["QK, every head", "", ""]
    assert len(drawn["spectra"].axes) == 2  # the QK spectra and the bar of layers


def test_a_layer_without_the_fold_is_left_out_of_its_figures(inspection):
    kept = {key: values for key, values in inspection.spectra.items() if key != (1, "qk", "effective")}
    drawn = replace(inspection, spectra=kept).figures("effective", 7)
    assert list(labels(drawn["qk_heatmap"], "layer")) == ["0", "2"]
    assert list(labels(drawn["ov_heatmap"], "layer")) == ["0", "1", "2"]


def test_what_the_product_leaves_out_is_written_under_the_figures(inspection):
    specs = tuple((layer, spec.replace(leaves_out=("rope",) if layer else ())) for layer, spec in inspection.specs)
    for figure in replace(inspection, specs=specs).figures("raw", 7).values():
        assert "queries and keys are rotated by position" in words(figure)
        assert "(2 of 3 layers)" in words(figure)


def test_what_cannot_be_drawn_is_refused_in_one_line(inspection):
    with pytest.raises(UsageError, match=r"^fold 'centred' was not measured: choose from raw, effective$"):
        inspection.figures("centred")
    with pytest.raises(UsageError, match=r"^a corner of 0 x 0 entries cannot be drawn: give a size of 1 or more$"):
        inspection.figures("raw", 0)


@pytest.mark.parametrize(
    ("format_", "names"),
    [
        ("png", ["qk_heatmap", "ov_heatmap", "depth_profile", "spectra"]),
        ("pdf", ["ov_heatmap"]),
        ("svg", ["ov_heatmap", "depth_profile"]),
    ],
)
def test_the_same_inspection_gives_the_same_bytes(figures, drawn_again, tmp_path, format_, names):
    first = save_figures({name: figures[name] for name in names}, tmp_path / "a", format_)
    second = save_figures({name: drawn_again[name] for name in names}, tmp_path / "b", format_)
    assert [path.name for path in first] == [f"{name}.{format_}" for name in names]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert b"Matplotlib" not in one.read_bytes()
        assert b"Date" not in one.read_bytes()


def test_text_stays_text_and_the_heatmap_keeps_one_pixel_an_entry(figures, tmp_path):
    (path,) = save_figures({"qk_heatmap": figures["qk_heatmap"]}, tmp_path, "svg")
    svg = path.read_text()
    assert "W_QK = W_Q W_Kᵀ of every head" in svg
    rows, columns = image_of(figures["qk_heatmap"]).get_array().shape
    sizes = [Image.open(io.BytesIO(data)).size for data in embedded_images(svg)]
    assert (columns, rows) in sizes


def embedded_images(svg):
    return [base64.b64decode(data) for data in re.findall(r"base64,([A-Za-z0-9+/=\s]+)\"", svg)]


def test_dpi_sets_the_pixels_of_png_and_leaves_the_figure_alone(figures, tmp_path):
    figure = figures["spectra"]
    width, height = figure.get_size_inches()
    (path,) = save_figures({"spectra": figure}, tmp_path, dpi=75)
    with Image.open(path) as image:
        assert image.size == (int(width * 75), int(height * 75))
        assert image.info["dpi"] == pytest.approx((75, 75), abs=0.01)
    assert figure.get_dpi() == style.DPI


def test_another_format_is_refused_before_anything_is_written(figures, tmp_path):
    with pytest.raises(UsageError, match=r"^figures cannot be written as 'jpg': choose png, pdf, svg$"):
        save_figures(figures, tmp_path / "new", "jpg")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_leaves_nothing_behind(figures, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OutputError, match=r"cannot write .*qk_heatmap\.png"):
        save_figures(figures, tmp_path / "file" / "figures")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_drawing_and_saving_leave_rc_settings_as_they_were(inspection, tmp_path):
    with mpl.rc_context({"font.size": 31.0, "svg.hashsalt": None}):
        before = dict(mpl.rcParams)
        drawn = inspection.figures("raw", 1)
        save_figures({"ov_heatmap": drawn["ov_heatmap"]}, tmp_path, "svg")
        assert dict(mpl.rcParams) == before


def test_pyplot_is_never_imported(tmp_path):
    code = """
import sys, numpy as np
from attnlens.figures import heatmaps, save_figures, spectra, style
with style.look():
    heatmap = heatmaps.draw_heatmap({0: {0: np.eye(5)}}, {0: (5, 5)}, model="m", circuit="qk", fold="raw")
    drawn = {"a": heatmap, "b": spectra.draw_spectra({(0, "qk", "raw"): np.ones((2, 3))}, "raw", model="m")}
for format_ in ("png", "svg"):
    save_figures(drawn, sys.argv[1], format_)
loaded = [name for name in ("matplotlib.pyplot", "torch", "timm") if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


@pytest.mark.parametrize("dpi", [150, 97])
def test_a_large_image_drawn_in_strips_is_the_one_drawn_at_once(tmp_path, monkeypatch, dpi):
    generator = np.random.default_rng(3)
    panels = {layer: {head: generator.standard_normal((31, 29)) for head in range(5)} for layer in range(7)}
    shapes = dict.fromkeys(panels, (31, 29))
    for name, entries in (("whole", 10**9), ("strips", 977)):
        monkeypatch.setattr("attnlens.figures.strips.ENTRIES", entries)
        figure = heatmaps.draw_heatmap(panels, shapes, model="m", circuit="qk", fold="raw")
        save_figures({name: figure}, tmp_path, dpi=dpi)
    whole, strips = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("whole", "strips"))
    assert whole.shape == strips.shape
    different = np.abs(whole - strips).max(axis=-1) > 0
    assert different.mean() < (1e-9 if dpi == 150 else 0.05)  # elsewhere an entry is no whole number of pixels


def test_corners_shrink_with_the_number_of_heads_and_in_any_order(monkeypatch):
    monkeypatch.setattr("attnlens.statistics.corners.HEATMAP_ENTRIES", 11 * 13**2)
    found = attnlens.inspect()
    sizes = {layer: found.heads(layer) for layer in found.layers}
    kept = []
    for order in (list(sizes), list(sizes)[::-1]):
        corners = Corners("raw", 64, bounded=True)
        for layer in order:
            corners.observe(sizes[layer], "qk", "raw", found.circuits(layer))
        kept.append(corners)
    expected = math.isqrt(11 * 13**2 // sum(found.circuits(layer).shape[0] for layer in sizes))
    assert [corners.size for corners in kept] == [expected, expected]
    for layer in sizes:
        for head in range(3):
            np.testing.assert_array_equal(kept[0].of("qk")[0][layer][head], kept[1].of("qk")[0][layer][head])
            assert kept[0].of("qk")[0][layer][head].shape == (expected, expected)
