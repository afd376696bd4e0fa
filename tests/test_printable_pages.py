"""Names on pages and in reports: no character that does not print, no markup, and the same in what scripts show."""

import json
from html import escape, unescape

import pytest
from markdown_it import MarkdownIt

import attnlens
from attnlens import reports
from attnlens.printable import printable
from attnlens.reports.page import Page as Written
from attnlens.reports.scripts import scripts
from attnlens.statistics.table import StatsTable
from attnlens.templates import aligned, environment
from attnlens.training.config import SourceData
from attnlens.training.report import render_report
from attnlens.training.results import summarise
from tests.filter_models import both
from tests.test_inspect import small_vit
from tests.test_printable import NAME, WRITTEN, every_kind
from tests.test_report import Page, results_folder
from tests.test_training_statistics import records_of, run_records
from tests.training_setup import config

BLANKS = "\u2007\u2008"
"""Blanks by which columns of numbers line up"""
STORED = NAME.replace("\udcff", "")
"""What a file of JSON can hold"""


def unprintable(text):
    return sorted({ascii(mark) for mark in text if not mark.isprintable() and mark not in f"\n{BLANKS}"})


def rendered(template, **values):
    return environment().from_string(template).render(**values)


@every_kind
def test_a_template_says_a_name_in_characters_that_print(given, written):
    assert rendered("<b title='{{ name }}'>{{ name }}</b>\n", name=f"<{given}&") == (
        f"<b title='&lt;{written}&amp;'>&lt;{written}&amp;</b>\n"
    )
    assert rendered("{{ names | join(', ') }}", names=[given, "x"]) == f"{written}, x"
    assert rendered("{{ name | upper }}", name=f"x{given}") == printable(f"x{given}".upper())


@every_kind
def test_what_scripts_read_is_printable_at_any_depth(given, written):
    data = {f"x{given}": [{"name": f"</script>{given}"}, (given, 1.5, None, True)], "codes": "!#$%"}
    text = rendered("{{ data | tojson }}", data=data)
    assert unprintable(text) == []
    assert "</" not in text
    assert json.loads(text) == {
        f"x{written}": [{"name": f"</script>{written}"}, [written, 1.5, None, True]],
        "codes": "!#$%",
    }


def test_blanks_that_line_numbers_up_and_numbers_are_as_they_were():
    column = aligned([1.0, 123.456, None])
    assert set(BLANKS) & set("".join(column))
    assert rendered("{{ column | join('|') }}", column=column) == "|".join(column)
    assert [rendered("{{ value }}", value=value) for value in (1, 0.25, True, None)] == ["1", "0.25", "True", "None"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Return a page about models, runs, devices and commands of such names."""
    train = results_folder(tmp_path_factory.mktemp("made") / "r\u202e", STORED, devices=[STORED], commands=[STORED])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnlens.models.opened.utf8_text", lambda _: NAME)
        return reports.report(both(), compare=[both(), small_vit()], train=train, command=NAME)


def test_a_report_holds_no_character_that_does_not_print(page):
    text = page
    for script in scripts():  # of others, and our own
        text = text.replace(script, "")
    assert unprintable(text) == []
    assert f"<h1>{escape(WRITTEN)}</h1>" in page
    assert f"<title>{escape(WRITTEN)} · attnlens</title>" in page
    assert f"<dt>device</dt><dd>{escape(printable(STORED))}</dd>" in page
    assert f"<code>{escape(printable(STORED))}</code>" in page
    assert f"<dt>command</dt><dd>{escape(WRITTEN)}</dd>" in page
    assert repr(page).startswith(f"<Page about {WRITTEN}: ")
    assert isinstance(page, Written)


def test_the_scripts_of_a_report_show_the_same_names(page):
    data = Page(page).data
    assert data["training"]["arms"] == [printable(STORED), "other"]
    assert {point["arm"] for point in data["training"]["points"]} == {printable(STORED), "other"}
    assert len(set(data["comparison"]["models"])) == 3
    assert all(name.startswith(WRITTEN) for name in data["comparison"]["models"])
    assert {point["model"] for point in data["comparison"]["profiles"]} <= set(data["comparison"]["models"])


def test_what_a_notebook_shows_prints():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnlens.models.opened.utf8_text", lambda _: NAME)
        found = [attnlens.inspect(both()), attnlens.fit_params(both()), attnlens.compare(both(), small_vit())]
    table = StatsTable(((NAME, 1.0),), ("name", "n"))
    for one in (*found, table):
        html = one._repr_html_()
        assert unprintable(html) == []
        assert WRITTEN in unescape(html)


def html_of(report):
    """Return a report of Markdown as HTML."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(report)


def text_of(html):
    """Return the text of HTML, tags left out."""
    parts = html.split("<")
    return unescape("".join([parts[0], *(part.partition(">")[2] for part in parts[1:])]))


MARKUP = "text:<img src=x>|`*a*_b_ [c](http://d) <script>e</script>"


@pytest.mark.parametrize("name", [MARKUP, f"text:{STORED}", f"{MARKUP}{STORED}", "a|b", "a\\|b", "digits"], ids=ascii)
def test_a_report_of_a_training_takes_no_name_for_markup(name):
    told = {"provenance": {"versions": {name: name}, "device": name, "command": name}}
    records = records_of(6)
    records["default-5"] = run_records("default", 5, [0.1, 0.3, 0.2], status="diverged")
    records = {run: [line | told for line in lines] for run, lines in records.items()}
    plain = {"seeds": 6, "source_data": SourceData(shared=None, words="nothing")}
    named = {**plain, "dataset": name, "source": {"model": name, "sha256": "0"}}
    named |= {"source_data": SourceData(shared=None, words=name), "classes": [name, "x"], "left_out": {name: 3}}
    named |= {"starts": {"default": name}}
    report, usual = (
        render_report(summarise(config(**named), records)),
        render_report(summarise(config(**plain), records_of(6))),
    )
    assert unprintable(report) == []
    html, before = html_of(report), html_of(usual)
    for tag in ("<img", "<script", "<a ", "<em>"):
        assert tag not in html
    shown = printable(name)
    assert text_of(html.partition("</h1>")[0]) == f"{shown}: default, mimetic"
    assert f"2 epochs, on {shown}.\nSource: {shown}.\n" in text_of(html)
    rows = [
        [text_of(cell) for cell in row.split("</td>")[:-1]]
        for row in html.partition("<h2>Conditions</h2>")[2].split("</tr>")
        if "<td" in row
    ]
    found = {first.strip(): second.strip() for first, second in rows}
    assert found["device"] == shown
    assert found["versions"] == f"{shown} {shown}"
    assert found["command"] == shown
    assert found["pre-trained source"] == f"model {shown}, sha256 0"
    assert found["arm default"] == shown
    assert f", of the classes {shown}, x alone; left out: 3 {shown}" in found["data"]
    assert html.count("<h2>") == before.count("<h2>")
    assert html.count("<table>") == before.count("<table>")


def test_a_report_of_a_training_of_ordinary_names_is_as_it_was():
    report = render_report(summarise(config(seeds=6, dataset="hfds/a-b/c_d"), records_of()))
    assert "\\" not in report
    assert "&" not in report
    assert report.startswith(
        "# hfds/a-b/c_d: default, mimetic\n\n12 of 12 runs finished; 6 seeds an arm, 2 epochs, on hfds/a-b/c_d.\n"
    )
    assert "| command | `test` |" in report
    assert "| versions | torch x |" in report
