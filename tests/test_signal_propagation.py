"""Signal by depth: the arms measured on the same tokens, the table, the figure, the command."""

import csv
import io
import json
import math

import numpy as np
import pytest
import torch

from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.signal.figure import draw_signal
from attnlens.signal.kernels import Tokens, mean_cosine
from attnlens.signal.propagation import COLUMNS, propagate, random_tokens, sampling_error, token_cosines
from attnlens.signal.variants import make_mixes

SMALL = {"depth": 2, "tokens": 16, "seeds": 2, "sequences": 2}


@pytest.fixture(scope="module")
def found():
    return propagate("gpt-tiny", skips=False, norms=False, **SMALL)


@pytest.fixture(scope="module")
def attention_alone():
    return propagate(arms=["softmax", "shaped", "e-spa"], skips=False, norms=False, mlp="none", **SMALL)


def test_the_table_has_a_row_for_every_arm_seed_and_depth(found):
    arms = ["default", "mimetic", "softmax", "value-skipinit", "shaped", "e-spa", "u-spa"]
    assert list(found.arms) == arms
    keys = [(row["arm"], row["seed"], row["layer"]) for row in found.table.records()]
    assert keys == [(arm, seed, layer) for arm in arms for seed in (0, 1) for layer in (0, 1, 2)]
    assert (found.depth, found.tokens, found.embed_dim, found.causal) == (2, 16, 96, True)


def test_arms_of_a_seed_see_the_same_tokens_and_seeds_do_not(found):
    inputs = {arm: found.curve(arm, "cosine")[:, 0] for arm in found.arms}
    assert all((values == inputs["default"]).all() for values in inputs.values())
    assert inputs["default"][0] != inputs["default"][1]
    first, again, other = random_tokens(0, 1, 3, 5), random_tokens(0, 1, 3, 5), random_tokens(1, 1, 3, 5)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_theory_is_told_for_rewired_arms_alone(found):
    for arm in found.arms:
        silent = arm in ("default", "mimetic")
        for name in ("kernel_error", "theory_cosine", "theory_mean_square", "theory_error"):
            assert np.isnan(found.curve(arm, name)).all() == silent


def test_softmax_loses_the_tokens_and_the_others_keep_them_as_theory_says(attention_alone):
    assert (attention_alone.curve("softmax", "cosine")[:, 1:] > 1 - 1e-9).all()
    shaped = attention_alone.curve("shaped", "cosine")
    np.testing.assert_allclose(shaped, np.broadcast_to(shaped[:, :1], shaped.shape), atol=1e-12)
    kernel = make_mixes("e-spa", Tokens(16, causal=False), 2, {}).kernels[-1]
    assert attention_alone.curve("e-spa", "theory_cosine")[0, -1] == pytest.approx(mean_cosine(kernel))
    assert attention_alone.curve("e-spa", "cosine")[:, -1] == pytest.approx(mean_cosine(kernel), abs=0.05)


@pytest.mark.parametrize(("model", "width"), [("gpt-tiny", 96), ("vit_tiny_patch16_224", 192)])
def test_the_error_of_attention_alone_is_that_of_its_random_tokens(model, width):
    """Attention without skips and norms is exact at any width, so that what remains is the input's."""
    sizes = {"depth": 1, "tokens": 16, "seeds": 1, "sequences": 12}
    measured = propagate(model, ["e-spa"], skips=False, norms=False, mlp="none", options={"gamma": 1.0}, **sizes)
    assert measured.embed_dim == width
    error, expected = (measured.curve("e-spa", name)[0] for name in ("kernel_error", "theory_error"))
    np.testing.assert_allclose(error, expected, rtol=0.2)


def test_the_expected_error_is_that_of_draws():
    kernel = make_mixes("u-spa", Tokens(12, causal=False), 1, {"rho": 0.4}).kernels[-1]
    root = torch.from_numpy(np.linalg.cholesky(kernel))
    draws = torch.randn(400, 12, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors = np.linalg.norm(token_cosines(root @ draws).numpy() - kernel, axis=(1, 2)) / np.linalg.norm(kernel)
    assert math.sqrt((errors**2).mean()) == pytest.approx(sampling_error(kernel, 200), rel=0.05)
    assert sampling_error(kernel, 800) == pytest.approx(sampling_error(kernel, 200) / 2)


def test_skips_and_norms_are_kept_unless_they_are_taken_out():
    measured = propagate(arms=["default", "e-spa"], depth=2, tokens=4, seeds=1, sequences=1)
    assert [report.skips and report.norms for report in measured.arms.values()] == [True, True]
    assert np.isnan(measured.curve("e-spa", "theory_cosine")).all()  # its MLPs are as they were: no theory
    assert measured.arms["e-spa"].attention == "e-spa"
    assert measured.arms["default"].attention == "keep"


def test_options_reach_the_arms_that_have_them():
    options = {"gamma": 0.5, "rho": 0.1}
    sizes = {"depth": 1, "tokens": 4, "seeds": 1, "sequences": 1}
    measured = propagate(arms=["e-spa", "u-spa", "shaped"], mlp="none", skips=False, options=options, **sizes)
    assert [dict(report.options) for report in measured.arms.values()] == [{"gamma": 0.5}, {"rho": 0.1}, {}]
    assert measured.curve("u-spa", "theory_cosine")[0, -1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"arms": ["e-spam"]}, UsageError, "arms names e-spam, which is no arm: choose from softmax"),
        ({"arms": ["fitted"]}, UsageError, "arms names fitted, which is no arm"),
        ({"arms": []}, UsageError, "no arm is named"),
        ({"arms": ["shaped"], "options": {"gamma": 1}}, UsageError, "no arm has an option 'gamma': these arms accept"),
        ({"tokens": 15}, UsageError, "tokens=15 is no square"),
        ({"seeds": 0}, UsageError, "nothing to measure"),
        ({"depth": 0}, UsageError, "nothing to measure"),
        ({"tokens": 1}, UsageError, "nothing to measure"),
        ({"model": "resnet10t"}, UnsupportedAttentionError, "ResNet cannot be rewired"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, error, text):
    with pytest.raises(error, match=text):
        propagate(**arguments)


def test_the_figure_draws_means_bands_and_theory(found):
    figure = draw_signal(found)
    alike, error = figure.axes
    lines = [line.get_ydata() for line in alike.lines]
    for arm in found.arms:
        mean = found.curve(arm, "cosine").mean(0)
        assert any(len(y) == 3 and np.array_equal(y, mean) for y in lines)
    assert any(np.array_equal(y, found.curve("u-spa", "theory_cosine")[0]) for y in lines)
    assert len(alike.collections) == 7  # a band an arm
    assert len(error.collections) == 5
    figure.draw_without_rendering()
    boxes = {text.get_text(): text.get_window_extent() for text in figure.legends[0].get_texts()}
    labels = sorted(boxes, key=lambda text: (-round(boxes[text].y1 / 4), boxes[text].x0))  # line by line
    assert labels == [*found.arms, "theory"]
    handles = dict(
        zip([t.get_text() for t in figure.legends[0].get_texts()], figure.legends[0].get_lines(), strict=True)
    )
    lines = [handles[label] for label in labels]
    looks = [(str(line._dash_pattern), line.get_marker()) for line in lines]
    assert all(len(set(each)) > 4 for each in zip(*looks, strict=True))
    assert len(set(looks)) == len(looks)
    widths = [line.get_linewidth() for line in lines[:-1]]
    assert widths == sorted(widths, reverse=True)  # a line that lies on another one leaves its edges to be seen
    told = " ".join(text.get_text().replace("\n", " ") for text in figure.texts)
    assert "2 blocks without skips and without norms, tailored MLPs; width 96, 16 random tokens, causal" in told
    assert ("Band: from least to largest seed." in told) == (found.seeds > 1)
    assert "band" not in found.described()  # the table that says it too has no band


def test_errors_of_rounding_are_not_drawn_and_no_theory_is_said(attention_alone):
    error = draw_signal(attention_alone).axes[1]
    assert np.isnan(error.lines[0].get_ydata()[1:]).all()  # softmax: one token in theory and in the network
    assert error.get_ylim()[0] > 1e-3
    silent = propagate(arms=["default"], depth=1, tokens=4, seeds=1, sequences=1)
    figure = draw_signal(silent)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["mean cosine of two tokens"]
    assert "No arm has a theory of its kernel here." in " ".join(" ".join(t.get_text().split()) for t in figure.texts)


def test_the_command_writes_table_and_figure_and_prints(run, tmp_path):
    sizes = ("--depth", 1, "--tokens", 4, "--seeds", 2, "--sequences", 1)
    arms = ("--arms", "default,e-spa", "--no-skips", "--no-norms", "--option", "gamma=0.1")
    done = run("signal", *sizes, *arms, "-o", "out")
    assert done.code == 0, done.err
    assert "embedded: mean cosine of two tokens behind a block" in done.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"signal.csv", "signal.json", "signal.png"}
    data = json.loads((tmp_path / "out" / "signal.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "signal.csv").read_text())))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(data["rows"]) == 2 * 2 * 2
    for row, record in zip(rows, data["rows"], strict=True):
        assert [float(row[name]) if row[name] else None for name in COLUMNS[3:]] == [record[n] for n in COLUMNS[3:]]
    assert data["arms"]["e-spa"]["options"] == {"gamma": 0.1}
    assert data["provenance"]["command"].startswith("attnlens signal --depth 1")
    last = [row["cosine"] for row in data["rows"] if (row["arm"], row["layer"]) == ("e-spa", 1)]
    line = next(line for line in done.out.splitlines() if line.startswith(" e-spa"))
    assert f"{np.mean(last):.3f} ± {np.std(last, ddof=1):.3f}" in line


def test_the_command_prints_json_and_refuses_in_one_line(run):
    sizes = ("--depth", 1, "--tokens", 4, "--seeds", 1, "--sequences", 1)
    done = run("signal", "--arms", "shaped", *sizes, "--json")
    assert json.loads(done.out)["rows"][0]["arm"] == "shaped"
    for arguments, code in ((("--arms", "e-spam"), 2), (("resnet10t",), 1)):
        refused = run("signal", *arguments)
        assert refused.code == code
        assert len(refused.err.strip().splitlines()) == 1
