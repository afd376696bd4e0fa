"""The report as a file: self-contained, complete, escaped, small; what it refuses."""

import base64
import hashlib
import json
import math
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from safetensors.torch import save_model

import attnlens
from attnlens import cli, reports
from attnlens.reports.matrices import CODES, HALF, corner_size, encode
from attnlens.reports.training import ResultsError, read_training
from attnlens.templates import aligned
from tests.test_inspect import SMALL, small_vit

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>"


class Page(HTMLParser):
    """Tags with their attributes, and the text of every script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and not data.isspace():
            self.scripts[-1] += data

    @property
    def data(self):
        return json.loads(self.scripts[0])


@pytest.fixture(scope="module")
def embedded():
    return reports.report(command="attnlens report")


def results_folder(path, arm="default", **changes):
    """Write a results folder as train-compare does, of two arms, two seeds and two epochs."""
    path.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "arm": name,
            "seed": seed,
            "epoch": epoch,
            "accuracy": 0.1 + 0.2 * epoch + 0.1 * (name == arm),
            "tuning": False,
        }
        | {"test_loss": 2.0 - epoch, "status": "running"}
        for name in (arm, "other")
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    (path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    mean = {"mean": 0.6, "sd": 0.1, "low": 0.5, "high": 0.7, "n": 2}
    summary = {
        "complete": True,
        "screening": True,
        "arms": {name: {"accuracy": mean, "lr": 1e-3} for name in (arm, "other")},
        "contrasts": [{"arm": arm, "other": "other", "difference": mean, "t_holm": 0.25, "sign_flip_p": 0.5}],
        "devices": ["cpu"],
        "commands": ["attnlens train-compare"],
    }
    (path / "summary.json").write_text(json.dumps(summary | changes))
    return path


def test_the_page_asks_for_nothing_outside_itself(embedded):
    page = Page(embedded)
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "poster", "data", "srcset"):
            value = attributes.get(name, "#")
            assert value.startswith(("#", "data:")), f"<{tag} {name}={value}>"
    assert not re.search(r"@import|url\((?!['\"]?data:)", embedded[: embedded.index("</style>")])


def test_the_policy_allows_these_scripts_and_no_others(embedded):
    page = Page(embedded)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    found = {base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts[1:]}
    assert found == allowed
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]


def test_the_numbers_in_the_page_are_those_of_stats_json(embedded):
    stats = Page(embedded).data["stats"]
    expected = attnlens.inspect().stats.json_rows()
    assert [dict(zip(stats["columns"], row, strict=True)) for row in stats["rows"]] == [
        {name: row[name] for name in stats["columns"]} for row in expected
    ]


def test_the_verdicts_are_those_of_fit_params(embedded):
    judged = Page(embedded).data["judged"]
    entries = [entry for entry in attnlens.fit_params().entries if entry.fold != "balanced"]  # the page shows two folds
    assert len(judged) == len(entries)
    for entry in entries:
        found = judged[f"{entry.layer}.{entry.head}.{entry.circuit}.{entry.fold}"]
        assert (found["verdict"], found["reason"]) == (entry.verdict, entry.reason)


def decoded(found):
    """Read a matrix back from its text."""
    levels = np.array([CODES.index(code) - HALF for code in found["text"]]).reshape(found["rows"], found["columns"])
    return found["width"] * np.sinh(levels * math.asinh(found["clip"] / found["width"]) / HALF)


@pytest.mark.parametrize("head", [0, 2, "all"])
def test_a_heatmap_shows_the_corner_of_its_product(embedded, head):
    drawn = Page(embedded).data["drawn"]
    for fold in ("raw", "effective"):
        corner = attnlens.inspect().circuits(1, head, circuit="ov", fold=fold).dense(64)
        shown = decoded(drawn[f"1.{head}.ov.{fold}"]["corner"])
        assert shown.shape == corner.shape
        assert np.corrcoef(shown.ravel(), corner.ravel())[0, 1] > 0.999


def test_what_is_drawn_belongs_to_the_whole_product(embedded):
    drawn = Page(embedded).data["drawn"]
    inspection = attnlens.inspect()
    product = inspection.circuits(3, 1, circuit="ov", fold="effective")
    found = drawn["3.1.ov.effective"]
    counts, edges = np.histogram(product.diagonal(), bins=len(found["histogram"]["counts"]))
    assert found["histogram"]["counts"] == counts.tolist()
    assert found["histogram"]["low"] == pytest.approx(edges[0])
    np.testing.assert_allclose(found["singular"], product.singular_values(), rtol=1e-3)
    total = inspection.circuits(3, "all", circuit="ov", fold="effective").diagonal()
    assert drawn["3.all.ov.effective"]["histogram"]["high"] == pytest.approx(total.max())
    assert "singular" not in drawn["3.all.ov.effective"]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_an_encoded_matrix_keeps_sign_zero_and_size(scale):
    matrix = np.random.default_rng(0).standard_cauchy((31, 17)) * scale
    matrix[3, 5] = 0.0
    found = encode(matrix)
    assert (found["rows"], found["columns"]) == (31, 17)
    reach = math.asinh(found["clip"] / found["width"]) / HALF
    again = decoded(found)
    assert again[3, 5] == 0
    np.testing.assert_array_less(
        np.abs(again - matrix), 0.55 * reach * np.hypot(np.maximum(np.abs(again), np.abs(matrix)), found["width"])
    )
    assert encode(np.zeros((2, 3)))["text"] == CODES[HALF] * 6


def test_the_characters_of_a_heatmap_are_written_as_they_are():
    assert len(CODES) % 2 == 1
    assert json.dumps(CODES) == f'"{CODES}"'
    assert not set(CODES) & set("<>&'\"")


def test_more_heads_get_smaller_corners(monkeypatch):
    inspection = attnlens.inspect()
    assert corner_size(inspection) == 64
    monkeypatch.setattr("attnlens.reports.matrices.HEATMAP_BYTES", 200_000)
    assert corner_size(inspection) == math.isqrt(200_000 // len(inspection.stats))


def test_strings_from_files_are_text(tmp_path):
    folder = tmp_path / "<img src=x onerror=window.hacked=1>"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": SMALL}))
    save_model(small_vit(), folder / "model.safetensors")
    train = results_folder(tmp_path / "made", HOSTILE, devices=[HOSTILE], commands=[HOSTILE])
    page = reports.report(folder, compare=[folder], train=train, command=HOSTILE)
    parsed = Page(page)
    assert len(parsed.scripts) == 5
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    assert HOSTILE not in page
    assert HOSTILE in parsed.data["training"]["arms"]
    assert "&lt;/script&gt;&lt;script&gt;window.hacked=1" in page
    assert "<h1>&lt;img src=x onerror=window.hacked=1&gt;</h1>" in page


def test_curves_and_comparison_are_there_when_asked_for(tmp_path, embedded):
    train = results_folder(tmp_path / "made")
    with (train / "results.jsonl").open("a") as file:
        file.write(json.dumps({"arm": "default", "seed": 7, "epoch": 0, "accuracy": 0.5, "tuning": True}) + "\n")
        file.write('{"arm": "default", "seed": 0, "epoch": 3, "status": "diverged", "accuracy": NaN}\n')
    page = reports.report(compare=[small_vit()], train=train)
    data = Page(page).data
    assert len(data["training"]["points"]) == 13
    assert data["training"]["points"][-1]["accuracy"] is None
    assert len(data["comparison"]["models"]) == 2
    assert "Fewer than six seeds" in page
    assert Page(embedded).data["training"] is None
    assert 'id="training"' not in embedded


def test_a_results_folder_without_a_summary_shows_its_curves(tmp_path):
    train = results_folder(tmp_path / "made")
    (train / "summary.json").unlink()
    assert read_training(train).summary is None
    assert read_training(train).arms == ["default", "other"]


def test_results_compared_by_balanced_accuracy_are_read(tmp_path):
    train = results_folder(tmp_path / "made")
    path = train / "summary.json"
    summary = json.loads(path.read_text())
    for arm in summary["arms"].values():
        arm["balanced_accuracy"] = {**arm.pop("accuracy"), "low": None, "high": None}  # without spread no interval
    path.write_text(json.dumps({**summary, "metric": "balanced_accuracy"}))
    found = read_training(train).summary
    assert found.arms["default"].value.mean == 0.6
    assert found.arms["default"].value.low is None


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.jsonl", None, "does not exist: give train the output folder"),
        ("results.jsonl", "", "holds no evaluation"),
        ("results.jsonl", '{"arm": "a", "seed"', "line 1 of .* is no JSON"),
        ("results.jsonl", '{"arm": "a", "seed": "x", "epoch": 1}', "line 1 of .*: seed: "),
        ("results.jsonl", "[]", "line 1 of .*: content: "),
        ("summary.json", '{"complete": true}', "summary.json: screening: Field required"),
        ("summary.json", "\x00", "summary.json is no JSON"),
    ],
)
def test_a_wrong_results_file_is_named(tmp_path, file, content, message):
    train = results_folder(tmp_path / "made")
    (train / file).unlink()
    if content is not None:
        (train / file).write_text(content)
    with pytest.raises(ResultsError, match=message):
        read_training(train)


def test_a_model_without_square_products_has_numbers_and_says_why_no_verdict(monkeypatch):
    def refuse(*_, **__):
        raise attnlens.errors.UnsupportedAttentionError("no product of it is square")

    monkeypatch.setattr("attnlens.reports.page.fit_params", refuse)
    page = reports.report()
    assert "No verdicts: no product of it is square" in page
    assert Page(page).data["judged"] == {}


@pytest.mark.slow
def test_one_layer_is_one_and_every_fold_that_is_shown_is_explained():
    page = reports.report(small_vit(depth=1), fold="all")
    assert "1 of 1 attention layer, each product" in page
    assert "1 of 1 layers" not in page
    legend = page.partition('id="profiles-title"')[2].partition("</p>")[0]
    assert re.findall(r"^(\w+): .+[;.]$", legend, re.MULTILINE) == ["raw", "effective", "centred", "balanced"]


def test_a_vit_base_takes_less_than_five_megabytes():
    import timm

    torch.manual_seed(0)
    page = reports.report(timm.create_model("vit_base_patch16_224", num_classes=0))
    assert len(page.encode()) < 5e6
    assert len(Page(page).data["stats"]["rows"]) == 2 * (144 + 144 + 12)


def test_the_command_writes_one_file_and_says_how_large(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attnlens", "report"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "wrote report.html, " in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "<dd>attnlens report</dd>" in (tmp_path / "report.html").read_text()


def test_a_missing_results_folder_is_one_line_before_anything_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["attnlens", "report", "--train", "absent"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "absent/results.jsonl does not exist" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_column_keeps_four_digits_and_lines_its_decimal_points_up():
    values = [0.0009029, -0.0234, 12.5, None, 0.0, 1e-9, 340.0]
    texts = aligned(values)
    assert [text.rstrip() for text in texts] == ["0.0009029", "-0.02340", "12.50", "", "0", "1e-09", "340.0"]
    behind = {len(text) - text.index(".") for text in texts if "." in text}
    assert behind == {len(".0009029")}
    for value, text in zip(values, texts, strict=True):
        assert value is None or float(text) == pytest.approx(value, rel=5e-4)
    assert aligned([]) == []
    assert aligned([None]) == [""]
