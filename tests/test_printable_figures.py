"""Names in figures: every text is printable before it is laid out, no letter makes matplotlib warn, SVG is XML."""

from dataclasses import replace
from functools import partial
from xml.etree import ElementTree as ET

import pytest
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

import attnlens
from attnlens.figures import save_figures, style
from attnlens.figures.drawings import draw_all
from attnlens.figures.notebook import png
from attnlens.figures.panels import Place, open_panels
from attnlens.scans.landscape import draw_landscape
from attnlens.signal.figure import draw_signal
from attnlens.training.figures import QUANTITIES, draw_curves, draw_structure
from attnlens.training.ladder import ladder_of
from attnlens.training.waterfall import draw_waterfall
from tests.filter_models import both
from tests.test_figure_styles import ladder, landscape_results, names
from tests.test_inspect import small_vit
from tests.test_printable import NAME, WRITTEN, every_kind

HOSTILE = f"_{NAME}$x_{{d}}$ a$b\\frac"
SHOWN = f"_{WRITTEN}$x_{{d}}$ a$b\\frac"
"""What would be mathtext, and what matplotlib's own legends would leave out, too."""


@pytest.fixture(scope="module")
def drawings():
    """Return what draws every figure that the package has, of models, groups and a data set of such a name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnlens.models.opened.utf8_text", lambda _: HOSTILE)
        inspection, conv = attnlens.inspect(small_vit(init_values=0.1), fold="all"), attnlens.inspect(both())
        params, pooled = attnlens.fit_params(small_vit()), attnlens.fit_params(small_vit(), small_vit(1))
        found = {
            **inspection._drawings("effective", 7, None),
            **conv._drawings(None, 7, None),
            **params._drawings(),
            **{f"pooled_{name}": draw for name, draw in pooled._drawings().items()},
            **attnlens.fit_params(both())._drawings(),
            **attnlens.compare(small_vit(), small_vit(1))._drawings(),
            **attnlens.compare(both(), both())._drawings(),
            **attnlens.compose(small_vit())._drawings(),
        }
    propagation = attnlens.propagate(depth=2, tokens=4, seeds=2, sequences=1, skips=False, norms=False)
    grouped = {name: result | {"group": f"{HOSTILE}{name}"} for name, result in landscape_results().items()}
    summary = ladder()
    summary = replace(summary, config=summary.config.model_copy(update={"dataset": HOSTILE}))
    rungs = ladder_of(summary.config.network.ladder, summary.finished, summary.contrasts)
    pretrained = {"effective": {name: [0.2, 0.4] for name in QUANTITIES}}
    return found | {
        "signal": partial(draw_signal, replace(propagation, model=HOSTILE)),
        "landscape": partial(draw_landscape, grouped, "effective"),
        "curves": partial(draw_curves, summary),
        "structure": partial(draw_structure, summary, pretrained, HOSTILE),
        "waterfall": partial(draw_waterfall, summary, rungs),
    }


def said(figure):
    """Return all that a figure says, without its line breaks."""
    return "".join(text.get_text() for text in figure.findobj(Text)).replace("\n", "")


def unprintable(text):
    return sorted({ascii(mark) for mark in text if not mark.isprintable() and mark != "\n"})


def squeezed(text):
    """Return a text without blanks, of which a line break takes one's place."""
    return text.replace(" ", "")


def test_the_figures_are_all_there_are(drawings):
    assert set(drawings) == set(names())


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("look", ["default", "paper"])
def test_every_figure_says_a_name_in_characters_that_print_and_is_xml(drawings, tmp_path, name, look):
    figure = draw_all({name: drawings[name]}, look)[name]
    assert unprintable(said(figure)) == []
    legends = [
        text
        for each in (*figure.legends, *(axes.get_legend() for axes in figure.axes))
        if each
        for text in each.get_texts()
    ]
    assert not [text for text in legends if "\n" in text.get_text()]
    if look == "default":
        assert squeezed(SHOWN) in squeezed(said(figure))
    (path,) = save_figures({name: figure}, tmp_path, "svg")
    text = path.read_text(encoding="utf-8")
    assert unprintable(text) == []
    assert ET.fromstring(text).tag.endswith("svg")  # noqa: S314  # ours


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
@pytest.mark.parametrize("name", ["depth_profile", "pooled_tails", "qk_heatmap", "signal"])
def test_a_letter_that_the_font_has_not_got_makes_no_word_in_any_format(drawings, tmp_path, capsys, caplog, name, kind):
    (path,) = save_figures(draw_all({name: drawings[name]}), tmp_path, kind)
    assert path.stat().st_size > 1000
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
    assert png(draw_all({name: drawings[name]})[name])


def test_callers_of_matplotlib_are_warned_as_before():
    figure = style.new_figure(100, 100)
    text = figure.text(0, 0, "\u5b57")
    with style.look():
        figure.canvas.draw()
    text.set_text("\u5b57\u5b57")  # matplotlib lays no text out twice
    with pytest.warns(UserWarning, match="Glyph 23383"):
        figure.canvas.draw()


@every_kind
def test_a_heading_a_message_and_a_legend_say_each_kind(given, written):
    name = f"x{given}y"
    assert said(style.message_figure(name, f"nothing in {name}")) == f"x{written}ynothing in x{written}y"
    axes = Figure().subplots()
    assert f"x{written}y" in said(style.message_figure("", name, axes))
    legend = [(Line2D([], []), name), (Line2D([], []), f"_{name}$z^{{")]
    for ax in (None, Figure().subplots()):
        panels = open_panels([["p"]], Place(75, 300, 200), [(name, 10)], notes=name, legend=legend, ax=ax)
        (shown,) = (each for each in (*panels.figure.legends, panels.axes["p"].get_legend()) if each)
        assert [text.get_text() for text in shown.get_texts()] == [f"x{written}y", f"_x{written}y$z^{{"]
        with style.look():
            panels.figure.draw_without_rendering()
        if ax is None:
            assert sorted(text.get_text() for text in panels.figure.texts) == [f"x{written}y"] * 2


@every_kind
def test_lines_are_counted_of_what_is_written(given, written):
    text = style.wrapped(f"{'word ' * 12}x{given}y", 300, 8)
    assert text.splitlines() == text.split("\n")
    assert f"x{written}y" in text
    assert style.text_height(text, 8) == pytest.approx(style.pixels(1.3 * 8) * (1 + text.count("\n")))


def test_a_legend_is_laid_out_by_what_it_says():
    long, short = "\x1b" * 15, "x" * 15

    def abreast(label):
        panels = open_panels(
            [["p"]], Place(75, 600, 200), [], legend=[(Line2D([], []), f"{label}{i}") for i in range(4)]
        )
        return panels.figure.legends[0]._ncols

    assert abreast(long) < abreast(short)


def test_a_group_of_a_landscape_is_printable_where_an_svg_names_it(tmp_path):
    results = {name: result | {"group": "x\x1b\u202e"} for name, result in landscape_results().items()}
    figure = draw_all({"landscape": partial(draw_landscape, results, "effective")})["landscape"]
    (path,) = save_figures({"landscape": figure}, tmp_path, "svg")
    assert r'id="lines x\x1b\u202e"' in path.read_text(encoding="utf-8")
