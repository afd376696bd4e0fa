"""`attnlens doctor`: what is there, what is missing and how to get it, quickly; completion; version."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from attnlens import __version__
from attnlens.cli import doctor


def findings():
    return {finding.name: finding for finding in doctor.look()}


def run(*arguments, **environment):
    command = [sys.executable, "-c", "from attnlens.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_every_needed_part_is_found_with_its_version():
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stdout
    found = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert found["attnlens"]["found"] == __version__
    assert found["torch"]["found"] == version("torch")
    assert found["shipped model"]["ok"]
    assert {"numpy", "timm", "jinja2", "cpu", "cuda", "Hugging Face hub cache"} <= set(found)


def test_the_table_says_that_all_is_well_and_names_completion():
    done = run("doctor")
    assert done.returncode == 0
    assert "everything attnlens needs is here" in done.stdout
    assert "--install-completion" in done.stdout
    assert version("numpy") in done.stdout


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("fpu sse2 avx512f", ""),
        ("avx512_bf16 amx_bf16", ", bfloat16 products by AMX and AVX-512 (train-compare --precision bfloat16)"),
        (None, ""),
    ],
)
def test_a_processor_that_multiplies_in_bfloat16_is_named(tmp_path, flags, said):
    listing = tmp_path / "cpuinfo"
    if flags is not None:
        listing.write_text(f"processor : 0\nflags : {flags}\n")
    assert doctor._half_products(listing) == said


@pytest.mark.parametrize(("installed", "said"), [(None, "missing (needs >=2.0)"), ("1.26.4", "1.26.4 (needs >=2.0)")])
def test_a_missing_or_old_package_is_named_with_the_command_that_brings_it(monkeypatch, capsys, installed, said):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: installed if name == "numpy" else real(name))
    found = findings()["numpy"]
    assert (found.ok, found.found, found.remedy) == (False, said, "pip install 'numpy>=2.0'")
    with pytest.raises(SystemExit) as stop:
        doctor.doctor()
    assert stop.value.code == 1
    assert "1 needed part is missing" in capsys.readouterr().out


def test_an_optional_package_that_is_missing_does_not_fail(monkeypatch, capsys):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "datasets" else real(name))
    doctor.doctor()
    assert "pip install 'attnlens[text]'" in capsys.readouterr().out


def test_every_package_is_either_required_or_optional_as_pyproject_has_it():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert doctor.USES.keys() == extras.keys()
    found = [(finding.part, canonicalize_name(finding.name)) for finding in doctor.look()]
    for part, lines in (("required", project["dependencies"]), ("optional", [*chain(*extras.values())])):
        names = sorted(canonicalize_name(Requirement(line).name) for line in lines)
        assert sorted(name for of, name in found if of == part) == names
    assert len({name for _, name in found}) == len(found)


def test_a_gpu_is_named_and_torch_is_asked(monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "_gpus", lambda: ["Some GPU, 80 GiB, 1.2"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = findings()["cuda"]
    assert not found.ok
    assert found.found.startswith("Some GPU, 80 GiB, 1.2; torch ")
    assert "cannot use it" in found.found


def test_gpus_are_what_the_driver_lists(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 'One GPU, 81559 MiB, 580.1'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert doctor._gpus() == ["One GPU, 81559 MiB, 580.1"]
    fake.write_text("#!/bin/sh\nexit 9\n")
    assert doctor._gpus() == []


def test_caches_follow_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "weights").write_bytes(bytes(2_000_000))
    found = findings()
    assert found["Hugging Face hub cache"].found == f"{tmp_path / 'hub'}, 2.0 MB in 1 file"
    assert "HF_HUB_OFFLINE" in found["network"].found
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "deep"))
    assert "set HF_HOME or HF_HUB_CACHE" in findings()["Hugging Face hub cache"].remedy


def test_nothing_heavy_is_imported_where_there_is_no_gpu():
    code = (
        "import sys; from attnlens.cli import doctor\n"
        "doctor._gpus = lambda: []\n"
        "list(doctor.look())\n"
        "print(sorted({'scipy', 'torch', 'timm', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        ("bash", {"COMP_WORDS": "attnlens rep", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "attnlens rep"}),
        ("fish", {"_TYPER_COMPLETE_ARGS": "attnlens rep", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}),
    ],
)
def test_a_shell_is_told_how_a_command_goes_on(shell, words):
    command = Path(sys.executable).parent / "attnlens"
    environment = {**os.environ, "_ATTNLENS_COMPLETE": f"complete_{shell}", **words}
    done = subprocess.run([command], capture_output=True, text=True, check=False, env=environment)
    assert "report" in done.stdout
    assert "inspect" not in done.stdout
