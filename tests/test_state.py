"""Folders that are read back as state: of a scan, of a comparison. What a stranger left in one is not believed."""

import io
import json
import os
import zipfile

import pytest

import attnlens
from attnlens.errors import AttnlensError
from attnlens.reports.training import read_training
from attnlens.scans.plan import plan_scan
from attnlens.scans.result_schema import check_result
from attnlens.scans.store import Store
from attnlens.scans.worker import Settings
from attnlens.state import check_folder, is_sealed_archive, read_state, sealed, sealed_archive, unsealed
from attnlens.training.store import stored_config
from tests.test_report import results_folder
from tests.test_scan import plant


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    plant(folder, 1, corrupt=False)
    return f"{folder}/*"


@pytest.fixture
def scanned(models, tmp_path):
    attnlens.scan(models, tmp_path / "s", workers=1, fold="raw")
    return tmp_path / "s"


LINKS = {
    "a table": lambda s, out: (s / "scan.csv").symlink_to(out / "there.txt"),
    "a table to nothing": lambda s, out: (s / "layers.csv").symlink_to(out / "new.txt"),
    "the figure": lambda s, out: (s / "landscape.png").symlink_to(out / "there.txt"),
    "the parts": lambda s, out: (s / "models").symlink_to(out),
    "a part": lambda s, out: ((s / "models").mkdir(), (s / "models" / "x.json").symlink_to(out / "there.txt")),
    "a circle": lambda s, _: ((s / "a").symlink_to("b"), (s / "b").symlink_to("a")),
    "a pipe": lambda s, _: os.mkfifo(s / "scan.csv"),
    "a pipe as a part": lambda s, _: ((s / "models").mkdir(), os.mkfifo(s / "models" / "x.json")),
    "a file as a folder": lambda s, _: (s / "models").touch(),
}


@pytest.mark.parametrize("kind", LINKS)
def test_nothing_outside_the_folder_of_a_scan_is_written(kind, models, tmp_path):
    state, outside = tmp_path / "s", tmp_path / "outside"
    state.mkdir()
    outside.mkdir()
    (outside / "there.txt").write_text("SECRET")
    LINKS[kind](state, outside)
    with pytest.raises(AttnlensError):
        attnlens.scan(models, state, workers=1)
    with pytest.raises(AttnlensError, match=r"refused|cannot be followed|a pipe|where a folder"):
        attnlens.scan(models, state, workers=1, force=True)
    assert [path.name for path in outside.iterdir()] == ["there.txt"]
    assert (outside / "there.txt").read_text() == "SECRET"


@pytest.mark.parametrize("name", ["results.jsonl", "config.json", ".lock", "curves.png"])
def test_a_comparison_refuses_links_before_it_looks_for_a_configuration(name, tmp_path):
    folder = tmp_path / "s"
    folder.mkdir()
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(AttnlensError, match="cannot be followed"):
        stored_config(folder)
    (tmp_path / "outside").touch()
    with pytest.raises(AttnlensError, match="is a link that leaves"):
        stored_config(folder)


def test_the_page_refuses_pipes_links_and_evaluations_of_another_run(tmp_path):
    train = results_folder(tmp_path / "made")
    content = (train / "results.jsonl").read_bytes()
    summary = json.loads((train / "summary.json").read_text())
    (train / "summary.json").write_text(json.dumps({**summary, "files": {"results.jsonl": "0" * 64}}))
    with pytest.raises(AttnlensError, match=r"is not what .* was made of"):
        read_training(train)
    (train / "results.jsonl").unlink()
    os.mkfifo(train / "results.jsonl")
    with pytest.raises(AttnlensError, match="a pipe or a device"):
        read_training(train)
    (train / "results.jsonl").unlink()
    (tmp_path / "far.jsonl").write_bytes(content)
    (train / "results.jsonl").symlink_to(tmp_path / "far.jsonl")
    with pytest.raises(AttnlensError, match="is a link that leaves"):
        read_training(train)


def _scaled(value):
    if isinstance(value, dict):
        return {name: _scaled(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_scaled(inner) for inner in value]
    return 1e6 if isinstance(value, int | float) and not isinstance(value, bool) else value


EDITS = {
    "numbers": _scaled,
    "no table": lambda data: {**data, "table": []},
    "a table of text": lambda data: {**data, "table": "rows"},
    "numbers as text": lambda data: {**data, "table": [[*row[:4], *map(str, row[4:])] for row in data["table"]]},
    "short rows": lambda data: {**data, "table": [row[:3] for row in data["table"]]},
    "a row twice": lambda data: {**data, "table": data["table"] * 2},
    "layers beyond the depth": lambda data: {**data, "depth": 1},
    "another status": lambda data: {**data, "status": "fine"},
    "no error": lambda data: {**data, "status": "failed"},
    "escapes": lambda data: {**data, "heads": "\x1b[2J"},
    "mathematics": lambda data: {**data, "architecture": "$\\frac$", "group": "$\\frac$"},
    "other folds": lambda data: {**data, "folds": ["effective"]},
    "huge counts": lambda data: {**data, "layers": 10**400},
    "a list": lambda data: [data],
    "depth": lambda data: {**data, "provenance": json.loads("[" * 60 + "]" * 60)},
}


@pytest.mark.parametrize("digest", ["stale", "made again"])
@pytest.mark.parametrize("kind", EDITS)
def test_a_result_that_was_edited_is_not_believed(kind, digest, models, scanned):
    (job,) = plan_scan([models]).jobs
    store = Store(scanned, Settings("raw"))
    assert store.load(job)["status"] == "ok"
    data = EDITS[kind](json.loads(store.result_file(job).read_text()))
    if digest == "made again" and isinstance(data, dict):
        data = sealed({name: value for name, value in data.items() if name != "sha256"})
    store.result_file(job).write_text(json.dumps(data))
    assert store.load(job) is None


def test_what_is_not_believed_is_measured_again(models, scanned):
    tables = {path: path.read_bytes() for path in scanned.glob("*.csv")}
    for suffix in ("csv", "json"):
        (file,) = (scanned / "models").glob(f"*.{suffix}")
        file.write_text(file.read_text().replace("0", "1"))
        assert attnlens.scan(models, scanned, workers=1, fold="raw").measured == 1
    assert attnlens.scan(models, scanned, workers=1, fold="raw").measured == 0
    assert {path: path.read_bytes() for path in scanned.glob("*.csv")} == tables


def test_the_text_of_a_failure_is_one_printable_line():
    identity = {"schema": "attnlens.scan", "schema_version": 1, "name": "a", "model": "a", "checkpoint": None}
    found = check_result({**identity, "stamp": None, "fold": "raw", "status": "failed", "error": "a\x1b[2J\nb"})
    assert found["error"] == r"a\x1b[2J b"


def test_a_digest_survives_writing_and_tells_every_edit():
    data = {"a": [1, 2.5, float("nan"), float("inf")], "b": {1: "x", 10: "y", 9: "z"}}
    written = json.loads(json.dumps(sealed(data)))
    assert unsealed(written)["b"] == {"1": "x", "10": "y", "9": "z"}
    for edited in ({**written, "c": 1}, {**written, "sha256": None}, {"a": 1}, []):
        with pytest.raises(ValueError, match=r"sha256|no JSON object"):
            unsealed(edited)


def test_state_is_a_plain_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no plain file"):
        read_state(tmp_path / "pipe")
    check_folder(tmp_path / "absent", AttnlensError)


def test_an_archive_is_sealed_as_a_whole(tmp_path):
    path, buffer = tmp_path / "a.zip", io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("name", b"content")
    path.write_bytes(buffer.getvalue())
    assert not is_sealed_archive(path)
    whole = b"".join(sealed_archive(buffer.getbuffer()))
    path.write_bytes(whole)
    assert is_sealed_archive(path)
    with zipfile.ZipFile(path) as archive:
        assert archive.read("name") == b"content"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if place in range(len(whole) - 71, len(whole) - 64):  # what says that a digest follows
            assert not is_sealed_archive(path)
        else:
            with pytest.raises(ValueError, match="it was changed after it was written"):
                is_sealed_archive(path)
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        assert not is_sealed_archive(path)
