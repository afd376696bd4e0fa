"""Figures for papers and into a caller's axes: every figure, its text, its widths, its scales, and what is refused."""

import re
import threading
from functools import partial
from itertools import combinations

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import attnlens
from attnlens.errors import UsageError
from attnlens.figure_styles import WIDTHS, chosen, current, use
from attnlens.figures import figure_style, save_figures, scales, style
from attnlens.figures.drawings import draw_all, draw_one
from attnlens.scans.landscape import draw_landscape
from attnlens.scans.tables import LAYER_COLUMNS
from attnlens.signal.figure import draw_signal
from attnlens.training.config import Run
from attnlens.training.figures import QUANTITIES, draw_curves, draw_structure
from attnlens.training.ladder import ladder_of, steps
from attnlens.training.live import Journal
from attnlens.training.results import summarise
from attnlens.training.stop import Control
from attnlens.training.waterfall import draw_waterfall
from tests.filter_models import both
from tests.test_inspect import small_vit
from tests.test_training_statistics import run_records
from tests.training_setup import config

ARMS = [rung.arm for rung in config().network.ladder]
MODELS = 9


def landscape_results():
    """Return results of nine models in eight groups, some with one layer."""
    rng = np.random.default_rng(0)
    found = {}
    for model in range(MODELS):
        table = []
        for layer in range(1 + 2 * model):
            for circuit in ("qk", "ov"):
                row = dict.fromkeys(LAYER_COLUMNS, 0.1) | {"ratio": float(rng.normal())}
                row["layer"], row["relative_depth"] = layer, layer / max(1, 2 * model)
                table.append([*list(row.values())[:2], circuit, "effective", *list(row.values())[4:]])
        about = dict.fromkeys(("architecture", "depth", "layers", "heads", "head_dim", "leaves_out"), 1)
        found[f"model{model}"] = {"status": "ok", **about, "folds": ["effective"], "table": table}
        found[f"model{model}"]["group"] = f"family{model % 8}"
    return found


def ladder():
    """Return a summary of three runs of every rung, of which some are worse than the one above."""
    settled = config(seeds=3, arms=ARMS, contrasts=steps(ARMS))
    ends = dict(zip(ARMS, (0.5, 0.6, 0.55, 0.8, 0.82, 0.7, 0.75, 0.85), strict=True))
    records = {
        Run(arm, seed, 1e-3).name: run_records(arm, seed, [0.1, 0.3 + 0.01 * seed, end + 0.02 * seed * seed])
        for arm, end in ends.items()
        for seed in range(3)
    }
    return summarise(settled, records)


@pytest.fixture(scope="module")
def drawings():
    """Return what draws every figure that the package has."""
    inspection = attnlens.inspect(small_vit(init_values=0.1), fold="all")
    conv = attnlens.inspect(both())
    params, pooled = attnlens.fit_params(small_vit()), attnlens.fit_params(small_vit(), small_vit(1))
    propagation = attnlens.propagate(depth=2, tokens=4, seeds=2, sequences=1, skips=False, norms=False)
    summary = ladder()
    rungs = ladder_of(summary.config.network.ladder, summary.finished, summary.contrasts)
    pretrained = {"effective": {name: [0.2, 0.4] for name in QUANTITIES}}
    return {
        **inspection._drawings("effective", 7, None),
        **conv._drawings(None, 7, None),
        **params._drawings(),
        **{f"pooled_{name}": draw for name, draw in pooled._drawings().items()},
        **attnlens.fit_params(both())._drawings(),
        **attnlens.compare(small_vit(), small_vit(1))._drawings(),
        **attnlens.compare(both(), both())._drawings(),
        **attnlens.compose(small_vit())._drawings(),
        "signal": partial(draw_signal, propagation),
        "landscape": partial(draw_landscape, landscape_results(), "effective"),
        "curves": partial(draw_curves, summary),
        "structure": partial(draw_structure, summary, pretrained, "teacher"),
        "waterfall": partial(draw_waterfall, summary, rungs),
    }


def names():
    return [
        *("qk_heatmap", "ov_heatmap", "depth_profile", "spectra", "gains"),
        *("filter_covariance", "filter_profile", "filter_spectra", "filter_fit", "filter_comparison"),
        *("fit_profile", "realised_requested", "tails", "comparison"),
        *("pooled_fit_profile", "pooled_realised_requested", "pooled_tails"),
        *("q_composition", "k_composition", "v_composition", "signal", "landscape", "curves", "structure", "waterfall"),
    ]


every_figure = pytest.mark.parametrize("name", names())


def texts_of(figure):
    """Return every text that is drawn: labels of ticks beyond an axis' ends are not."""
    axes = [axis for one in figure.axes for axis in (one.xaxis, one.yaxis)]
    every = {
        label for axis in axes for tick in (*axis.majorTicks, *axis.minorTicks) for label in (tick.label1, tick.label2)
    }
    drawn = {label for axis in axes for tick in axis._update_ticks() for label in (tick.label1, tick.label2)}
    hidden = {label for axis in axes if not axis.axes.axison for label in (*every, axis.label)}
    texts = figure.findobj(Text)
    return [t for t in texts if t.get_visible() and t.get_text().strip() and t not in (every - drawn) | hidden]


def test_the_list_of_figures_is_whole(drawings):
    assert set(names()) == set(drawings)


@every_figure
@pytest.mark.parametrize("width", ["column", "page"])
def test_a_papers_figure_has_its_width_text_of_eight_points_and_nothing_said_on_it(drawings, name, width):
    figure = draw_all({name: drawings[name]}, "paper", width)[name]
    figure.canvas.draw()
    assert figure.get_figwidth() == WIDTHS[width]
    assert figure.get_figheight() <= 9.01
    assert not figure.texts
    assert {text.get_fontsize() for text in texts_of(figure)} == {8.0}
    renderer = figure.canvas.get_renderer()
    for text in texts_of(figure):
        box = text.get_window_extent(renderer)
        assert box.x0 >= -1, text.get_text()
        assert box.x1 <= figure.bbox.x1 + 1, text.get_text()
        assert box.y0 >= -1, text.get_text()
        assert box.y1 <= figure.bbox.y1 + 1, text.get_text()


@every_figure
def test_every_figure_goes_into_axes_that_are_given_and_leaves_the_rest_alone(drawings, name):
    own = draw_one(drawings, name)
    with use(chosen(given=True)):
        count = panel_count(drawings[name])
    figure = Figure(figsize=(12, 12))
    axes = np.ravel(figure.subplots(1, count))
    before = dict(mpl.rcParams)
    assert draw_one(drawings, name, axes if count > 1 else axes[0]) is figure
    assert dict(mpl.rcParams) == before
    assert not figure.texts
    assert not figure.legends
    assert all(one.get_title(loc=where) == "" for one in axes for where in ("left", "center", "right"))
    assert all(one.has_data() or one.texts or one.images for one in axes)
    assert len(figure.axes) - count <= 1  # a colour bar
    assert len(own.axes) >= count
    figure.draw_without_rendering()


def panel_count(draw):
    """Return how many panels a figure has, from the error for too many axes."""
    figure = Figure()
    with pytest.raises(UsageError, match="axes for") as refused:
        draw(ax=figure.subplots(1, 60))
    return int(re.search(r"for (\d+) panel", str(refused.value))[1])


def test_panels_are_chosen_by_name_and_what_does_not_suit_is_refused_with_the_names(drawings):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    draw_one(drawings, "depth_profile", {"beta sum": right}, "paper")
    assert not left.has_data()
    assert right.get_yscale() == "asinh"
    assert right.get_ylabel() == "beta (arcsinh)"
    assert right.get_xlabel() == "layer"
    with pytest.raises(UsageError, match=r"^ax: panel 'beta' is not known: choose alpha qk, alpha ov, alpha sum, be"):
        draw_one(drawings, "depth_profile", {"beta": left})
    with pytest.raises(UsageError, match=r"^ax holds 1 axes for 9 panels: give one of each, or a dict of some of t"):
        draw_one(drawings, "depth_profile", left)
    with pytest.raises(UsageError, match=r"^figure 'heatmap' is not known: choose qk_heatmap, ov_heatmap"):
        draw_one(drawings, "heatmap")


@every_figure
def test_scales_that_are_not_linear_are_named_and_their_ticks_reach_the_data(drawings, name):
    figure = draw_one(drawings, name)
    for axes in figure.axes:
        if axes.get_ylabel() == "layer" or not axes.has_data():
            continue
        rows = [other for other in figure.axes if other.get_position().y0 == axes.get_position().y0]
        for which in "xy":
            if getattr(axes, f"get_{which}scale")() == "linear":
                continue
            words = [*(other.get_ylabel() for other in rows), axes.get_title(loc="left"), axes.get_xlabel()]
            assert any(re.search(r"\(log|\(arcsinh", text) for text in words), words
            lines = [np.asarray(line.get_data()["xy".index(which)], float) for line in axes.lines]
            data = np.concatenate([*lines, []])
            data = data[np.isfinite(data)]
            ticks = np.asarray(getattr(axes, f"get_{which}ticks")())
            where = getattr(axes, f"{which}axis").get_transform().transform
            if data.size and which == "y":
                span = np.ptp(where(np.array(getattr(axes, f"get_{which}lim")())))
                assert where(np.array([data.max()]))[0] <= where(ticks).max() + 0.1 * span
                assert where(np.array([data.min()]))[0] >= where(ticks).min() - 0.1 * span


@every_figure
def test_no_two_lines_of_a_panel_are_told_apart_by_colour_alone(drawings, name):
    figure = draw_one(drawings, name)
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    for legend in legends:
        looks = [
            (line.get_linestyle(), str(line._dash_pattern), line.get_marker(), line.get_fillstyle())
            for line in legend.get_lines()
        ]
        assert len(set(looks)) == len(looks)


def test_any_two_of_the_first_35_lines_differ_in_dash_or_mark():
    looks = [style.line_style(index) for index in range(35)]
    for one, other in combinations(looks, 2):
        assert (one["linestyle"], one["marker"]) != (other["linestyle"], other["marker"])


def lightness(colours):
    """Return the luminance of colours, as a grayscale printer has it."""
    return np.asarray(colours)[:, :3] @ [0.2126, 0.7152, 0.0722]


def test_signs_and_depth_keep_their_order_in_grayscale():
    with use(chosen("paper")):
        signed = style.signed_colours("white")(np.linspace(0, 1, 256))
    assert np.all(np.diff(lightness(signed)) > 0)
    assert np.abs(np.diff(signed[128, :3])).max() < 0.02  # zero is grey
    with use(chosen("default")):
        assert style.signed_colours("white").name == "RdBu_r"


positive = st.floats(1e-6, 1e6)


@given(low=positive, factor=st.floats(1.0, 1e9))
def test_logarithmic_ticks_bracket_what_is_drawn_and_keep_apart(low, factor):
    ticks = np.array(scales.log_ticks(low, low * factor))
    assert ticks[0] <= low * (1 + 1e-9)
    assert ticks[-1] >= low * factor * (1 - 1e-9)
    gaps = np.diff(np.log(ticks)) / np.log(ticks[-1] / ticks[0])
    assert np.all(gaps >= 0.085 - 1e-9)
    assert 2 <= len(ticks) <= 13


@given(low=st.floats(-1e6, 0), high=st.floats(0, 1e6), width=st.floats(1e-3, 1e3))
def test_arcsinh_ticks_bracket_what_is_drawn_and_hold_zero(low, high, width):
    ticks = np.array(scales.arcsinh_ticks(low, high, width))
    assert 0 in ticks
    assert np.all(np.diff(ticks) > 0)
    places = np.arcsinh(np.array([low, high, ticks[0], ticks[-1]]) / width)
    span = np.arcsinh(scales.round_up(-low) / width if low else 0) + np.arcsinh(
        scales.round_up(high) / width if high else 0
    )
    assert places[0] >= places[2] - 0.086 * span
    assert places[1] <= places[3] + 0.086 * span
    if len(ticks) > 1:
        assert np.min(np.diff(np.arcsinh(ticks / width))) >= 0.084 * span


def test_a_value_of_a_comparison_lies_between_ticks():
    assert scales.arcsinh_ticks(-0.40, 0.39, 0.05)[0] <= -0.40
    assert scales.arcsinh_ticks(-0.40, 0.39, 0.05)[-1] >= 0.39


def test_a_style_holds_within_and_not_after():
    assert current() == chosen()
    with figure_style("paper", "page", "pdf") as settled:
        assert current() is settled
        assert (settled.width, settled.format, settled.dpi) == (6.75, "pdf", 600)
        assert mpl.rcParams["font.size"] == 8
        assert mpl.rcParams["figure.figsize"][0] == 6.75
        with figure_style(width=5):
            assert (current().width, current().format, current().paper) == (5, "pdf", True)
        with figure_style("default"):
            assert not current().paper
    assert not current().paper


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"style": "papier"}, "style 'papier' is not known (did you mean paper?): choose default, paper"),
        (
            {"style": "paper", "width": "colum"},
            "width 'colum' is not known (did you mean column?): choose column, p",
        ),
        (
            {"style": "paper", "width": 325},
            "a figure 325 inches wide cannot be laid out: choose column, page, or",
        ),
        ({"style": "paper", "width": float("nan")}, "a figure nan inches wide cannot be laid out"),
        ({"width": "page"}, "a width is of a paper's figures: choose the style paper too, or leave the width out"),
        ({"format": "gif"}, "format 'gif' is not known: choose png, pdf, svg"),
    ],
)
def test_other_styles_are_refused_in_one_line(how, said):
    with pytest.raises(UsageError) as refused:
        chosen(**how)
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_files_are_written_in_the_current_format_and_density(drawings, tmp_path):
    with figure_style("paper", dpi=100):
        (path,) = save_figures({"signal": drawings["signal"]()}, tmp_path)
    with Image.open(path) as image:
        assert image.size[0] == 325
    with figure_style("paper", "page", "pdf"):
        (path,) = save_figures({"signal": drawings["signal"]()}, tmp_path)
    assert re.search(rb"/MediaBox \[ ?0 0 486 ", path.read_bytes())


def test_figures_of_a_training_under_way_are_in_the_style_too():
    seen, called = [], threading.Event()

    def write(_records, _figures):
        seen.append(current())
        called.set()

    with figure_style("paper", "page") as settled, Journal(write, {}, Control()) as journal:
        journal.listen((Run("default", 0, 1e-3),), {"measured": [[{"epoch": 1}]]})
        assert called.wait(10)
    assert seen == [settled]


@pytest.mark.parametrize("command", ["inspect", "fit-params", "compose"])
def test_commands_draw_for_papers(run, tmp_path, command):
    folder = (
        ("--output", tmp_path / "out")
        if command != "fit-params"
        else ("--figures", tmp_path / "out", "-o", tmp_path / "p.json")
    )
    done = run(command, *folder, "--style", "paper", "--figure-width", "page", "--format", "pdf")
    assert done.code == 0
    (*paths,) = (tmp_path / "out").glob("*.pdf")
    assert len(paths) >= 3
    for path in paths:
        assert re.search(rb"/MediaBox \[ ?0 0 486 ", path.read_bytes()), path
    refused = run(command, *folder, "--style", "poster")
    assert refused.code == 2
    assert "style 'poster' is not known" in refused.err
