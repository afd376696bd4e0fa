"""Outputs never replace an input nor a file of others; every model has a folder and a name of its own."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import attnlens
from attnlens.cli.app import COMMANDS, load_command
from attnlens.errors import OutputError, UsageError
from attnlens.models.weights import title_of
from attnlens.outputs import Outputs, is_ours, model_identity, named_folder
from attnlens.training.data.sources import image_files


@pytest.fixture
def weights(run, tmp_path):
    """Write a network in an empty folder, which is the one commands run in."""
    assert run("init", "-o", "w.safetensors", "-q")[0] == 0
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize("link", [None, "symlink_to", "hardlink_to"])
def test_an_input_is_never_replaced_not_through_a_link_and_not_by_force(weights, tmp_path, link):
    path = weights
    if link:
        path = tmp_path / "other.safetensors"
        getattr(path, link)(weights)
    for force in (False, True):
        with pytest.raises(UsageError, match="is what this command reads"):
            Outputs.of(str(weights), force=force).check(path)


def test_the_files_of_a_folder_that_is_read_are_inputs(weights, tmp_path):
    with pytest.raises(UsageError, match="is what this command reads"):
        Outputs.of(tmp_path).check(weights)
    assert Outputs.of("local-dir:" + str(tmp_path)).inputs == (weights,)
    assert Outputs.of(f"vit_tiny_patch16_224={weights}").inputs == (weights,)
    assert Outputs.of(None, 3, "vit_tiny_patch16_224", ["absent"]).inputs == ()


FOREIGN = {
    "a.json": b'{"lr": 1}',
    "b.json": b'["attnlens"]',
    "c.html": b"<html><title>notes</title></html>",
    "d.csv": b"layer,name\n1,a\n",
    "e.png": b"\x89PNG\r\n\x1a\n0000",
    "f.safetensors": b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
    "g.md": b"# notes",
    "h": b"anything",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_others_is_replaced_by_force_alone(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FOREIGN[name])
    assert not is_ours(path)
    with pytest.raises(OutputError, match=r"was not written by attnlens, or was changed since: .* force=True"):
        Outputs().check(path)
    assert Outputs(force=True).check(path) == path


@pytest.mark.parametrize("order", [1, -1])
def test_weights_of_ours_are_known_in_whatever_order_their_metadata_stand(tmp_path, order):
    metadata = {"model_args": '{"depth": 2, "sizes": {"a": "}"}}', "attnlens": '{"init": "mimetic"}', "format": "pt"}
    header = json.dumps({"__metadata__": dict(list(metadata.items())[::order])}, separators=(",", ":")).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert is_ours(tmp_path / "a.safetensors")


def test_an_empty_file_and_none_are_nobodys(tmp_path):
    (tmp_path / "a.json").touch()
    assert Outputs().check(tmp_path / "a.json")
    assert Outputs().check(tmp_path / "absent.json")


WRITING = {
    "fit-params": ("fit-params", "-o", "params.json", "--figures", "fits"),
    "inspect": ("inspect", "-o", "seen", "--fold", "raw"),
    "inspect pdf": ("inspect", "-o", "seen", "--fold", "raw", "--format", "pdf"),
    "inspect svg": ("inspect", "-o", "seen", "--fold", "raw", "--format", "svg"),
    "compose": ("compose", "-o", "composed"),
    "compare": ("compare", "w.safetensors", "w.safetensors", "--figures", "both", "--table", "both.csv"),
    "signal": ("signal", "-o", "signal", "--arms", "e-spa", "--seeds", "1", "--depth", "1"),
    "report": ("report", "-o", "report.html", "--table", "report.csv"),
    "init": ("init", "-o", "model.safetensors"),
    "scan": ("scan", "w.safetensors", "-o", "scanned"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITING)
def test_what_a_command_wrote_it_writes_again_and_what_others_put_there_it_leaves(run, weights, tmp_path, name):
    before = {weights}
    assert run(*WRITING[name])[0] == 0
    assert run(*WRITING[name])[0] == 0, "a second time, over its own files"
    found = [path for path in tmp_path.rglob("*") if path.is_file() and path not in before]
    made = [path for path in found if not path.name.startswith(".") and path.parent.name != "models"]
    assert made
    assert [path.name for path in made if not is_ours(path)] == []
    for path in made:
        path.write_bytes(b"notes of somebody else")
    code, _, err = run(*WRITING[name])
    assert code == 1
    assert err.splitlines()[-1].startswith("attnlens: ")
    assert "was not written by attnlens" in err
    assert {path.read_bytes() for path in made} == {b"notes of somebody else"}
    assert run(*WRITING[name], "--force")[0] == 0


def test_weights_are_not_replaced_by_what_is_measured_in_them(run, weights, tmp_path):
    kept = weights.read_bytes()
    (tmp_path / "w.json").symlink_to(weights)
    (tmp_path / "w.html").hardlink_to(weights)
    for command in (
        ("fit-params", "w.safetensors", "-o", "w.safetensors"),
        ("fit-params", "w.safetensors", "-o", "w.json", "--force"),
        ("report", "-c", "w.safetensors", "vit_tiny_patch16_224", "-o", "w.html", "--force"),
    ):
        code, out, err = run(*command)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
    assert weights.read_bytes() == kept


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("fit-params", "-o", "."), "is a folder: give a file to write"),
        (("init", "-o", "."), "is a folder: give a file to write"),
        (("fit-params", "-o", "made/"), "made/ is a folder: give a file to write"),
        (("init", "-o", "made/"), "made/ is a folder: give a file to write"),
        (("report", "-o", "made/"), "made/ is a folder: give a file to write"),
        (("report", "--table", "made/"), "made/ is a folder: give a file to write"),
        (("report", "-o", "notes.md"), "give a name that ends in .html"),
        (("init", "-o", "model.pth"), "give a name that ends in .safetensors"),
        (("inspect", "-o", "stats.csv"), "give a folder, which several files are written into"),
        (("compose", "-o", "file"), "is a file: give a folder"),
        (("compare", "a", "b", "--figures", "file"), "is a file: give a folder"),
    ],
)
def test_a_folder_for_a_file_and_the_reverse_is_told_before_any_work(run, tmp_path, command, message):
    (tmp_path / "file").write_text("kept")
    code, out, err = run(*command)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_every_command_that_writes_has_force_and_one_meaning_of_output():
    outputs = {}
    for name in COMMANDS:
        options = {param.name: param for param in load_command(name).params}
        if "output" in options or "figures" in options:
            assert "force" in options, name
        if "output" in options:
            assert options["output"].opts == ["--output", "-o"]
            outputs[name] = options["output"].help
    kinds = {"file": {"fit-params", "report", "init"}}
    assert {name for name, text in outputs.items() if "folder" not in text} == kinds["file"]


def test_two_models_of_one_name_have_two_folders(tmp_path):
    first, second = ([str(tmp_path / one / "vit.safetensors")] for one in "ab")
    folders = [named_folder(tmp_path / "figures", ["vit"], models) for models in (first, second, first, second)]
    assert folders[:2] == folders[2:]
    assert folders[0] != folders[1]
    assert folders[0].name == "vit"
    assert folders[1].name.startswith("vit-")


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_folder_whose_manifest_is_a_pipe_or_a_device_is_of_others(tmp_path, put):
    (tmp_path / "vit").mkdir()
    put(tmp_path / "vit" / ".attnlens.json")
    code = "from pathlib import Path; from attnlens.outputs import named_folder"
    code += "; print(named_folder(Path(), ['vit'], ['vit']))"
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}
    done = subprocess.run([sys.executable, "-c", code], check=False, **how)
    assert done.stdout.startswith("vit-"), done.stderr


def test_a_model_is_known_by_where_it_lies_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "m.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    assert model_identity("m.safetensors", None, "vit_tiny") == [str(tmp_path / "m.safetensors"), "vit_tiny"]


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("runs/a/model.safetensors", "a"),
        ("runs/a/pytorch_model.bin", "a"),
        ("runs/a/best.pth", "a-best"),
        ("runs/a/checkpoint-500.pth", "a-checkpoint-500"),
        ("runs/a/epoch_3.pt", "a-epoch_3"),
        ("runs/a/vit_small.safetensors", "vit_small"),
        ("runs/a/mimetic-1.safetensors", "mimetic-1"),
        ("runs/a/modelzoo.pth", "modelzoo"),
        ("runs/a/last.pth.tar", "a-last"),
        ("runs/a/model_best.pth.tar", "a-model_best"),
        ("runs/a/epoch=3-step=100.ckpt", "a-epoch=3-step=100"),
        ("runs/a/model.safetensors.xz", "a"),
        ("runs/a/model.safetensors.index.json", "a"),
        ("runs/a/vit.b16.tar.gz", "vit.b16"),
        ("runs/a/vit.b16.weights_file", "vit.b16"),
        ("runs/a/adapter_model.safetensors", "a"),
    ],
)
def test_a_model_is_named_after_what_tells_it_apart(tmp_path, path, title):
    assert title_of(tmp_path / path) == title


@pytest.mark.slow
def test_every_command_and_call_that_is_printed_works_from_another_folder(tmp_path):
    """Run what the tool prints for a person to type, in a folder that is not the source tree's."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def shell(line):
        program = [sys.executable, "-m", "attnlens", *shlex.split(line)[1:]]
        return subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    first = shell("attnlens inspect")
    assert first.returncode == 0, first.stderr
    lines = re.findall(r"^  (attnlens .*?)(?:   .*)?$", first.stderr, re.MULTILINE)
    assert len(lines) >= 4
    made = shell("attnlens init -o runs/a/model.safetensors")
    lines += re.findall(r"(attnlens .*)$", made.stderr, re.MULTILINE)
    assert any("verify-init" in line for line in lines)
    lines += ["attnlens inspect runs/a", "attnlens scan 'runs/**' -o scanned", "attnlens init --list"]
    for line in lines:
        done = shell(line)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    call = re.search(r"timm\.create_model\(.*\)$", made.stderr, re.MULTILINE)[0]
    code = f"import timm\nprint(len({call}.state_dict()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10
    bare = shell("attnlens verify-init")
    assert bare.returncode == 2
    assert "needs a network to look at" in bare.stderr


def test_the_help_names_every_initialiser():
    from attnlens.cli.options import INITIALISERS

    assert set(INITIALISERS) == set(attnlens.initialisers()), "name it in cli/options.py"


def test_a_table_of_a_comparison_holds_what_is_printed(run, weights, tmp_path):
    code, out, _ = run("compare", weights, weights, "--json", "--table", "t.csv", "--figures", "f", "--fold", "Raw")
    assert code == 0
    data = json.loads(out)
    assert data["fold"] == "raw"
    assert data["models"] == ["w (1)", "w (2)"]
    header, *rows = (tmp_path / "t.csv").read_text().splitlines()
    assert header.startswith("first,second,circuit,identity_share,log_alpha")
    assert len(rows) == len(data["distances"])


def refused(run, *command, files):
    """Assert that a command with ``--force`` is refused in one line as it would replace what it reads."""
    kept = {path: path.read_bytes() for path in files}
    code, out, err = run(*command, "--force", "-q")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "is what this command reads" in err
    assert {path: path.read_bytes() for path in files} == kept


def test_a_comparison_that_a_report_shows_is_not_replaced_by_it(run, weights, tmp_path):
    files = [tmp_path / "run" / name for name in ("results.jsonl", "summary.json")]
    files[0].parent.mkdir()
    for file, link in zip(files, ("a.html", "a.csv"), strict=True):
        file.write_text('{"schema": "attnlens.results"}')
        (tmp_path / link).symlink_to(file)
    refused(run, "report", weights, "--train", "run", "-o", "a.html", files=files)
    refused(run, "report", weights, "--train", "run", "-o", "b.html", "--table", "a.csv", files=files)
    with pytest.raises(UsageError, match="is what this command reads"):
        attnlens.report(weights, train="run", output="a.html", force=True)


def test_images_that_are_trained_on_are_not_replaced_by_figures(run, tmp_path):
    images = [tmp_path / "images" / part / name / "curves.png" for part in ("train", "test") for name in "ab"]
    for image in images:
        image.parent.mkdir(parents=True)
        image.write_bytes(b"an image")
    other = tmp_path / "images" / "results" / "curves.png"
    other.parent.mkdir()
    other.write_bytes(b"of an earlier run")
    refused(run, "train-compare", "--dataset", "images", "-o", "images/train/a", files=images)
    assert set(image_files("images", data_dir=tmp_path)) == set(images)
    assert image_files("digits", data_dir=tmp_path) == []


def test_shards_in_folders_below_an_index_and_the_base_of_an_adapter_are_inputs(run, weights, tmp_path):
    shard = tmp_path / "model" / "below" / "model-00001-of-00001.safetensors"
    shard.parent.mkdir(parents=True)
    weights.rename(shard)
    (tmp_path / "model" / "config.json").write_text("{}")
    index = {"weight_map": {"a": "below/model-00001-of-00001.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(tmp_path / "model")})
    )
    (tmp_path / "p.json").symlink_to(shard)
    for model in ("model", "model/model.safetensors.index.json", "adapter"):
        refused(run, "fit-params", model, "-o", "p.json", "--figures", "fits", files=[shard])


@pytest.mark.parametrize("kept", [None, ""])
def test_a_link_in_an_output_folder_makes_no_file_elsewhere(run, tmp_path, kept):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stats.json").symlink_to("../elsewhere/kept")
    if kept is not None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "kept").write_text(kept)
    done = run("inspect", "-o", "out", "--fold", "raw", "-q")
    assert done.code == 1
    assert "is a link to nothing" in done.err if kept is None else "was not written by attnlens" in done.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["stats.json"]
    if kept is None:
        assert not (tmp_path / "elsewhere").exists()
    else:
        assert (tmp_path / "elsewhere" / "kept").read_text() == kept
