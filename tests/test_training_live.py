"""What is on disk and on stderr while a comparison is under way: result files, logs, notes, a stop in set-up."""

import csv
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from attnlens.errors import OutputError, UsageError
from attnlens.training import comparison
from attnlens.training.config import Run
from attnlens.training.display import Notes
from attnlens.training.live import Journal
from attnlens.training.loggers import check_loggers
from attnlens.training.stop import Control
from tests.conftest import ROOT
from tests.training_setup import compare, small, write_source

UNIT = (Run("default", 0, 1e-3),)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


def test_records_are_written_when_they_are_measured_and_not_when_an_epoch_says_nothing_new():
    written, called = [], threading.Event()

    def write(records, figures):
        written.append((dict(records), figures))
        called.set()

    with Journal(write, {"old-0": [{"epoch": 3}]}, Control()) as journal:
        journal.listen(UNIT, {"epoch": 1, "losses": [1.0]})
        journal.listen(UNIT, {"measured": [[{"epoch": 1}]]})
        assert called.wait(10)
    assert written == [({"old-0": [{"epoch": 3}], "default-0": [{"epoch": 1}]}, False)]


def test_a_disk_that_is_full_stops_the_training_and_is_told_of():
    def write(_records, _figures):
        raise OutputError("cannot write out: No space left on device")

    control = Control()
    journal = Journal(write, {}, control)
    with pytest.raises(OutputError, match="No space left"), journal:  # noqa: PT012  # it is raised at its end
        journal.listen(UNIT, {"measured": [[{"epoch": 1}]]})
        journal._thread.join(10)
        assert control.reason == "failure"


def test_result_files_hold_runs_that_are_under_way(source, tmp_path, monkeypatch):
    states, original = [], comparison._Findings.write
    output = tmp_path / "out"

    def write(self, **how):
        original(self, **how)
        lines = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
        summary = json.loads((output / "summary.json").read_text())
        states.append(({line["status"] for line in lines}, summary["complete"]))

    monkeypatch.setattr(comparison._Findings, "write", write)
    compare(None, output, options=small(source, seeds=1, arms=("default",)))
    assert ({"running"}, False) in states
    assert states[-1] == ({"running", "finished"}, True)
    assert not any(complete for _, complete in states[:-1]), "only the last set is complete, with its figures"


def rows_of(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def results_of(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def logged(source, tmp_path_factory):
    """Run a comparison that evaluates every second epoch and logs to a CSV file."""
    folder = tmp_path_factory.mktemp("logged") / "out"
    compare(None, folder, options=small(source, epochs=4, eval_every=2, seeds=1), log=["csv"])
    return folder


def test_the_csv_log_has_a_row_an_epoch_with_what_was_measured(logged):
    rows = rows_of(logged)
    assert sorted((row["run"], int(row["epoch"])) for row in rows) == [
        (run, epoch) for run in ("default-0", "mimetic-0") for epoch in range(5)
    ]
    by_key = {(row["run"], int(row["epoch"])): row for row in rows}
    results = results_of(logged)
    assert len(results) == 6
    for line in results:
        row = by_key[line["run"], line["epoch"]]
        assert float(row["accuracy"]) == line["accuracy"]
        assert float(row["test_loss"]) == line["test_loss"]
        betas = line["structure"]["effective"]["ov_beta"]
        assert float(row["ov_beta"]) == pytest.approx(sum(betas) / len(betas))
        if line["epoch"]:
            assert float(row["train_loss"]) == line["train_loss"]
    assert all(row["accuracy"] == "" and row["train_loss"] for row in rows if row["epoch"] in "13")


def test_a_resumed_comparison_goes_on_in_its_log(source, logged, tmp_path):
    options = small(source, epochs=4, eval_every=2, seeds=1)
    first = compare(None, tmp_path / "out", options=options, log=["csv"], time_budget=0.0)
    assert first.stopped == "time budget"
    compare(None, tmp_path / "out", options=options, log=["csv"], resume=True)
    assert sorted(map(str, rows_of(tmp_path / "out"))) == sorted(map(str, rows_of(logged)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tensorboard_is_told_the_same_numbers(source, tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    compare(None, tmp_path / "out", options=small(source, seeds=1, arms=("default",)), log=["tensorboard", "csv"])
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard" / "default-0"))
    events.Reload()
    for name in ("accuracy", "test_loss", "train_loss", "ov_beta"):
        told = {event.step: event.value for event in events.Scalars(name)}
        rows = {int(row["epoch"]): float(row[name]) for row in rows_of(tmp_path / "out") if row[name]}
        assert told == pytest.approx(rows, rel=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_wandb_keeps_a_run_each_offline(source, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the package wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    compare(None, tmp_path / "out", options=small(source, seeds=1), log=["wandb"])
    assert len(list((tmp_path / "out" / "wandb").glob("offline-run-*"))) == 2


def test_logs_that_cannot_be_written_are_refused_before_anything_is_read(monkeypatch):
    with pytest.raises(UsageError, match="log mlflow is not known: choose csv, tensorboard, wandb"):
        check_loggers(["mlflow"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "wandb" else name)
    check_loggers(["csv", "tensorboard"])
    with pytest.raises(UsageError, match=r"log wandb needs the package wandb: pip install 'attnlens\[wandb\]', or"):
        check_loggers(["csv", "wandb"])


def test_notes_come_at_once_and_then_every_few_seconds(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr("attnlens.training.display.time.monotonic", lambda: clock[0])
    say = Notes(shown=True)
    for after, text in ((0, "reading pets"), (0, "pets: 256 images decoded"), (1, "pets: 512 images decoded")):
        clock[0] += after
        say(text)
    clock[0] += 6
    say("pets: 1,024 images decoded")
    say("building")
    assert capsys.readouterr().err.splitlines() == [
        "reading pets",
        "pets: 256 images decoded",
        "pets: 1,024 images decoded",
        "building",
    ]
    Notes(shown=False)("nothing")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("after", ["loading", "reading digits", "building every arm once"])
def test_ctrl_c_in_set_up_ends_in_one_line_with_130(tmp_path, after):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "attnlens", "train-compare", "--output", "out", "--device", "cpu"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # of a test run in the background, and inherited
    started = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
    signal.signal(signal.SIGINT, ignored)
    with started as process:
        for line in process.stderr:
            if line.startswith(after):
                process.send_signal(signal.SIGINT)
                break
        told, printed = list(process.stderr), process.stdout.read()
    assert process.returncode == 130, told
    assert printed == ""
    assert told[-1].startswith("attnlens: interrupted: ")
    assert not [line for line in told if "Traceback" in line or "Error" in line]
