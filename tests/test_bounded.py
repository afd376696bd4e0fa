"""Networks that a file's arguments describe: built within a stated time and memory, whatever the constructor does."""

import json
import os
import subprocess
import sys
import time

import pytest
import timm
from timm.models import register_model

from attnlens.errors import AttnlensError, ModelNotFoundError
from attnlens.models import bounded
from attnlens.models.architecture import build
from attnlens.models.bounded import check_cheap, describe_bounded
from benchmarks.trust.scale import CONFIG, write_model
from tests.conftest import ROOT


def test_another_process_describes_what_this_one_does():
    arguments = {"img_size": 96, "embed_dim": 66, "depth": 3, "num_heads": 6}
    assert describe_bounded("vit_tiny_patch16_224", arguments) == build("vit_tiny_patch16_224", arguments)


def test_a_constructor_that_works_for_minutes_is_one_line_in_seconds():
    start = time.monotonic()
    with pytest.raises(ModelNotFoundError, match=r"cannot build maxvit_tiny_tf_224 .* within 5 processor seconds"):
        describe_bounded("maxvit_tiny_tf_224", {"img_size": 65536})
    assert time.monotonic() - start < 60  # by the clock, on a machine with other work
    assert describe_bounded("vit_tiny_patch16_224", {"depth": 2}).name == "vit_tiny_patch16_224"


def test_what_takes_long_to_build_is_not_built_in_this_process():
    check_cheap("vit_tiny_patch16_224", {"depth": 2})
    with pytest.raises(ModelNotFoundError):
        check_cheap("maxvit_tiny_tf_224", {"img_size": 65536})


@pytest.mark.parametrize("arguments", [{"depth": "many"}, {"nothing": 1}, {"patch_size": 0}])
def test_arguments_that_cannot_be_are_told_as_in_this_process(arguments):
    with pytest.raises(AttnlensError) as here:
        build("vit_tiny_patch16_224", arguments)
    with pytest.raises(type(here.value)) as there:
        describe_bounded("vit_tiny_patch16_224", arguments)
    assert str(there.value) == str(here.value)


def test_a_process_that_was_killed_is_started_again():
    describe_bounded("vit_tiny_patch16_224", {"depth": 2})
    os.kill(bounded._started[0]._process.pid, 9)
    assert len(describe_bounded("vit_tiny_patch16_224", {"depth": 3}).specs) == 3


def test_processes_forked_from_this_one_get_their_own_answers():
    describe_bounded("vit_tiny_patch16_224", {"depth": 2})
    children = []
    for depth in (2, 3, 4):
        child = os.fork()
        if not child:
            right = [len(describe_bounded("vit_tiny_patch16_224", {"depth": depth}).specs) == depth for _ in range(3)]
            os._exit(0 if all(right) else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_a_model_that_only_this_process_knows_is_built_here():
    @register_model
    def mine_of_this_test(pretrained=False, **kwargs):
        return timm.create_model("vit_tiny_patch16_224", pretrained=pretrained, **kwargs)

    assert len(describe_bounded("mine_of_this_test", {"depth": 2}).specs) == 2


PEAKS = """
import contextlib, io, json, os, sys
from pathlib import Path
from benchmarks.trust.fault_runs import warm

def high_water():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

def peak(arguments):
    reading, writing = os.pipe()
    if os.fork() == 0:
        from attnlens.cli import main
        Path("/proc/self/clear_refs").write_text("5")
        before, sys.argv = high_water(), ["attnlens", *arguments]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main()
        os.write(writing, str(high_water() - before).encode())
        os._exit(0)
    os.close(writing)
    os.wait()
    return float(os.read(reading, 99))

warm()
os.chdir(sys.argv[1])
print(json.dumps({arguments[0]: peak(arguments) for arguments in json.loads(sys.argv[2])}))
"""
OF_FIGURES = 320
"""MiB that figures and tables may take, whatever a file names: docs/trust.md"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of memory are read from /proc")
def test_memory_of_figures_and_tables_is_bounded_whatever_number_of_heads_a_file_names(tmp_path):
    model = tmp_path / "many"
    shape = {"hidden_size": 64, "num_attention_heads": 512, "num_key_value_heads": 512, "head_dim": 1}
    write_model(model, {**CONFIG, **shape, "intermediate_size": 5, "vocab_size": 3, "num_hidden_layers": 2}, seed=0)
    size = sum(path.stat().st_size for path in model.iterdir()) / 2**20
    commands = [
        ["inspect", str(model), "-o", "inspected"],
        ["compose", str(model), "-o", "composed"],
        ["fit-params", str(model), "-o", "params.json", "--figures", "fitted"],
        ["report", str(model), "-o", "page.html"],
    ]
    script = [sys.executable, "-c", PEAKS, str(tmp_path), json.dumps(commands)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    assert all(0 < peak < 64 * size + 64 + OF_FIGURES for peak in peaks.values()), peaks
    assert (tmp_path / "page.html").is_file()
    composed = json.loads((tmp_path / "composed" / "composition.json").read_text())
    assert composed["pairs_of_heads"] == {"found": 3 * 512**2, "written": 300_000}
    assert (tmp_path / "composed" / "composition.csv").read_text().count("\n") == 300_001
