"""Checkpoints of a comparison have a digest, and are of a run on its way."""

import json
import shutil

import pytest
import torch

from attnlens.training.config import Config
from attnlens.training.record_schema import ResumeError, restorable
from attnlens.training.trainer import _Training
from tests.training_setup import compare, small, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def under_way(source, tmp_path_factory):
    """Return a folder whose first run has a checkpoint after the first of two epochs, and what it leads to."""
    folder, given = tmp_path_factory.mktemp("way"), small(source, seeds=1, epochs=2, eval_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Training, "_finish", _interrupted)
        with pytest.raises(InterruptedError):
            compare(source, folder / "c", options=given, workers=1, checkpoint_seconds=0.0)
    compare(source, folder / "whole", options=given, workers=1)
    return folder


def _interrupted(_training):
    raise InterruptedError


@pytest.fixture
def checkpoint(under_way, tmp_path):
    return shutil.copytree(under_way / "c", tmp_path / "c") / "checkpoints" / "default-0.pt"


def other_accuracy(state):
    records = json.loads(state["records"])
    records[0][0]["accuracy"] = 0.999
    return {**state, "records": json.dumps(records)}


def two_more(state):
    return {**state, "epoch": 2}


def test_a_checkpoint_has_its_digest_and_torch_opens_it(checkpoint, source, under_way):
    assert torch.load(checkpoint, weights_only=True)["epoch"] == 1
    compare(source, checkpoint.parents[1], options=small(source, seeds=1, epochs=2, eval_every=1), resume=True)
    expected = (under_way / "whole" / "summary.csv").read_bytes()
    assert (checkpoint.parents[1] / "summary.csv").read_bytes() == expected


def refused_to_go_on(path, source, message):
    with pytest.raises(ResumeError, match=f"{message}.*: delete it to train that run again"):
        compare(source, path.parents[1], options=small(source, seeds=1, epochs=2, eval_every=1), resume=True, workers=1)


def test_a_checkpoint_of_which_a_bit_was_flipped_is_refused(checkpoint, source):
    content = bytearray(checkpoint.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 800, 4):
        content[place] ^= 0x40
    checkpoint.write_bytes(content)
    refused_to_go_on(checkpoint, source, r"default-0\.pt cannot be read \(it was changed after it was written")


@pytest.mark.parametrize("change", [other_accuracy, two_more])
def test_a_checkpoint_that_was_edited_is_refused(change, checkpoint, source):
    torch.save(change(torch.load(checkpoint, weights_only=True)), checkpoint)
    refused_to_go_on(checkpoint, source, r"default-0\.pt was changed after it was written, its sha256 is missing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"epoch": 2}, "stands at epoch 2 of 2 and step 0 of 3"),
        ({"step": 3}, "stands at epoch 1 of 2 and step 3 of 3"),
        ({"epoch": 0}, "stands at epoch 0 of 2"),
        ({"streams": {0: []}}, "stands at epoch 1 of 2"),
        ({"records": "[[]]"}, "holds no record"),
    ],
)
def test_a_checkpoint_is_of_a_run_on_its_way_whatever_its_digest(change, message, under_way):
    stored = json.loads((under_way / "c" / "config.json").read_text())
    given = Config(**{name: value for name, value in stored.items() if name != "sha256"})
    state = torch.load(under_way / "c" / "checkpoints" / "default-0.pt", weights_only=True)
    how = {"unit": ["default-0"], "seeds": [0], "config": given, "steps": 3, "like": state["stack"]}
    if not message:
        assert restorable(state, **how) == json.loads(state["records"])
        return
    with pytest.raises(ResumeError, match=f"the checkpoint of default-0 {message}.*: delete it to train that run"):
        restorable({**state, **change}, **how)


def test_a_checkpoint_of_an_older_version_has_no_digest(checkpoint, source, under_way):
    state = torch.load(checkpoint, weights_only=True)
    torch.save({name: value for name, value in state.items() if name != "schema_version"}, checkpoint)
    compare(source, checkpoint.parents[1], options=small(source, seeds=1, epochs=2, eval_every=1), resume=True)
    expected = (under_way / "whole" / "summary.csv").read_bytes()
    assert (checkpoint.parents[1] / "summary.csv").read_bytes() == expected
