"""The public call and its tables, results of earlier comparisons, and what is found without a change elsewhere."""

import inspect as python_inspect
import json
import math

import numpy as np
import pytest

import attnlens
from attnlens.cli.app import load_command
from attnlens.training.config import OPTIONS, Config
from attnlens.training.networks import __path__ as network_folders
from attnlens.training.networks import base
from attnlens.training.networks.registry import network_named, network_of, networks
from attnlens.training.report import render_report
from attnlens.training.results import summarise
from tests.conftest import ROOT
from tests.training_setup import compare, small, write_source

STORED = sorted(path.parent.name for path in (ROOT / "benchmarks" / "results").glob("*/results.jsonl"))
NOT_OPTIONS = {"quiet", "command", "cache", "checkpoint_seconds"}
"""Arguments of `train_compare` that the command line does not take."""


@pytest.mark.parametrize("name", STORED)
def test_results_of_earlier_comparisons_give_the_same_summary_and_report(name):
    folder = ROOT / "benchmarks" / "results" / name
    stored = json.loads((folder / "config.json").read_text())
    sha256 = stored.pop("sha256")
    stored.pop(OPTIONS, None)  # what `--config` reads is no part of a comparison
    config = Config.model_validate(stored)
    assert config.sha256() == sha256
    assert json.loads(config.model_dump_json()) == stored
    records = {}
    for line in map(json.loads, (folder / "results.jsonl").read_text().splitlines()):
        records.setdefault(line["run"], []).append(line)
    names = [f"{arm}-{seed}" for seed in range(config.seeds) for arm in config.arms]
    summary = summarise(config, {name: records[name] for name in names})
    assert summary.to_csv() == (folder / "summary.csv").read_text()
    assert render_report(summary) == (folder / "report.md").read_text()


def test_the_arguments_of_train_compare_are_the_options_of_the_command():
    command = load_command("train-compare")
    of_the_command = {"debug", "help", "config", "json_", "quiet"}  # fills in the others, or says how to print
    of_the_command |= {"style", "figure_width", "format_", "dpi"}  # Python has the context of `figure_style`
    options = {parameter.name for parameter in command.params} - of_the_command
    arguments = python_inspect.signature(attnlens.train_compare).parameters
    assert set(arguments) - NOT_OPTIONS == options
    for parameter in command.params:
        if parameter.name not in {*of_the_command, "tune_lr"}:  # a list in Python, words on the command line
            default = getattr(parameter.default, "value", parameter.default)
            assert arguments[parameter.name].default == default, parameter.name


def test_the_tables_hold_what_the_runs_gave(tmp_path):
    found = compare(write_source(tmp_path), tmp_path / "out")
    runs = list(found.runs.records())
    assert [(run["arm"], run["seed"]) for run in runs] == [(a, s) for a in ("default", "mimetic") for s in (0, 1)]
    assert {(run["status"], run["epoch"]) for run in runs} == {("finished", 3)}
    means = {arm: np.mean(found.runs.select(arm=arm).column("accuracy")) for arm in ("default", "mimetic")}
    assert dict(zip(means, found.summary.column("accuracy"), strict=True)) == pytest.approx(means)
    (contrast,) = found.contrasts.records()
    assert (contrast["arm"], contrast["other"], contrast["n"]) == ("mimetic", "default", 2)
    assert contrast["difference"] == pytest.approx(means["mimetic"] - means["default"])
    assert found.summary.to_csv() == (tmp_path / "out" / "summary.csv").read_text()
    assert found.report == (tmp_path / "out" / "report.md").read_text()
    assert (
        repr(found).splitlines()[0]
        == f"<TrainComparison of default, mimetic on digits: 4 of 4 runs ended, in {tmp_path / 'out'}>"
    )


def test_a_run_that_diverged_has_no_score_in_the_table():
    from tests.test_training_statistics import config, records_of, run_records

    broken = run_records("mimetic", 1, [0.1, 0.2])
    broken.append({**broken[-1], "epoch": 2, "status": "diverged", "streams": ["1-2"]})
    broken[1]["status"] = "running"
    table = summarise(config(seeds=2), records_of(2, **{"mimetic-1": broken})).run_table()
    last = list(table.records())[-1]
    assert (last["arm"], last["seed"], last["status"], last["epoch"]) == ("mimetic", 1, "diverged", 2)
    assert math.isnan(last["accuracy"])


def test_no_two_networks_have_the_same_names_of_sizes_and_prefixes_tell_them_apart():
    kinds = networks()
    assert len({frozenset(kind.model_fields) for kind in kinds}) == len(kinds)
    for kind in kinds:
        others = [one.prefix for one in kinds if one is not kind and one.prefix]
        assert not any(kind.prefix.startswith(prefix) for prefix in others)
        assert network_named(f"{kind.prefix}x" if kind.prefix else "vit_tiny_patch16_224") is (
            kind if kind.prefix else None
        )
    with pytest.raises(ValueError, match="no network has the sizes width, height"):
        network_of({"width": 3, "height": 4})


def test_a_network_is_one_file(tmp_path, monkeypatch):
    """The class of docs/extending.md is found by its file alone, trains, and is read back from config.json."""
    page = (ROOT / "docs" / "extending.md").read_text().partition("\n## A network\n")[2]
    definition = page.partition("```python\n")[2].partition("\n\n\nwith ")[0]
    (tmp_path / "networks").mkdir()
    (tmp_path / "networks" / "sandwich.py").write_text(definition)
    folders = [*network_folders, str(tmp_path / "networks")]
    monkeypatch.setattr("attnlens.training.networks.registry.folder", folders)
    monkeypatch.setattr("attnlens.training.networks.__path__", folders)
    before = list(base.KNOWN)
    try:
        options = {**small(None), "model": "sandwich-23", "arms": ("default",), "seeds": 1, "epochs": 6, "lr": 1e-2}
        found = compare(None, tmp_path / "out", options=options)
        stored = json.loads((tmp_path / "out" / "config.json").read_text())
        stored.pop("sha256")
        network = Config.model_validate(stored).network
    finally:
        base.KNOWN[:] = before
    assert network.describe() == "depthwise convolution of width 23"
    assert f"| network | {network.describe()} |" in found.report
    (run,) = found.runs.records()
    assert run["accuracy"] > 0.3  # of ten classes
