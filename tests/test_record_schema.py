"""Records of a run: every type, range, order and name is checked before they are believed."""

import json

import pytest

from attnlens.training.figures import draw_structure
from attnlens.training.record_schema import ResumeError, check_records
from attnlens.training.results import summarise
from tests.training_setup import config

NUMBERS = {name: [0.5, 0.25] for name in ("qk_alpha", "qk_beta", "ov_alpha", "ov_beta")}
FITS = {name: [0.5, float("nan")] for name in ("qk_alpha", "qk_beta", "ov_alpha", "ov_beta")}
RECORD = {
    "arm": "default", "seed": 1, "lr": 1e-3, "tuning": False, "epoch": 2, "status": "finished", "accuracy": 0.5,
    "train_seconds": 3, "models_in_stack": 1, "streams": [],
    "provenance": {"device": "cpu", "command": "c", "versions": {}},
    "structure": {"raw": FITS, "effective": FITS},
}  # fmt: skip


def test_a_record_is_taken_as_it_is():
    assert check_records([RECORD], config(), "here", "default-1") == [RECORD]
    diverged = {**RECORD, "status": "diverged", "accuracy": None, "structure": None}
    assert check_records([{**RECORD, "epoch": 0, "status": "running"}, diverged], config(), "here")[1] == diverged


@pytest.mark.parametrize(
    "change",
    [
        *({"accuracy": value} for value in ("0.5", -0.1, 1.1, 1e308, None, True)),
        *({"train_seconds": value} for value in ("5", -1, 1e308, None)),
        *({"models_in_stack": value} for value in ("1", 0, 1.5, True)),
        *({"lr": value} for value in (0.5, 0.0, "1e-3")),
        *({"tuning": value} for value in ("false", 0, None)),
        *({"seed": value} for value in ("1", -1, 1 << 31, 1.0)),
        *({"epoch": value} for value in ("2", -1, 1.5)),
        *({"arm": value} for value in ("other", None, 1)),
        *({"status": value} for value in ("done", None)),
        *({"streams": value} for value in ("", [1], None)),
        *({"provenance": value} for value in ({}, None, {"device": 1, "command": "", "versions": {}})),
        {"structure": {"raw": FITS}},
        {"structure": {"raw": FITS, "effective": FITS, "other": FITS}},
        {"structure": {"raw": FITS, "effective": {**FITS, "qk_beta": [0.5]}}},
        {"structure": {"raw": FITS, "effective": {name: [0.5] for name in FITS}}},
        *({"structure": {"raw": FITS, "effective": {**FITS, "ov_beta": [0.5, odd]}}} for odd in (None, "1", 1e308)),
        *({"test_loss": value} for value in ("1", 1e308, float("inf"))),
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_a_record_that_is_none_is_named_and_no_internal_error(change):
    with pytest.raises(ResumeError, match=r"^here.*(delete it|train that run again)"):
        check_records([{**RECORD, **change}], config(), "here", "default-1")


@pytest.mark.parametrize("name", ["mimetic-1", "default-0", "tune-default-0.001-1"])
def test_the_records_of_one_run_are_no_other_runs(name):
    with pytest.raises(ResumeError, match=r"holds the records of default-1, which is another run"):
        check_records([RECORD], config(), "here", name)


def test_epochs_follow_each_other():
    first = {**RECORD, "epoch": 1, "status": "running"}
    assert len(check_records([first, RECORD], config(), "here")) == 2
    for lines in ([RECORD, first], [first, first], [{**first, "status": "finished"}, RECORD]):
        with pytest.raises(ResumeError, match="do not follow each other"):
            check_records(lines, config(), "here")


def test_structure_that_is_nowhere_a_number_is_drawn_as_nothing():
    given = {"status": "finished", "seed": 0, "lr": 1e-3, "epoch": 2, "data_seed": 0}
    nothing = {"structure": {fold: {name: [float("nan")] * 2 for name in FITS} for fold in ("raw", "effective")}}
    runs = {"default-0": [{**RECORD, **given, **nothing}], "mimetic-0": [{**RECORD, **given, "arm": "mimetic"}]}
    runs["mimetic-0"][0]["structure"] = {"raw": NUMBERS, "effective": NUMBERS}
    drawn = draw_structure(summarise(config(), runs), None, "source")
    assert [len(axes.lines) for axes in drawn.axes if axes.has_data()] == [1, 1, 1, 1]
