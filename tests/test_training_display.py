"""What a person sees while a comparison trains, and the figures after it."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from attnlens.training.config import Run
from attnlens.training.data.sources import load_dataset
from attnlens.training.display import Display
from attnlens.training.figures import QUANTITIES, curve_matrix, draw_curves, draw_structure
from attnlens.training.networks.base import PLAIN
from attnlens.training.options import eval_every
from attnlens.training.results import summarise
from attnlens.training.stack_size import fastest_stack, stack_rate
from tests.conftest import ROOT
from tests.test_training_statistics import records_of
from tests.training_setup import SHAPE, config, write_source


def shown(display):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(display.table())
    return console.export_text()


def test_the_table_shows_arms_epochs_accuracy_and_time_left(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr("attnlens.training.display.time.monotonic", lambda: clock[0])
    display = Display(config(recipe={"epochs": 4}), 4, 1, title="cats")  # 30 images an epoch, 4 epochs, 4 runs
    display.already("default", 0, 0.25)
    clock[0] += 2
    run = Run("mimetic", 0, 1e-3)
    display.listen((run,), {"epoch": 1, "items": 30, "losses": [1.0], "scores": [0.5]})
    text = shown(display)
    assert "15 images/s" in text
    assert "0:22 left" in text  # 330 images to go
    assert "25.0%" in text
    assert "1/4" in text
    assert [line.split()[:2] for line in text.splitlines() if "/2" in line] == [["default", "1/2"], ["mimetic", "0/2"]]
    display.listen((run,), {"ended": True, "records": [[{"status": "diverged", "epoch": 2}]]})
    assert "seed 0 diverged" in shown(display)
    assert "cats: mimetic-0 diverged in epoch 2 (2 of 4" in capsys.readouterr().err


def test_evaluation_costs_no_more_than_a_tenth():
    assert eval_every(12, 1000, 797) == 3
    assert eval_every(100, 50_000, 10_000) == 5
    assert eval_every(3, 50_000, 10_000) == 1


CPU, WIRED = torch.device("cpu"), dict.fromkeys(config().arms, PLAIN)


def test_the_fastest_stack_is_the_one_that_measured_fastest(monkeypatch):
    rates = {1: 10.0, 2: 30.0, 4: 20.0}
    monkeypatch.setattr("attnlens.training.stack_size.stack_rate", lambda _config, size, *_given: rates[size])
    assert fastest_stack(config(seeds=2), WIRED, load_dataset("digits").limited(30, 7), CPU) == 2


def test_stacks_that_do_not_fit_have_no_rate(monkeypatch):
    data = load_dataset("digits").limited(30, 7).resident(config(), CPU)
    assert stack_rate(config(), 2, WIRED, data, CPU) > 0

    def step(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("attnlens.training.engine.Stack.step", step)
    assert stack_rate(config(), 2, WIRED, data, CPU) == 0


def test_curves_draw_means_and_ranges_of_the_records():
    summary = summarise(config(seeds=6), records_of())
    (axes,) = draw_curves(summary).axes
    lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
    expected = 100 * np.array([0.1, 0.5, np.mean([0.6 + 0.012 * seed for seed in range(6)])])
    np.testing.assert_allclose(lines["mimetic (n = 6)"], expected)
    low, high = (f(axes.collections[1].get_paths()[0].vertices[:, 1]) for f in (np.min, np.max))
    assert (low, high) == pytest.approx((10, 66))
    epochs, values = curve_matrix([[(0, 0.1), (2, 0.3)], [(0, 0.2)]])
    assert epochs.tolist() == [0, 2]
    np.testing.assert_array_equal(values, [[0.1, 0.3], [0.2, np.nan]])


def test_structure_draws_every_quantity_beside_the_pretrained_models():
    summary = summarise(config(seeds=6), records_of())
    pretrained = {"effective": {name: [0.2, 0.4] for name in QUANTITIES}}
    panels = draw_structure(summary, pretrained, "teacher").axes
    assert [panel.get_title(loc="left") for panel in panels] == list(QUANTITIES.values())
    for panel in panels:
        lines = panel.get_lines()
        assert len(lines) == 3
        assert lines[0].get_ydata()[0] == pytest.approx(0.3)
        np.testing.assert_allclose(lines[1].get_ydata(), 0.1)


def test_networks_built_in_many_threads_are_those_of_their_seeds():
    expected = [SHAPE.build(seed).state_dict() for seed in range(8)]
    found = [None] * 8

    def build(seed):
        found[seed] = SHAPE.build(seed).state_dict()

    for _ in range(5):
        threads = [threading.Thread(target=build, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for mine, theirs in zip(expected, found, strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_sigterm_ends_the_command_with_its_exit_code_and_says_how_to_go_on(tmp_path):
    source = write_source(tmp_path)
    sizes = ["--patch-size", "4", "--train-images", "80", "--batch-size", "20", "--epochs", "5000", "--seeds", "1"]
    arguments = ["train-compare", "--model", str(source), "--arms", "default,mimetic", "--output", "out", *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "attnlens", *arguments, "--device", "cpu"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "out" / "params.json").exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "0 of 2 runs finished" in out
    assert "stopped (terminate)" in err
    assert "--resume" in err
    assert list((tmp_path / "out" / "checkpoints").glob("*.pt"))


def test_the_speed_ladder_measures_every_rung_once(tmp_path, capsys):
    from benchmarks.train_speed import main

    sizes = {"patch_size": 16, "batch_size": 4, "steps": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
    output = tmp_path / "speed.json"
    main(output=output, workers=0, device="cpu", time_budget=300, **sizes)
    first = output.read_text()
    rungs = json.loads(first)["rungs"]
    assert len(rungs) == 6
    assert all(rung["images_per_second"] > 0 for rung in rungs.values())
    main(output=output, workers=0, device="cpu", time_budget=300, **sizes)
    assert output.read_text() == first
    assert len(capsys.readouterr().out.splitlines()) == 6
