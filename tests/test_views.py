"""Checkpoints that read from others: a file that changes is noticed through every one of them, and end to end."""

import inspect
import json
import os
import pkgutil
from importlib import import_module

import numpy as np
import pytest
import safetensors.numpy
import timm
import torch

import attnlens
from attnlens.checkpoints import open_checkpoint
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
