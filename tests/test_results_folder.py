"""The folder of a comparison that somebody changed: what is read back is what was measured, or is refused by name."""

import csv
import errno
import hashlib
import json
import os
import pathlib
import shutil

import pytest

import attnlens
from attnlens.errors import AttnlensError, OutputError, UsageError
from attnlens.outputs import Outputs
from attnlens.reports import training as pages
from attnlens.reports.training import ResultsError, Summary, read_training
from attnlens.state import SEALED_FROM, check_listed, manifest_of, sealed, unsealed
from attnlens.training import comparison
from attnlens.training.comparison import named_outputs
from attnlens.training.config import Config
from attnlens.training.loggers import CsvLogger, TensorBoardLogger
from attnlens.training.store import Store
from tests.training_setup import compare, config, small, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def ended(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ended") / "c"
    compare(source, folder, options=small(source, seeds=1, epochs=1))
    return folder


@pytest.fixture
def folder(ended, tmp_path):
    return shutil.copytree(ended, tmp_path / "c")


@pytest.fixture
def again(source, folder):
    """Go on with the comparison of the folder."""

    def resume(**changes):
        given = {"seeds": 1, "epochs": 1, **changes}
        how = {name: given.pop(name) for name in ("log", "save_weights", "force", "table", "quiet") if name in given}
        return compare(source, folder, options=small(source, **given), resume=True, **how)

    return resume


def edited_lines(path, change):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(line)) + "\n" for line in lines))


def refused(call, message, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(AttnlensError, match=message):
        call()
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


@pytest.mark.parametrize("change", [{"accuracy": 0.999}, {"accuracy": 1e6}, {"lr": 0.5}, {"train_seconds": "5"}])
def test_results_that_were_edited_are_no_runs(change, folder, again):
    shutil.rmtree(folder / "runs")
    edited_lines(folder / "results.jsonl", lambda line: {**line, **change})
    refused(again, r"results\.jsonl cannot be read \(it is not what summary\.json was made of\)", folder)


@pytest.mark.parametrize(("step", "number"), [("fsync", 1), ("fsync", 2), ("rename", 1), ("replace", 2)])
def test_runs_are_restored_all_or_none(step, number, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in (folder / "runs").iterdir()}
    shutil.rmtree(folder / "runs")
    stored = json.loads((folder / "config.json").read_text())
    store = Store(folder, Config(**{name: value for name, value in stored.items() if name != "sha256"}))
    taken, owner = [], os if step == "fsync" else pathlib.Path
    real = getattr(owner, step)

    def failing(*given):
        taken.append(1)
        if len(taken) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, failing)
        with pytest.raises(OutputError, match="No space left"):
            store.restore_runs()
    assert not (folder / "runs").exists()
    (folder / ".runs").mkdir(exist_ok=True)
    (folder / ".runs" / "x.json").write_text("of a process that was killed")
    store.restore_runs()
    assert {path.name: path.read_bytes() for path in (folder / "runs").iterdir()} == before
    assert len(before) == 2
    assert not (folder / ".runs").exists()


def test_results_that_were_left_alone_are_runs(folder, again):
    before = (folder / "summary.csv").read_bytes()
    shutil.rmtree(folder / "runs")
    assert again().findings.complete
    assert (folder / "summary.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("summary.json", {"files": {}}, "it was changed after it was written"),
        ("summary.json", {"arms": {}}, "it was changed after it was written"),
        ("summary.json", {"schema_version": 3}, "it was changed after it was written"),
        ("config.json", {"seeds": 50}, r"seeds is 1, was 50"),
        ("config.json", {"data_sha256": "0" * 64}, r"data_sha256 is .*, was '0000"),
    ],
)
def test_a_file_that_says_of_itself_what_it_is_not_is_refused(name, change, message, folder, again):
    shutil.rmtree(folder / "runs")
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(again, message, folder)


def test_a_page_beside_a_comparison_at_work_is_of_one_set(folder, monkeypatch):
    first = {name: (folder / name).read_bytes() for name in ("results.jsonl", "summary.json")}
    lines = first["results.jsonl"].splitlines(keepends=True)
    old = b"".join(lines[:2])
    data = {**unsealed(json.loads(first["summary.json"])), "complete": False}
    data["files"] = {**data["files"], "results.jsonl": hashlib.sha256(old).hexdigest()}
    read, taken = pages.read_state, []

    def replaced(path):
        content = read(path)
        if not taken:
            for name, one in first.items():
                (folder / name).write_bytes(one)
        taken.append(path)
        return content

    (folder / "results.jsonl").write_bytes(old)
    (folder / "summary.json").write_text(json.dumps(sealed(data)))
    assert not read_training(folder).summary.complete
    monkeypatch.setattr(pages, "read_state", replaced)
    found = read_training(folder)
    assert found.summary.complete
    assert len(found.points) == len(lines) > 2
    assert len(taken) == 4


@pytest.mark.parametrize("accuracy", [7.5, -0.1])
def test_a_page_shows_no_accuracy_that_is_none(accuracy, folder):
    edited_lines(folder / "results.jsonl", lambda line: {**line, "accuracy": accuracy})
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").unlink()
    with pytest.raises(ResultsError, match=r"line 1 of .*: accuracy: Input should be (less|greater) than or equal to"):
        read_training(folder)
    summary["arms"]["default"]["accuracy"]["mean"] = accuracy
    with pytest.raises(ValueError, match=r"arms\.default\.accuracy\.mean"):
        Summary.model_validate(summary)


def test_the_page_believes_no_edited_summary(folder):
    path = folder / "summary.json"
    assert read_training(folder).summary.arms["default"].value.n == 1
    data = json.loads(path.read_text())
    for edited in ({**data, "complete": False}, {**data, "files": {}}, {**data, "sha256": "0" * 64}):
        path.write_text(json.dumps(edited))
        with pytest.raises(ResultsError, match="it was changed after it was written"):
            read_training(folder)
    without = {name: value for name, value in data.items() if name != "sha256"}
    path.write_text(json.dumps(without))
    with pytest.raises(ResultsError, match="it was changed after it was written"):
        read_training(folder)


def test_a_manifest_of_an_older_version_has_no_digest(tmp_path):
    path = tmp_path / "summary.json"
    for told in ({}, {"schema_version": SEALED_FROM - 1}):
        path.write_text(json.dumps(told))
        check_listed(path, path.read_bytes(), "a", b"anything")
        path.write_text(json.dumps({**told, "files": {"a": "0" * 64}}))
        with pytest.raises(ValueError, match=r"not what summary\.json was made of"):
            check_listed(path, path.read_bytes(), "a", b"anything")
    path.write_text(json.dumps(sealed({"schema_version": SEALED_FROM})))
    assert manifest_of(path.read_bytes()) == {"schema_version": SEALED_FROM}
    for odd in ("[]", '{"files": []}', '{"files": {"a": 1}}', '{"schema_version": []}', "{"):
        path.write_text(odd)
        with pytest.raises(ValueError, match=r"summary\.json"):
            check_listed(path, path.read_bytes(), "a", b"anything")


def test_the_file_of_one_run_under_the_name_of_another_is_refused(folder, again):
    shutil.copy(folder / "runs" / "default-0.json", folder / "runs" / "mimetic-0.json")
    refused(again, r"mimetic-0\.json holds the records of default-0", folder)


def test_a_run_that_has_not_ended_is_no_file_of_its_own(folder, again):
    path = folder / "runs" / "default-0.json"
    data = unsealed(json.loads(path.read_text()))
    path.write_text(json.dumps(sealed({**data, "records": data["records"][:1]})))
    refused(again, r"default-0\.json holds a run that has not ended: delete it to train that run again", folder)


@pytest.mark.parametrize("name", ["summary.json", "results.jsonl", "log.csv", "structure.jsonl", "runs/x.json"])
def test_a_pipe_stops_nothing_but_the_command(name, folder, again):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    (folder / "report.md").write_text("mine")
    with pytest.raises(AttnlensError, match="a pipe or a device"):
        again(log=["csv"])


@pytest.mark.parametrize("name", ["summary.csv", "log.csv", "tensorboard", "tensorboard/mimetic-0", "wandb"])
def test_a_link_out_is_refused_before_what_it_leads_to_is_read(name, folder, again, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (folder / name).unlink(missing_ok=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(outside)
    for force in (False, True):
        with pytest.raises(AttnlensError, match="is a link that leaves"):
            again(force=force, log=["csv"])
    assert not list(outside.iterdir())


@pytest.mark.parametrize(
    "table",
    ["summary.csv", "log.csv", "runs/x.csv", "weights/x", "checkpoints/deep/x.csv", ".lock", "../linked.csv", "runs"],
)
def test_a_table_is_no_file_of_the_comparison(table, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "load_data", None)  # refused before anything is read
    (tmp_path / "linked.csv").symlink_to("o/summary.csv")
    for output in (tmp_path / "o", tmp_path / "o" / ".." / "o"):
        with pytest.raises(UsageError, match=r"is a place of the comparison's own files in .*: name another file"):
            compare(None, output, table=output / table)
    assert list(tmp_path.iterdir()) == [tmp_path / "linked.csv"]
    assert named_outputs(Outputs(), tmp_path, [], tmp_path / "mine.csv") == tmp_path / "mine.csv"


def test_of_runs_that_ended_before_weights_were_asked_for_it_is_said(folder, again, capfd):
    told = "no weights are kept of default-0, mimetic-0, which ended without --save-weights"
    assert again(save_weights=True, quiet=False).findings.complete
    assert capfd.readouterr().err.count(told) == 1
    (folder / "runs" / "default-0.json").unlink()
    again(save_weights=True, quiet=False)
    assert "kept of mimetic-0, which" in capfd.readouterr().err
    assert [path.name for path in (folder / "weights").iterdir()] == ["default-0.safetensors"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "name", ["structure.jsonl", "report.md", "summary.csv", "log.csv", "weights/default-0.safetensors"]
)
def test_what_others_wrote_stays(name, folder, again):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("my own notes\n")
    refused(lambda: again(log=["csv"], save_weights=True), "was not written by attnlens", folder)


@pytest.mark.parametrize("name", ["structure.jsonl", "log.csv", "weights/default-0.safetensors", "curves.png"])
def test_a_folder_where_a_file_goes_is_named_with_what_to_do(name, folder, again):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir(parents=True)
    refused(
        lambda: again(log=["csv"], save_weights=True), f"{name} is a folder, where a file goes: take it away", folder
    )


def test_own_files_are_replaced(source, tmp_path):
    given = small(source, seeds=1, epochs=1)
    compare(source, tmp_path / "d", options=given, log=["csv"], save_weights=True)
    for path in (tmp_path / "d" / "runs").iterdir():
        path.unlink()
    compare(source, tmp_path / "d", options=given, log=["csv"], save_weights=True, resume=True)
    assert (tmp_path / "d" / "weights" / "default-0.safetensors").is_file()


def test_a_log_is_gone_on_with_in_a_file_of_its_own(source, tmp_path):
    given, folder = small(source, seeds=1, epochs=1), tmp_path / "d"
    compare(source, folder, options=given, log=["csv"])
    log, other = folder / "log.csv", tmp_path / "other"
    whole = log.read_bytes()
    head, first, *_ = whole.decode().splitlines()
    log.write_text(f"{head}\n{first}\ndefault-0,1,0.5")  # the rest was cut off by a kill
    os.link(log, other)
    (folder / "runs" / "default-0.json").unlink()
    (folder / "runs" / "mimetic-0.json").unlink()
    compare(source, folder, options=given, log=["csv"], resume=True)
    rows = list(csv.reader(log.read_text().splitlines()))
    assert sorted(row[:2] for row in rows[1:]) == [
        ["default-0", "0"],
        ["default-0", "1"],
        ["mimetic-0", "0"],
        ["mimetic-0", "1"],
    ]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert other.read_text().endswith("default-0,1,0.5")


ROWS = {
    "a digit of another kind": "x,\u00b2,1,1,1,1,1,1,1",
    "too few": "x,1",
    "a long number": "x," + "9" * 5000 + ",1,1,1,1,1,1,1",
    "a formula": "=cmd(),1,1,1,1,1,1,1,1",
    "a long field": "x,1," + "9" * 200_000,
    "an open quote": '"x,1',
    "a formula for a number": "x,1,\"=cmd|'/C calc'!A0\",,,,,,",
    "a negative formula": "x,1,-1+1,,,,,,",
    "an escape": "x,1,\x1b[31mred,,,,,,",
    "another formula": "x,1,@SUM(1),,,,,,",
    "a number of Python's": "x,1,1_0,,,,,,",
    "a name that is computed": "-x,1,1,,,,,,",
}


def logger(folder):
    return CsvLogger(folder, config())


def test_a_log_holds_numbers_alone_before_and_after_it_is_gone_on_with(tmp_path):
    first = {"train_loss": 2.3, "test_loss": -1e-05, "qk_alpha": float("nan"), "ov_beta": -0.00012345678901234567}
    begun = logger(tmp_path)
    begun.write("default-0", 1, first)
    begun.close()
    text = (tmp_path / "log.csv").read_text()
    assert text == ",".join(begun.columns) + "\ndefault-0,1,2.3,-1e-05,,,,,-0.00012345678901234567\n"
    (tmp_path / "log.csv").write_text(text.replace("\n", "\r\n"))  # as older versions wrote it
    logger(tmp_path).close()
    assert (tmp_path / "log.csv").read_text() == text


def test_a_log_on_a_full_disk_says_which_file_was_not_written(tmp_path):
    begun = logger(tmp_path)
    begun.file.close()
    begun.file = open("/dev/full", "a")  # noqa: PTH123, SIM115  # closed below
    for act in (lambda: begun.write("default-0", 1, {}), begun.close):
        with pytest.raises(OutputError, match=r"cannot write .*log\.csv: No space left on device"):
            act()


def test_so_says_tensorboard(tmp_path, monkeypatch):
    begun = TensorBoardLogger(tmp_path, config())
    begun.write("default-0", 1, {"train_loss": 1.0})

    def full(_writer):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(begun.writers["default-0"]), "flush", full)
        with pytest.raises(OutputError, match=r"cannot write .*tensorboard/default-0: No space left on device"):
            begun.write("default-0", 2, {"train_loss": 1.0})
    begun.close()


@pytest.mark.parametrize("kind", ROWS)
def test_a_log_of_rows_that_are_none_is_named(kind, source, tmp_path):
    given, folder = small(source, seeds=1, epochs=1), tmp_path / "d"
    compare(source, folder, options=given, log=["csv"])
    with (folder / "log.csv").open("a", encoding="utf-8") as file:
        file.write(ROWS[kind] + "\n")
    with pytest.raises(AttnlensError, match=r"log\.csv (has other columns, or rows that|cannot be gone on with)"):
        compare(source, folder, options=given, log=["csv"], resume=True)


def test_a_text_that_is_trained_on_is_no_output(tmp_path):
    text = "layer,head,circuit,fold,alpha\n" + "0,1,2,3,4\n" * 4000
    (tmp_path / "my.csv").write_text(text)
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "report.md").write_text("\n## What the intervals allow to say\n" + text)
    given = {"model": "gpt-tiny", "seeds": 1, "epochs": 1, "arms": "default", "quiet": True, "force": True}
    with pytest.raises(AttnlensError, match=r"my\.csv is what this command reads"):
        attnlens.train_compare(
            dataset=f"text:{tmp_path}/my.*", table=tmp_path / "my.csv", output=tmp_path / "p", **given
        )
    for dataset in (f"text:{tmp_path}/o", f"text:{tmp_path}/o/*.md"):
        with pytest.raises(AttnlensError, match=r"report\.md is what this command reads"):
            attnlens.train_compare(dataset=dataset, output=tmp_path / "o", **given)
    assert (tmp_path / "my.csv").read_text() == text


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("params.json", ()),
        ("opts.csv", ("--table", "opts.csv")),
        ("opts.csv", ("--table", "l.csv")),
        ("log.csv", ("--log", "csv")),
    ],
)
def test_the_options_that_are_read_are_no_output(name, more, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l.csv").symlink_to("opts.csv")
    (tmp_path / name).write_text(json.dumps({"seeds": 1, "epochs": 1}))
    done = run("train-compare", "--config", f"{tmp_path}/{name}", "-o", tmp_path, "--force", *more)
    assert done.code != 0
    assert "is what this command reads" in done.err
    assert json.loads((tmp_path / name).read_text()) == {"seeds": 1, "epochs": 1}
