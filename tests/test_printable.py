"""What files call things, said on a terminal, in JSON and in Markdown: printable, one line, and what it says."""

import json
import os
import re

import pytest
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from attnlens.cli.console import note, write_lines, write_stdout
from attnlens.cli.sheet import Sheet
from attnlens.cli.tables import escape, print_sheet
from attnlens.fit.fit_params import fit_params
from attnlens.models.open import open_model
from attnlens.printable import Markdown, as_code, in_markdown, printable, printable_json, utf8_data
from attnlens.statistics.table import StatsTable
from attnlens.strict_json import parse_json, read_json
from tests.test_inspect import small_vit

KINDS = {
    "an escape": ("\x1b[31m", r"\x1b[31m"),
    "a bell": ("\x07", r"\x07"),
    "a line break": ("\n", r"\n"),
    "a tab": ("\t", r"\t"),
    "a delete": ("\x7f", r"\x7f"),
    "a turn to the left": ("\u202e", r"\u202e"),
    "a blank without width": ("\u200b", r"\u200b"),
    "a line separator": ("\u2028", r"\u2028"),
    "a byte that is no UTF-8": ("\udcff", r"\udcff"),
    "a letter of another script": ("\u540d", "\u540d"),
}
"""What a name holds, and how it is written."""
NAME = f"a{'b'.join(given for given, _ in KINDS.values())}c"
WRITTEN = f"a{'b'.join(written for _, written in KINDS.values())}c"
"""All of them in one name."""
every_kind = pytest.mark.parametrize(("given", "written"), KINDS.values(), ids=KINDS)


def named(given):
    """Return a name with this in it, as text of Python and as bytes of a file system."""
    return f"x{given}y", os.fsencode(f"x{given}y")


@every_kind
def test_a_name_is_written_in_characters_that_print(given, written):
    assert printable(f"x{given}y") == f"x{written}y"
    assert printable(f"x{given}y", keep=given) == f"x{given}y"


@every_kind
def test_a_note_is_one_line(given, written, capsys):
    note(f"failed: x{given}y: no model")
    assert capsys.readouterr() == ("", f"failed: x{written}y: no model\n")


@every_kind
def test_an_item_of_a_list_is_one_line(given, written, capsys):
    write_lines([f"x{given}y", "z"])
    assert capsys.readouterr() == (f"x{written}y\nz\n", "")


def test_a_text_of_our_own_keeps_its_lines_and_tabs(capsys):
    write_stdout("a\tb\nc\x1b")
    assert capsys.readouterr().out == "a\tb\nc\\x1b\n"


@every_kind
@pytest.mark.parametrize("write", [escape, lambda text: text], ids=["escaped", "as it is"])
def test_a_cell_breaks_no_line_of_its_table(given, written, write, capsys):
    sheet = Sheet(f"[bold]{escape(f'x{given}y')}[/bold]: table\nof two lines")
    sheet.label("name", key=True, least=40)
    sheet.number("n")
    sheet.add_row(write(f"x{given}y"), "1")
    print_sheet(sheet)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip() and "─" not in line]
    assert lines == [[f"x{written}y:", "table"], ["of", "two", "lines"], ["name", "n"], [f"x{written}y", "1"]]


@every_kind
def test_a_scan_lists_a_file_on_one_line(given, written, run, tmp_path):
    text, name = named(given)
    try:
        (tmp_path / os.fsdecode(name + b".pt")).write_bytes(b"")
    except (OSError, ValueError):
        pytest.skip("there can be no file of this name here")
    code, out, err = run("scan", "*.pt", "--list", "-o", "out")
    shown = f"x{written}y.pt" if given != "\udcff" else r"x\xffy.pt"
    assert (code, out, err) == (0, f"{shown}\n", ""), text


def test_no_name_forges_a_line_of_a_scan(run, tmp_path):
    forged = "x\nfailed: y: all is lost\nwrote nothing"
    (tmp_path / f"{forged}.pt").write_bytes(b"")
    code, out, err = run("scan", "*.pt", "-o", "out", "--workers", "1")
    assert code == 1
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "failed",
        "1 model",
        "wrote scan.csv, layers.csv, scan.json, landscape.png and models/ to out",
        "attnlens",
    ]
    assert lines[0].startswith(r"failed: x\nfailed: y: all is lost\nwrote nothing.pt: ")
    assert not [line for line in out.splitlines() if line.startswith(("failed", "wrote"))]


@pytest.fixture(scope="module")
def bytes_in_a_name(tmp_path_factory):
    """Return a folder in which a file of weights has a name that is no UTF-8, or skip."""
    folder = tmp_path_factory.mktemp("names")
    save_file({name: value.contiguous() for name, value in small_vit().state_dict().items()}, folder / "plain")
    try:
        (folder / "plain").rename(folder / "m\udcff.safetensors")
    except OSError:
        pytest.skip("there can be no file of this name here")
    return folder


@pytest.mark.parametrize(
    ("command", "written"),
    [
        (("inspect", "-o", "out"), "out/stats.json"),
        (("compose", "-o", "out"), "out/composition.json"),
        (("fit-params", "-o", "out.json", "--figures", "out"), "out.json"),
        (("scan", "-o", "out", "--workers", "1"), "out/scan.json"),
    ],
    ids=["inspect", "compose", "fit-params", "scan"],
)
def test_what_is_written_of_a_name_that_is_no_utf8_is_strict_json(run, bytes_in_a_name, tmp_path, command, written):
    name, *rest = command
    path = str(bytes_in_a_name / "m\udcff.safetensors")
    code, _, err = run(name, path, "--num-heads", "3", *rest)
    assert code == 0, err
    text = (tmp_path / written).read_text()
    assert r"m\\xff.safetensors" in text
    assert "udcff" not in text.replace(r"m\\udcff.safetensors", "")  # the command is written as Python would
    read_json(tmp_path / written)


def test_a_signal_of_a_folder_whose_name_is_no_utf8_is_measured(run, tmp_path):
    folder = tmp_path / "m\udcff"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("there can be no folder of this name here")
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 1, "num_heads": 2}
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": sizes}))
    code, out, err = run("signal", folder, "--arms", "default", "--seeds", "1", "-o", "out")
    assert code == 0, err
    assert out.splitlines()[0].endswith(r"m\xff: mean cosine of two tokens behind a block")
    assert read_json(tmp_path / "out" / "signal.json")["model"].endswith(r"m\xff")


def test_texts_at_any_depth_are_made_such_that_utf8_holds_them():
    given = {"a\udcff": [{"file": "b\udc80"}, ("c\ud800", 1, None)], "d": 0.5}
    assert utf8_data(given) == {r"a\xff": [{"file": r"b\x80"}, [r"c\ud800", 1, None]], "d": 0.5}


@pytest.mark.parametrize("mark", ["\xa0", "\xad", "\x7f", "\x85", "\u200b", "\u202e", "\u2028", "\U000e0001", "\u540d"])
def test_json_escapes_as_json_does(mark):
    text = f'{{\n "a": "x{mark}y"\n}}'
    shown = printable_json(text)
    assert printable(shown, keep="\n") == shown
    assert parse_json(shown) == {"a": f"x{mark}y"}
    assert (mark in shown) == mark.isprintable()


def test_a_parameter_file_holds_nothing_that_does_not_print(monkeypatch):
    name = "x\xa0\u202e\x7f\u540d"
    monkeypatch.setattr("attnlens.models.opened.utf8_text", lambda _: name)
    params = fit_params(small_vit())
    text = params.to_json()
    assert r'"model": "x\u00a0\u202e\u007f' + '\u540d"' in text
    assert type(params).parse(text).sources[0].model == name
    assert not [mark for mark in text if not mark.isprintable() and mark != "\n"]


def test_what_python_shows_of_a_table_prints(monkeypatch):
    table = StatsTable(((f"x{NAME}", 1.0),), ("name", "n"))
    shown = repr(table)
    assert not [mark for mark in shown if not mark.isprintable() and mark != "\n"]
    assert len(shown.splitlines()) == 3
    monkeypatch.setattr("attnlens.models.opened.utf8_text", lambda _: NAME)
    assert repr(fit_params(small_vit())).splitlines()[0].startswith(f"<InitParams of {WRITTEN}: ")
    assert repr(open_model(small_vit(), None)).startswith(f"<OpenedModel {WRITTEN}: ")


TEXTS = [
    *("plain", "vit_tiny_patch16_224", "text:wikitext-103", "hfds/a-b/c_d", "AMD EPYC, 2 cores", "p < .0001", "R&D"),
    *("*a*", "**b**", "_c_", "__d__", "`e`", "``f`g", "[h](http://i)", "![j](k)", "<img src=x>", "<script>l</script>"),
    *("a|b", "a\\|b", "\\", "`", "~~m~~", "&lt;", "&#60;", "</td>", "<!-- n", "$o$", "a\\", "| --- |", "x`|`y", NAME),
]


def cells(markdown):
    """Return what CommonMark with tables makes of a text: the cells of its first table."""
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    assert "<img" not in html
    assert "<script" not in html
    found = re.findall(r"<td>(.*?)</td>", html, re.DOTALL)
    return [
        re.sub(r"</?code>", "", cell)
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", '"')
        .replace("&amp;", "&")
        for cell in found
    ]


@pytest.mark.parametrize("text", TEXTS, ids=map(ascii, TEXTS))
def test_a_text_is_read_in_markdown_letter_for_letter(text):
    row = f"| a | b |\n| --- | --- |\n| {in_markdown(text)} | {in_markdown(as_code(text))} |"
    assert cells(row) == [printable(text), printable(text)]
    html = MarkdownIt("commonmark", {"html": True}).render(f"# {in_markdown(text)}: end")
    assert html.count("<") == 2, html


@pytest.mark.parametrize("text", ["vit_tiny_patch16_224", "p < .0001", "R&D", "a (b), c = 1.5; d-e: 95% +0.3 to -0.2"])
def test_an_ordinary_text_is_as_it_was_in_markdown(text):
    assert in_markdown(text) == text
    assert as_code(text) == f"`{text}`"
    assert in_markdown(Markdown(f"**{text}**")) == f"**{text}**"
