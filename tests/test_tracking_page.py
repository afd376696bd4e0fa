"""docs/tracking.md: every block runs as it stands, and timm loads what its command writes."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch

import attnlens
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "tracking.md").read_text()
BLOCKS = {
    part.splitlines()[0]: re.search(r"```python\n(.*?)```", part, re.DOTALL)[1]
    for part in re.split(r"\n##+ ", PAGE)
    if "```python" in part
}
NEEDS = {
    "Lightning": ("lightning",),
    "The Trainer of transformers": ("transformers", "accelerate"),
    "Start Hugging Face's Trainer": ("transformers",),
}


def test_the_page_shows_a_loop_two_trainers_and_a_start():
    assert list(BLOCKS) == ["A plain loop", *NEEDS]


@pytest.mark.parametrize("title", BLOCKS)
def test_a_block_runs_as_it_stands(title, tmp_path):
    for package in NEEDS.get(title, ()):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", BLOCKS[title]]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    if "StructureTracker" in BLOCKS[title]:
        lines = (tmp_path / "structure" / "structure.jsonl").read_text().splitlines()
        assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]
        assert (tmp_path / "structure" / "structure.png").is_file()


def test_timm_loads_what_the_command_writes_as_its_script_does(run, tmp_path):
    import timm

    (command,) = re.findall(r"^    attnlens (init vit_tiny.*)$", PAGE, re.MULTILINE)
    assert run(*shlex.split(command)).code == 0
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, checkpoint_path="start.safetensors")
    expected = attnlens.create_model("vit_tiny_patch16_224", "mimetic", 0, num_classes=10)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert (tmp_path / "start.safetensors").is_file()
