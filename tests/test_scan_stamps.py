"""Whose results a scan believes: those of the same files, all of them, measured in the same way."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from attnlens.scans.plan import Job, plan_scan, stamp
from attnlens.scans.store import Store
from attnlens.scans.worker import Settings, measure


def _write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    _write(folder / "config.json", {"model_type": "llama"})
    _write(folder / "model.safetensors.index.json", {"weight_map": {"a": "sub/one.safetensors"}})
    _write(folder / "sub" / "one.safetensors", "weights")
    return folder


@pytest.fixture
def adapter(tmp_path, base):
    folder = tmp_path / "adapter"
    _write(folder / "adapter_config.json", {"base_model_name_or_path": str(base), "lora_alpha": 2})
    _write(folder / "adapter_model.safetensors", "adapter")
    return folder


MODELS = {"folder": "base", "index": "base/model.safetensors.index.json", "adapter": "adapter"}
READ = {
    "folder": ("base/config.json", "base/model.safetensors.index.json", "base/sub/one.safetensors"),
    "index": ("base/config.json", "base/model.safetensors.index.json", "base/sub/one.safetensors"),
    "adapter": ("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "base/sub/one.safetensors"),
}


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize(("model", "file"), [(model, file) for model, files in READ.items() for file in files])
def test_every_file_that_a_model_is_read_from_is_in_its_stamp_whatever_its_time(tmp_path, model, file):
    before = stamp(tmp_path / MODELS[model])
    path = tmp_path / file
    status = path.stat()
    with path.open("r+b") as changed:
        changed.write(path.read_bytes().swapcase())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert stamp(tmp_path / MODELS[model]) != before


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("model", MODELS)
def test_what_is_not_read_is_not_in_the_stamp(tmp_path, model):
    before = stamp(tmp_path / MODELS[model])
    _write(tmp_path / "base" / "README.md", "words")
    _write(tmp_path / "adapter" / "training.log", "words")
    assert stamp(tmp_path / MODELS[model]) == before


def test_adapters_of_each_other_and_broken_indexes_have_a_stamp(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        _write(tmp_path / name / "adapter_config.json", {"base_model_name_or_path": str(tmp_path / other)})
    assert stamp(tmp_path / "a") != stamp(tmp_path / "b")
    for broken in ("{", {"weight_map": {"a": "/etc/passwd"}}, []):
        assert stamp(_write(tmp_path / "broken" / "x.index.json", broken))


@pytest.mark.parametrize("asked", [{"num_heads": 4}, {"row_order": "qkv"}, {"num_heads": 2, "fold": "raw"}])
def test_a_result_of_other_settings_is_not_believed(tmp_path, asked):
    job, plain = Job("a", str(tmp_path / "a")), Settings()
    failed = measure(asdict(job), asdict(plain), 1)
    for saved, loaded in ((plain, replace(plain, **asked)), (replace(plain, **asked), plain)):
        store = Store(tmp_path / "out", saved)
        store.save(job, failed)
        assert store.load(job) is not None
        assert Store(tmp_path / "out", loaded).load(job) is None


def test_a_list_may_begin_with_a_mark_of_its_encoding_and_a_name_may_hold_a_hash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("run#1", "run", "b"):
        _write(tmp_path / name / "model.safetensors", "")
    _write(tmp_path / "list", "\ufeffb\nrun#1/*.safetensors # the first\n\t# nothing\n")
    assert [job.name for job in plan_scan(["@list"]).jobs] == ["b", "run#1/model.safetensors"]
