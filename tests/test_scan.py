"""Scans: patterns, one result a model, failures that stop nothing, kills and interrupts, the tables and the figure."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import attnlens
from attnlens.atomic import TEMPORARY
from attnlens.circuits import FOLDS
from attnlens.errors import ModelNotFoundError, OutputError, UsageError
from attnlens.models.catalogue import shipped_file
from attnlens.scans.executors import WorkerLostError
from attnlens.scans.landscape import draw_landscape
from attnlens.scans.local import LocalExecutor
from attnlens.scans.plan import Job, plan_scan
from attnlens.scans.run import ATTEMPTS, Run
from attnlens.scans.store import Store
from attnlens.scans.tables import GRID, curves, spread
from attnlens.scans.worker import Settings, measure
from benchmarks.trust.scale import CONFIG, write_model

ROOT = Path(__file__).parent.parent
SMALL = {
    **CONFIG,
    "hidden_size": 14,
    "intermediate_size": 5,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 7,
    "vocab_size": 3,
}


def plant(folder, models=4, corrupt=True):
    """Write small models and, in words, what is wrong with each broken one."""
    for number in range(models):
        write_model(folder / f"good{number}", {**SMALL, "num_hidden_layers": 2 + number % 3}, seed=number)
    if not corrupt:
        return {}
    shutil.copytree(folder / "good0", folder / "truncated")
    shard = next((folder / "truncated").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    shutil.copytree(folder / "good0", folder / "foreign")
    (folder / "foreign" / "config.json").write_text(json.dumps({"model_type": "nothing known"}))
    shutil.copytree(folder / "good0", folder / "unnamed")
    (folder / "unnamed" / "config.json").unlink()
    return {"truncated": "truncated", "foreign": "not known", "unnamed": "has no config.json"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    return folder, plant(folder)


@pytest.fixture(scope="module")
def scanned(planted, tmp_path_factory):
    output = tmp_path_factory.mktemp("scanned")
    return attnlens.scan(f"{planted[0]}/*", output, workers=2), output


@pytest.mark.parametrize("fold", FOLDS)
def test_a_result_of_every_fold_is_believed(planted, tmp_path, fold):
    job, settings = Job("good0", str(planted[0] / "good0")), Settings(fold)
    store = Store(tmp_path, settings)
    store.save(job, measure(asdict(job), asdict(settings), 1))
    found = store.load(job)
    assert found is not None
    assert found["folds"] == [fold]
    assert found["labels"] == []


def names(plan):
    return [job.name for job in plan.jobs]


def test_folders_files_and_lists_name_each_model_once(planted, monkeypatch):
    folder, _ = planted
    monkeypatch.chdir(folder)
    (folder.parent / "list.txt").write_text("good1  # again\n\n# nothing\ngood0/*.safetensors\n./good2\n")
    plan = plan_scan(["good*", f"@{folder.parent}/list.txt"])
    assert names(plan)[:4] == ["good0", "good1", "good2", "good3"]
    assert [Path(name).suffix for name in names(plan)[4:]] == [".safetensors"]  # asked for by itself
    assert len({job.key for job in plan.jobs}) == 5


def test_a_recursive_glob_takes_a_folder_with_its_files_as_one_model(planted):
    folder, _ = planted
    plan = plan_scan([f"{folder}/**"])
    assert {Path(name).name for name in names(plan)} == {path.name for path in folder.iterdir()}


def test_weights_that_do_not_say_what_they_are_of_are_given_with_the_architecture(tmp_path):
    for name in ("a.pth", "b.pth", "c.txt"):
        (tmp_path / name).touch()
    plan = plan_scan([f"vit_tiny_patch16_224={tmp_path}/*"])
    assert [(job.model, Path(job.checkpoint).name) for job in plan.jobs] == [
        ("vit_tiny_patch16_224", "a.pth"),
        ("vit_tiny_patch16_224", "b.pth"),
    ]


@pytest.mark.skipif(not shipped_file().is_file(), reason="no catalogue is shipped for the installed timm")
def test_patterns_match_pretrained_names_with_and_without_tags():
    found = names(plan_scan(["vit_*dinov2*", "deit_tiny_patch16_224", "vit_small_*.augreg_in1k"]))
    assert "vit_small_patch14_dinov2.lvd142m" in found
    assert "deit_tiny_patch16_224" in found
    assert "vit_small_patch16_224.augreg_in1k" in found
    assert all("dinov2" in name or name.startswith("deit_tiny") or name.endswith(".augreg_in1k") for name in found)
    assert len(found) == len(set(found))


@pytest.mark.parametrize("pattern", ["nothing_like_this*", "nothing_like_this", "vit=nothing/*.pth"])
def test_a_pattern_that_matches_nothing_stops_before_anything_is_measured(pattern, tmp_path):
    with pytest.raises(ModelNotFoundError):
        attnlens.scan([pattern], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_lists_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "a").write_text("@b\n")
    for pattern, text in ((f"@{tmp_path}/none", "cannot be read"), (f"@{tmp_path}/a", "another list")):
        with pytest.raises(UsageError, match=text):
            plan_scan([pattern])


def test_every_model_has_one_result_and_failures_are_those_planted(planted, scanned):
    folder, wrong = planted
    found, output = scanned
    assert {Path(name).name for name in found.results} == {path.name for path in folder.iterdir()}
    assert {Path(name).name for name in found.failed} == set(wrong)
    for name, error in found.failed.items():
        assert wrong[Path(name).name] in error
        assert "\n" not in error
    results = [json.loads(path.read_text()) for path in (output / "models").glob("*.json")]
    assert sorted(result["model"] for result in results) == sorted(str(path) for path in folder.iterdir())
    assert len(list((output / "models").glob("*.csv"))) == 4


def test_a_result_is_what_inspect_finds(planted, scanned):
    found, output = scanned
    name = str(planted[0] / "good1")
    expected = attnlens.inspect(name)
    file = next((output / "models").glob("*good1*.csv"))
    assert file.read_text() == expected.stats.to_csv()
    table = found.results[name]["table"]
    row = next(row for row in table if row[:4] == [1, 0.5, "ov", "effective"])
    total = expected.stats.select(layer=1, circuit="ov", fold="effective", head="all")
    np.testing.assert_allclose(
        row[4:7], [*total.column("alpha"), *total.column("beta"), *(total.column("beta") / total.column("alpha"))]
    )
    heads = expected.stats.select(layer=1, circuit="qk", fold="raw")
    row = next(row for row in table if row[0] == 1 and row[2:4] == ["qk", "raw"])
    np.testing.assert_allclose(row[6], (heads.column("beta") / heads.column("alpha")).mean())


def test_tables_hold_a_row_a_model_and_fold(scanned):
    found, output = scanned
    with (output / "scan.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 2 + 3
    for row in rows:
        assert (row["status"] == "ok") == bool(row["ov_beta"]) == (not row["error"])
    data = json.loads((output / "scan.json").read_text())
    assert (data["schema"], len(data["models"])) == ("attnlens.scan", 7)
    with (output / "layers.csv").open() as file:
        assert len(list(csv.DictReader(file))) == sum(len(result.get("table", ())) for result in found.results.values())


def test_a_scan_again_measures_only_what_is_missing_changed_or_asked_for(tmp_path):
    folder, output = tmp_path / "models", tmp_path / "out"
    folder.mkdir()
    plant(folder, 2)
    again = lambda **how: attnlens.scan(f"{folder}/*", output, workers=1, fold="raw", **how).measured  # noqa: E731
    assert again() == 5
    before = {path: path.stat().st_mtime_ns for path in (output / "models").iterdir()}
    (output / "models" / f".killed{TEMPORARY}").touch()
    assert again() == 0
    assert {path: path.stat().st_mtime_ns for path in (output / "models").iterdir()} == before
    result = next((output / "models").glob("*good0*.json"))
    result.write_bytes(result.read_bytes()[: result.stat().st_size // 2])  # half a file is no result
    assert again() == 1
    os.utime(next((folder / "good1").glob("*.safetensors")), ns=(1, 1))
    assert again() == 1
    assert again(retry_failed=True) == 3
    assert attnlens.scan(f"{folder}/good0", output, workers=1, fold="effective").measured == 1


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_files_of_others_among_the_results_are_left_and_told_before_anything_is_measured(suffix, planted, tmp_path):
    model = str(planted[0] / "good0")
    (job,) = plan_scan([model]).jobs
    place = Store(tmp_path, Settings()).result_file(job).with_suffix(suffix)
    place.parent.mkdir()
    place.write_text("notes")
    with pytest.raises(OutputError, match=r"was not written by attnlens, or was changed since: .* force=True"):
        attnlens.scan(model, tmp_path, workers=1, progress=pytest.fail)
    assert place.read_text() == "notes"
    assert attnlens.scan(model, tmp_path, workers=1, fold="raw", force=True).measured == 1
    assert attnlens.scan(model, tmp_path, workers=1).measured == 1, "of another fold, over its own"
    place.unlink()
    place.mkdir()
    with pytest.raises(OutputError, match="is a folder, where a file goes"):
        attnlens.scan(model, tmp_path, workers=1, force=True, progress=pytest.fail)


class Fragile:
    """An executor that loses the worker the first ``times`` it is given a job."""

    def __init__(self, times):
        self.times, self.begun = times, {}

    def capacity(self):
        return 2

    def submit(self, job, _settings):
        future = Future()
        self.begun[job.name] = self.begun.get(job.name, 0) + 1
        if self.begun[job.name] <= self.times:
            future.set_exception(WorkerLostError("its worker is gone"))
        else:
            future.set_result({"status": "ok"})
        return future


def test_a_lost_worker_costs_another_attempt_and_no_result_twice():
    jobs = [Job(name, name) for name in "abcde"]
    run = Run(Fragile(ATTEMPTS - 1), Settings())
    found = list(run.results(jobs))
    assert sorted(job.name for job, _ in found) == list("abcde")
    assert all(result["status"] == "ok" for _, result in found)
    assert run.lost == 5 * (ATTEMPTS - 1)


def test_a_model_that_takes_every_worker_down_is_given_up():
    (_, result), *rest = Run(Fragile(ATTEMPTS), Settings()).results([Job("a", "a")])
    assert not rest
    assert result == {"status": "failed", "error": f"given up after {ATTEMPTS} attempts: its worker is gone"}


def test_a_killed_worker_process_is_told_and_replaced(planted):
    executor = LocalExecutor(1)
    try:
        job = Job("good0", str(planted[0] / "good0"))
        assert executor.submit(job, Settings()).result()["status"] == "ok"
        (process,) = executor._all
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(WorkerLostError, match="SIGKILL"):
            executor.submit(job, Settings()).result()
        assert executor.submit(job, Settings()).result()["status"] == "ok"
        (process,) = executor._all
    finally:
        executor.close()
    assert process._process.poll() is not None


def start(folder, output):
    # A shell's background jobs are started deaf to SIGINT, and so are their children.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from attnlens.cli import main; main()"
    command = [sys.executable, "-c", code, "scan", f"{folder}/*", "-o", str(output), "--workers", "1"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_scan_that_is_stopped_keeps_what_it_has_and_goes_on(stop, tmp_path):
    folder, output = tmp_path / "models", tmp_path / "out"
    folder.mkdir()
    plant(folder, 12, corrupt=False)
    scan = start(folder, output)
    # One more than is asked for below: a result whose files get their names as the signal comes is taken back whole.
    wait_for(lambda: len(list(output.glob("models/[!.]*.json"))) >= 3)
    children = [pid for pid in Path("/proc").glob("[0-9]*") if _parent(pid) == scan.pid]
    scan.send_signal(stop)
    _, err = scan.communicate(timeout=60)
    assert scan.returncode == (-9 if stop == signal.SIGKILL else 130)
    assert "goes on from there" in err or stop == signal.SIGKILL
    assert children
    wait_for(lambda: not any(pid.exists() and "State:\tZ" not in (pid / "status").read_text() for pid in children))
    kept = {path: path.stat().st_mtime_ns for path in output.glob("models/[!.]*.json")}
    assert 2 <= len(kept) < 12
    for path in kept:
        assert json.loads(path.read_text())["status"] == "ok"
    found = attnlens.scan(f"{folder}/*", output, workers=1)
    assert found.measured == 12 - len(kept)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(list(output.glob("models/[!.]*.json"))) == len(found.results) == 12


def _parent(pid):
    try:
        return int((pid / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def test_the_command_prints_a_row_a_model_and_says_what_failed(run, planted, scanned, tmp_path):
    shutil.copytree(scanned[1], tmp_path / "out")
    code, out, err = run("scan", f"{planted[0]}/*", "-o", "out")
    assert code == 0
    assert out.count("good") == 4
    assert out.count("failed") == 3
    assert "7 models: 4 read, 3 failed, 7 of them done before" in err
    assert f"failed: {planted[0]}/foreign: " in err
    assert (tmp_path / "out" / "landscape.png").stat().st_size > 1000
    code, out, _ = run("scan", f"{planted[0]}/*", "-o", "out", "--json")
    assert out == (tmp_path / "out" / "scan.json").read_text()
    code, out, _ = run("scan", f"{planted[0]}/good*", "--list", "-o", "nothing")
    assert out.split() == [f"{planted[0]}/good{number}" for number in range(4)]
    assert not (tmp_path / "nothing").exists()


def test_untrusted_names_move_nothing_on_the_terminal(run, tmp_path):
    plant(tmp_path / "models", 1, corrupt=False)
    (folder,) = (path for path in (tmp_path / "models").iterdir() if path.is_dir())
    folder.rename(folder.with_name("evil\x1b[2Jname"))
    found = run("scan", f"{tmp_path}/models/*", "-o", str(tmp_path / "out"), "--workers", "1")
    assert "\x1b" not in found.out + found.err
    assert r"evil\x1b[2Jname" in "".join(found.out.split())


def test_a_scan_that_reads_nothing_fails(run, planted):
    code, _, err = run("scan", f"{planted[0]}/unnamed", "-o", "out", "--workers", "1")
    assert code == 1
    assert "the model could not be read" in err


def test_the_landscape_draws_a_line_a_model_and_the_median(scanned):
    found, _ = scanned
    figure = draw_landscape(found.results, "effective")
    drawn = curves(found.results, "ov", "effective")
    assert len(drawn) == 4
    lines = [lines for lines in figure.axes[1].collections if lines.get_gid() == "lines llama"]
    for segment, curve in zip(lines[0].get_segments(), drawn, strict=True):
        np.testing.assert_allclose(segment, np.stack([curve.depth, curve.value], -1))
    median = next(line for line in figure.axes[1].lines if line.get_gid() == "median")
    np.testing.assert_array_equal(median.get_xdata(), GRID)
    np.testing.assert_array_equal(median.get_ydata(), spread(drawn).median)
    assert "No model" in draw_landscape({}, "raw").texts[1].get_text()
