"""Whole comparisons: pairing, resuming bit for bit, clean stops, and every way a run can fail."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnlens import inspect
from attnlens.errors import OutputError, UsageError
from attnlens.state import sealed, unsealed
from attnlens.training import trainer as running
from attnlens.training.arms import default_contrasts
from attnlens.training.comparison import best_lrs, lr_table
from attnlens.training.config import TUNING_SEEDS, Run
from attnlens.training.engine import Stack
from attnlens.training.stop import Control
from attnlens.training.store import ResumeError
from attnlens.training.trainer import OutOfMemoryError, units_of
from tests.conftest import ROOT
from tests.training_setup import compare, config, small, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """Run a comparison without any interruption, weights kept."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    compare(source, folder, save_weights=True)
    return folder


def runs_of(folder):
    found = {}
    for path in (folder / "runs").glob("*.json"):
        records = json.loads(path.read_text())["records"]
        for record in records:
            for name in ("time", "train_seconds", "provenance", "models_in_stack"):
                record.pop(name)
        found[path.stem] = records
    return found


def assert_same_weights(first, second):
    """Compare every bit of every tensor; a file's header may list them in another order."""
    paths = sorted((first / "weights").iterdir())
    assert paths
    for path in paths:
        mine, theirs = load_file(path), load_file(second / "weights" / path.name)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_everything_that_was_promised_is_written(whole):
    names = {path.name for path in whole.iterdir()}
    assert {"config.json", "params.json", "results.jsonl", "summary.json", "summary.csv", "report.md"} <= names
    assert {"curves.png", "structure.png"} <= names
    assert not list((whole / "checkpoints").glob("*"))
    lines = [json.loads(line) for line in (whole / "results.jsonl").read_text().splitlines()]
    assert {line["run"] for line in lines} == {"default-0", "default-1", "mimetic-0", "mimetic-1"}
    assert all(line["provenance"]["versions"]["torch"] == torch.__version__.split("+")[0] for line in lines)
    assert (
        "no difference was shown" in (whole / "report.md").read_text()
        or "accurate" in (whole / "report.md").read_text()
    )


def test_arms_of_a_seed_see_the_same_stream_and_seeds_do_not(whole):
    streams = {
        name: [value for record in records for value in record["streams"]] for name, records in runs_of(whole).items()
    }
    assert streams["default-0"] == streams["mimetic-0"]
    assert streams["default-1"] == streams["mimetic-1"]
    assert len(set(streams["default-0"] + streams["default-1"])) == 6  # three epochs, two seeds, none alike


def test_saved_weights_can_be_inspected(whole):
    found = inspect(whole / "weights" / "mimetic-0.safetensors")
    last = runs_of(whole)["mimetic-0"][-1]["structure"]["effective"]
    columns = found.stats.columns
    rows = [dict(zip(columns, row, strict=True)) for row in found.stats.rows]
    beta = [r["beta"] for r in rows if (r["fold"], r["circuit"], r["head"]) == ("effective", "ov", "all")]
    assert last["ov_beta"] == pytest.approx(beta, rel=1e-4)


def test_init_and_data_seeds_are_separate(source, whole, tmp_path):
    moved = compare(source, tmp_path / "init", options=small(source, seeds=1, init_seed=5)).folder
    (data_moved,) = [compare(source, tmp_path / "data", options=small(source, seeds=1, data_seed=5)).folder]
    base, init, data = (runs_of(folder)["default-0"] for folder in (whole, moved, data_moved))
    assert [r["streams"] for r in base] == [r["streams"] for r in init]
    assert base[0]["structure"] != init[0]["structure"]
    assert base[0]["structure"] == data[0]["structure"]
    assert [r["streams"] for r in base] != [r["streams"] for r in data]


def stop_after(monkeypatch, steps):
    """Let `Control` ask for a stop once so many steps were taken, wherever that is."""
    taken = []
    step, original = Stack.step, Control.stopping

    def counted(self, *args):
        taken.append(1)
        return step(self, *args)

    def stopping(self):
        if len(taken) >= steps:
            self.stop("time budget")
        return original(self)

    monkeypatch.setattr(Stack, "step", counted)
    monkeypatch.setattr(Control, "stopping", stopping)


@pytest.mark.parametrize("stack", [1, 2, 3])
def test_resumed_runs_equal_uninterrupted_ones_bit_for_bit(source, tmp_path, stack):
    """Stopped in the middle of epochs again and again: records and final weights are the same numbers."""
    options = small(source, stack=stack)
    compare(source, tmp_path / "once", options=options, save_weights=True)
    folder, stops = tmp_path / "often", 0
    for attempt in range(20):
        with pytest.MonkeyPatch.context() as patch:
            stop_after(patch, 7)
            found = compare(source, folder, options=options, save_weights=True, resume=attempt > 0, workers=1)
        stops += found.stopped == "time budget"
        if found.findings.complete:
            break
    assert stops >= 2
    assert found.findings.complete
    assert runs_of(folder) == runs_of(tmp_path / "once")
    assert_same_weights(tmp_path / "once", folder)


def test_workers_change_no_bit(source, whole, tmp_path):
    compare(source, tmp_path / "one", save_weights=True, workers=1)
    compare(source, tmp_path / "three", save_weights=True, workers=3)
    assert runs_of(tmp_path / "one") == runs_of(tmp_path / "three") == runs_of(whole)
    assert_same_weights(tmp_path / "one", tmp_path / "three")


def test_stacked_runs_equal_separate_ones(source, whole, tmp_path):
    compare(source, tmp_path / "stacked", options=small(source, stack=4), workers=1)
    separate, stacked = runs_of(whole), runs_of(tmp_path / "stacked")
    for name, records in separate.items():
        for mine, theirs in zip(records, stacked[name], strict=True):
            assert mine["streams"] == theirs["streams"]
            assert mine["test_loss"] == pytest.approx(theirs["test_loss"], abs=1e-4)
            for fold, values in mine["structure"].items():
                for quantity, layers in values.items():
                    assert theirs["structure"][fold][quantity] == pytest.approx(layers, abs=2e-4)


def test_torchrun_spreads_runs_without_changing_them(source, whole, tmp_path):
    options = f"""
from tests.training_setup import *
from pathlib import Path
compare(Path({str(source)!r}), Path({str(tmp_path / "spread")!r}), workers=1, save_weights=True)
"""
    script = tmp_path / "spread.py"
    script.write_text(options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert runs_of(tmp_path / "spread") == runs_of(whole)
    assert_same_weights(whole, tmp_path / "spread")
    assert (tmp_path / "spread" / "report.md").exists()


def test_a_changed_configuration_is_refused_and_named(source, whole):
    with pytest.raises(UsageError, match=r"recipe.lr is 0.002, was 0.001\. Repeat the first command with resume=True"):
        compare(source, whole, options=small(source, lr=2e-3), resume=True)
    with pytest.raises(UsageError, match="seeds is 3, was 2"):
        compare(source, whole, options=small(source, seeds=3), resume=True)
    with pytest.raises(UsageError, match="holds a comparison already: add resume=True"):
        compare(source, whole)
    with pytest.raises(UsageError, match="holds no comparison"):
        compare(source, whole.parent / "empty", resume=True)


def test_another_source_is_a_changed_configuration(source, whole, tmp_path):
    path = tmp_path / "source.safetensors"
    tensors = load_file(source)
    tensors["blocks.0.attn.qkv.weight"][0, 0] += 1
    with safe_open(source, "pt") as file:
        save_file(tensors, path, file.metadata())
    with pytest.raises(UsageError, match="params_sha256"):
        compare(path, whole, options=small(path), resume=True)


def test_records_and_checkpoints_of_another_configuration_are_refused(source, tmp_path):
    folder = tmp_path / "out"
    compare(source, folder, options=small(source, seeds=1))
    path = folder / "runs" / "default-0.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "config": "0" * 64}))
    with pytest.raises(ResumeError, match="changed after it was written"):
        compare(source, folder, options=small(source, seeds=1), resume=True)
    path.write_text(json.dumps(sealed({**unsealed(data), "config": "0" * 64})))
    with pytest.raises(ResumeError, match="belongs to another configuration"):
        compare(source, folder, options=small(source, seeds=1), resume=True)
    path.unlink()
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "default-0.pt").write_bytes(b"half a file")
    with pytest.raises(ResumeError, match=r"default-0.pt cannot be read .*: delete it to train that run again"):
        compare(source, folder, options=small(source, seeds=1), resume=True)


def test_a_time_budget_stops_with_a_checkpoint(source, tmp_path):
    began = time.monotonic()
    found = compare(source, tmp_path / "out", options=small(source, epochs=400), time_budget=0.5, workers=1)
    assert found.stopped == "time budget"
    assert time.monotonic() - began < 30
    assert "Unfinished" in found.report


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "interrupt"), (signal.SIGTERM, "terminate")])
def test_signals_stop_between_steps_with_a_checkpoint(source, tmp_path, number, reason):
    folder = tmp_path / "out"
    before = signal.getsignal(number)

    def interrupt():
        while not (folder / "checkpoints").exists():  # a checkpoint after every epoch: training is on its way
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=interrupt, daemon=True)
    sender.start()
    found = compare(source, folder, options=small(source, epochs=300), checkpoint_seconds=0.0)
    assert found.stopped == reason
    assert list((folder / "checkpoints").glob("*.pt"))
    assert signal.getsignal(number) is before


def test_a_diverged_run_is_recorded_and_the_others_go_on(source, tmp_path, monkeypatch):
    original = running.initial_state

    def broken(arm, seed, shape, source):
        state = original(arm, seed, shape, source)
        if arm == "mimetic" and seed == 1:
            state["head.weight"] = state["head.weight"] * float("inf")
        return state

    monkeypatch.setattr(running, "initial_state", broken)
    for stack in (1, 4):
        found = compare(source, tmp_path / str(stack), options=small(source, stack=stack))
        assert found.findings.complete
        assert found.findings.diverged == (("mimetic", 1, 1),)
        assert set(found.findings.finished["default"]) == {0, 1}
        assert set(found.findings.finished["mimetic"]) == {0}
        assert "mimetic, seed 1, diverged in epoch 1" in found.report
        lines = [json.loads(line) for line in (tmp_path / str(stack) / "results.jsonl").read_text().splitlines()]
        assert [line["status"] for line in lines if line["run"] == "mimetic-1"][-1] == "diverged"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_out_of_memory_says_which_smaller_batch_to_try(source, tmp_path, monkeypatch, error):
    def step(*_args):
        raise error

    monkeypatch.setattr(Stack, "step", step)
    with pytest.raises(OutOfMemoryError, match=r"1 model of batch 40: try batch_size=20"):
        compare(source, tmp_path / "one")
    with pytest.raises(OutOfMemoryError, match=r"4 models of batch 40: try stack=2 \(same conditions\) or batch"):
        compare(source, tmp_path / "four", options=small(source, stack=4))


def test_other_errors_are_not_called_memory(source, tmp_path, monkeypatch):
    def step(*_args):
        raise RuntimeError("something else")

    monkeypatch.setattr(Stack, "step", step)
    with pytest.raises(RuntimeError, match="something else"):
        compare(source, tmp_path / "out")


def test_a_full_disk_loses_no_finished_run(source, tmp_path):
    """A real limit on the size of files: the kernel refuses the write as it does on a full disk."""
    folder, options = tmp_path / "out", small(source)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 12)
        compare(source, folder, options=options, workers=1)
    assert len(runs_of(folder)) >= 1
    before = {path.name: path.read_bytes() for path in (folder / "runs").iterdir()}
    kept = {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (110_000, hard))  # a checkpoint takes more, a run's records less
        with pytest.raises(OutputError, match=r"cannot write .*free some space"):
            compare(source, folder, options=options, workers=1, resume=True, checkpoint_seconds=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    after = {path.name: path.read_bytes() for path in (folder / "runs").iterdir()}
    assert before.items() <= after.items()
    assert not list(folder.rglob("*.part"))
    assert kept.items() <= {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()}.items()
    found = compare(source, folder, options=options, resume=True)
    compare(source, tmp_path / "once", options=options)
    assert found.findings.complete
    assert runs_of(folder) == runs_of(tmp_path / "once")


def test_learning_rates_are_chosen_on_the_tuning_split_with_seeds_of_their_own(source, tmp_path):
    options = small(source, tune_lr=[1e-5, 3e-3], tune_seeds=2, seeds=1, epochs=6)
    found = compare(source, tmp_path / "out", options=options)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    tuned, reported = ([line for line in lines if line["tuning"] is part] for part in (True, False))
    assert {line["data_seed"] for line in tuned} == {TUNING_SEEDS, TUNING_SEEDS + 1}
    assert {line["data_seed"] for line in reported} == {0}
    streams = [{value for line in part for value in line["streams"]} for part in (tuned, reported)]
    assert not streams[0] & streams[1]
    assert set(found.findings.lrs.values()) <= {1e-5, 3e-3}
    assert "## Learning rates, chosen on the tuning split" in found.report
    ends = [line for line in tuned if line["status"] == "finished"]
    for arm, lr in found.findings.lrs.items():
        means = {
            rate: np.mean([line["accuracy"] for line in ends if (line["arm"], line["lr"]) == (arm, rate)])
            for rate in (1e-5, 3e-3)
        }
        assert means[lr] == max(means.values())


def test_a_rate_that_diverges_is_never_chosen():
    settings = config(lr_grid=[1e-3, 1e-2], tune_seeds=1, arms=["default"], contrasts=[])
    runs = [Run("default", 0, lr, tuning=True) for lr in settings.lr_grid]
    done = {runs[0].name: [{"status": "finished", "accuracy": 0.2}], runs[1].name: [{"status": "diverged"}]}
    table = lr_table(settings, runs, done)
    assert table == {"default": {1e-3: 0.2}}
    assert best_lrs(table) == {"default": 1e-3}


def test_units_are_a_fixed_cut_seed_by_seed():
    runs = [Run(arm, seed, 1e-3) for arm in ("a", "b", "c") for seed in range(4)]
    units = units_of(runs, 6)
    assert [[(run.arm, run.seed) for run in unit] for unit in units] == [
        [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("c", 1)],
        [("a", 2), ("b", 2), ("c", 2), ("a", 3), ("b", 3), ("c", 3)],
    ]


def test_contrasts_are_declared_from_the_arms():
    assert default_contrasts(["default", "mimetic", "norm-matched"]) == [
        ("mimetic", "default"),
        ("norm-matched", "default"),
        ("mimetic", "norm-matched"),
    ]
    assert ("fitted", "norm-matched") in default_contrasts(["default", "fitted", "norm-matched"])
    assert default_contrasts(["mimetic"]) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "patch_size=3 does not divide the images of digits, 8 pixels wide"),
        ({"batch_size": 121}, "batch_size=121 is more than the 120 training images"),
        ({"contrasts": [("mimetic", "fitted")]}, "contrasts names fitted, which is not trained"),
        ({"contrasts": [("mimetic", "mimetic")]}, "compares an arm with itself"),
        ({"train_images": 1001}, "train_images=1001: the data set has 1000 such images"),
        ({"dataset": "imagenot"}, "dataset imagenot is no folder, no tar and no known name"),
        ({"device": "cuda"}, "torch finds no CUDA device"),
    ],
)
def test_usage_errors_say_what_to_change(source, tmp_path, changes, message):
    if changes == {"device": "cuda"} and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match=message):
        compare(source, tmp_path / "out", options=small(source, **changes))
    assert not (tmp_path / "out").exists()
