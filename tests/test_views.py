"""A file that changes is noticed through every checkpoint that reads from it, also where links lead to another."""

import gzip
import hashlib
import inspect
import json
import os
import pkgutil
import tarfile
import zipfile
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import timm
import torch

import attnlens
from attnlens.checkpoints import base, open_checkpoint
from attnlens.checkpoints.adapters import _Beside
from attnlens.checkpoints.base import Checkpoint
from attnlens.checkpoints.computed import AppliedWeights, Plan
from attnlens.checkpoints.converted import ConvertedWeights, PrefixedWeights
from attnlens.checkpoints.networks import ChosenNetwork, choose_network
from attnlens.checkpoints.shards import ShardedFile
from attnlens.errors import CheckpointError
from attnlens.inspection import save_inspection
from attnlens.models.named import HeadsOf
from attnlens.models.renamed import RenamedWeights
from attnlens.models.row_order import ReorderedRows

CHANGED = "was replaced, cut or changed"
VIEWS = {
    ChosenNetwork: lambda file: choose_network(file, "a"),
    AppliedWeights: lambda file: AppliedWeights(Plan(file), "applied"),
    ConvertedWeights: lambda file: ConvertedWeights({"w": file["a.w"]}, file, "converted"),
    PrefixedWeights: lambda file: PrefixedWeights(file, "a."),
    HeadsOf: HeadsOf,
    RenamedWeights: lambda file: RenamedWeights(file, {"w": ("a.w", slice(None))}, "renamed"),
    ReorderedRows: lambda file: ReorderedRows(file, {}, "qkv"),
    _Beside: lambda file: _Beside(file, file, file),
}


def _kinds(cls: type) -> set[type]:
    return {cls}.union(*(_kinds(kind) for kind in cls.__subclasses__()))


def _takes_a_checkpoint(cls: type) -> bool:
    return any("Checkpoint" in str(given.annotation) for given in inspect.signature(cls).parameters.values())


def test_the_views_tried_are_all_there_are():
    for module in pkgutil.walk_packages(attnlens.__path__, "attnlens."):
        if module.name.startswith(("attnlens.checkpoints", "attnlens.models")):
            import_module(module.name)
    views = {kind for kind in _kinds(Checkpoint) if _takes_a_checkpoint(kind) and kind.__module__[:8] == "attnlens"}
    assert views - {AppliedWeights, ShardedFile} == {*VIEWS} - {AppliedWeights}  # a plan, and what opens, are theirs


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a.w": np.ones((3, 2), np.float32)}, path)
    return open_checkpoint(path)


@pytest.mark.parametrize("view", VIEWS.values(), ids=[kind.__name__ for kind in VIEWS])
def test_a_view_notices_that_its_file_was_written_over_and_has_its_size(file, view):
    seen = view(file)
    seen.check()
    assert seen.size() == file.path.stat().st_size * len(seen.behind)
    with file.path.open("r+b") as written:
        written.write(file.path.read_bytes())
    with pytest.raises(CheckpointError, match=CHANGED):
        seen.check()


def test_shards_notice_once_they_are_open(file):
    index = file.path.with_name("model.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"a.w": file.path.name}}))
    shards = ShardedFile(index, open_checkpoint)
    assert shards["a.w"].shape == (3, 2)
    shards.check()
    os.truncate(file.path, 10)
    with pytest.raises(CheckpointError, match=CHANGED):
        shards.check()


@pytest.mark.parametrize("change", ["written over", "cut"])
@pytest.mark.parametrize("prefix", ["", "module.", "visual.trunk."])
def test_nothing_is_drawn_or_written_of_a_nested_file_that_changed_after_it_was_measured(tmp_path, prefix, change):
    def saved(name, factor):
        torch.manual_seed(0)
        state = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
        torch.save({"state_dict": {prefix + key: value * factor for key, value in state.items()}}, tmp_path / name)
        return tmp_path / name

    path = saved("a.pth", 1)
    found = attnlens.inspect("vit_tiny_patch16_224", checkpoint=path, model_args={"depth": 1})
    if change == "cut":
        os.truncate(path, 1000)
    else:
        with path.open("r+b") as file:
            file.write(saved("b.pth", 100).read_bytes())
    with pytest.raises(CheckpointError, match=CHANGED):
        found.heads(0)
    with pytest.raises(CheckpointError, match=CHANGED):
        save_inspection(found, tmp_path / "out", "x")
    assert not [*tmp_path.glob("out/*.json")]


# A link above the file that leads to another folder while it is read, and back: no time of any file changes.


def _legacy(path, tensors):
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def _sharded(path, tensors):
    safetensors.torch.save_file(tensors, path.with_name("a.safetensors"))
    path.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))


def _zipped(path, tensors):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.safetensors", safetensors.torch.save(tensors))


def _tarred(path, tensors):
    safetensors.torch.save_file(tensors, path.with_name("a"))
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_name("a"), "a.safetensors")


WRITERS = {
    "a.safetensors": lambda path, tensors: safetensors.torch.save_file(tensors, path),
    "zip.pth": lambda path, tensors: torch.save(tensors, path),
    "legacy.pth": _legacy,
    "a.npz": lambda path, tensors: np.savez(path, **{name: value.numpy() for name, value in tensors.items()}),
    "a.safetensors.index.json": _sharded,
    "packed.zip": _zipped,
    "packed.tar": _tarred,
    "a.safetensors.gz": lambda path, tensors: path.write_bytes(gzip.compress(safetensors.torch.save(tensors))),
}
UNPACKED = ("packed.zip", "packed.tar", "a.safetensors.gz")


@pytest.fixture(params=WRITERS)
def linked(request, tmp_path):
    """Return a file below a link to folder A; the file of that name in folder B has other numbers."""
    for folder, number in (("A", 1.0), ("B", 5.0)):
        (tmp_path / folder).mkdir()
        WRITERS[request.param](tmp_path / folder / request.param, {"w": torch.full((3, 2), number), "v": torch.ones(4)})
    (tmp_path / "cur").symlink_to("A")
    return tmp_path / "cur" / request.param


def _lead(link, folder):
    link.with_name("new").symlink_to(folder)
    link.with_name("new").replace(link)


@contextmanager
def _flipping(link, *, after):
    """Let a link lead to A whenever a status is taken, and to B after each: of ``"stat"`` or of ``"open"``."""
    status, opening = Path.stat, Path.open

    def stat(path, **options):
        _lead(link, "A")
        found = status(path, **options)
        _lead(link, "B" if after == "stat" else "A")
        return found

    def opened(path, *arguments, **options):
        file = opening(path, *arguments, **options)
        _lead(link, "B")
        return file

    _lead(link, "B" if after == "stat" else "A")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "stat", stat)
        if after == "open":
            patch.setattr(Path, "open", opened)
        yield
    _lead(link, "A")


def _hashes(checkpoint):
    found = checkpoint.provenance()
    return [shard["sha256"] for shard in found.get("shards", [found])]


def test_a_file_behind_a_link_that_is_not_the_one_looked_at_is_refused_on_reading(linked):
    if linked.name in UNPACKED:
        pytest.skip("it is read when it is opened")
    opened = open_checkpoint(linked)
    opened.shape("w")  # opens the shard
    with _flipping(linked.parent, after="stat"):
        for read in (lambda: opened["w"], opened.provenance):
            with pytest.raises(CheckpointError, match=f"^{linked.parent}.* {CHANGED}"):
                read()
    assert opened["w"].max() == 1


def test_a_file_behind_a_link_that_is_not_the_one_looked_at_is_refused_on_opening(linked):
    with _flipping(linked.parent, after="stat"), pytest.raises(CheckpointError, match=f"^{linked.parent}.* {CHANGED}"):
        open_checkpoint(linked)["w"]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no path leads to an open file")
def test_numbers_and_hash_are_of_the_file_that_was_looked_at_whatever_its_name_leads_to(linked):
    opened = open_checkpoint(linked)  # of an index no shard is open yet
    with _flipping(linked.parent, after="open"):
        if not linked.name.endswith(".json"):
            opened = open_checkpoint(linked)
        assert {float(opened["w"].max()), float(opened["w"].min())} == {1.0}
        hashes = _hashes(opened)
    held = linked.with_name("a.safetensors") if linked.name.endswith(".json") else linked
    assert hashes == [hashlib.sha256(held.read_bytes()).hexdigest()]


def test_without_a_path_to_open_files_they_are_read_by_name(linked, monkeypatch):
    monkeypatch.setattr(base, "_paths_to_open_files", lambda: False)
    opened = open_checkpoint(linked)
    assert opened["w"].max() == 1
    with _flipping(linked.parent, after="stat"), pytest.raises(CheckpointError, match=CHANGED):
        open_checkpoint(linked)["w"]


def test_a_file_whose_bytes_are_fetched_one_after_the_other_stays_the_same_file(file):
    copy = file.path.with_name("b")
    copy.write_bytes(file.path.read_bytes())
    with file.path.open("r+b") as own:
        own.write(copy.read_bytes())
    file.written()
    assert file["a.w"].sum() == 6
    copy.replace(file.path)
    with pytest.raises(CheckpointError, match=CHANGED):
        file.written()


TIMM = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 32, "patch_size": 8, "depth": 1}}


@pytest.mark.parametrize("after", ["stat", "open"])
def test_what_is_converted_is_of_the_file_that_was_looked_at(tmp_path, after):
    from attnlens.checkpoints.converted import convert

    state = timm.create_model("vit_tiny_patch16_224", **TIMM["model_args"]).state_dict()
    for folder, number in (("A", 1.0), ("B", 5.0)):
        (tmp_path / folder).mkdir()
        numbers = {f"visual.trunk.{name}": torch.full_like(value, number) for name, value in state.items()}
        safetensors.torch.save_file(numbers, tmp_path / folder / "a.safetensors")
    (tmp_path / "cur").symlink_to("A")
    origin = open_checkpoint(tmp_path / "cur" / "a.safetensors")
    with _flipping(tmp_path / "cur", after=after):
        if after == "stat":
            with pytest.raises(CheckpointError, match=CHANGED):
                convert(TIMM["architecture"], TIMM["model_args"], origin, lambda _: None)
        else:
            found = convert(TIMM["architecture"], TIMM["model_args"], origin, lambda _: None)
            assert {float(found[name].max()) for name in found} == {1.0}


# What is open is closed again, and is called what its user calls it.


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files cannot be counted")
@pytest.mark.parametrize("name", WRITERS)
def test_reading_leaves_at_most_one_file_open_and_an_end_none(name, tmp_path):
    def count():
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    WRITERS[name](tmp_path / name, {f"{number}.w": torch.full((3, 2), number) for number in range(50)})
    before = count()
    opened = open_checkpoint(tmp_path / name)
    kept = {key: opened[key] for key in opened}
    opened.provenance()
    assert count() <= before + 1
    del opened, kept
    assert count() == before


@pytest.mark.parametrize("name", ["a.safetensors", "zip.pth", "legacy.pth", "a.npz"])
def test_one_file_too_many_is_told_by_its_name_and_the_limit(name, tmp_path):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    WRITERS[name](tmp_path / name, {"w": torch.ones(3, 2)})
    opened = open_checkpoint(tmp_path / name)
    first = os.open(tmp_path, os.O_RDONLY)
    os.close(first)
    told = []
    for room in (0, 1):
        for read in (lambda: open_checkpoint(tmp_path / name), lambda: opened["w"]):
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (first + room, hard))
                read()
            except CheckpointError as error:
                told.append(str(error))
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(told) >= 2
    assert {*told} == {f"cannot read {tmp_path / name}: Too many open files: raise the limit, `ulimit -n 65536`"}
