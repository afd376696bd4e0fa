"""The command line: results on stdout, chatter on stderr, one line an error, exit codes, nothing half-written."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_model

import attnlens
from attnlens.cli.app import COMMANDS, load_command
from attnlens.cli.options import parse_layers
from attnlens.errors import UsageError
from attnlens.words import numbered
from tests.test_inspect import SMALL, small_vit

WITHOUT_DEFAULT = {
    "checkpoint",
    "config",
    "depth",
    "embed_dim",
    "num_heads",
    "family",
    "params",
    "time_budget",
    "train",
}
"""Options that do nothing unless they are given."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": SMALL}))
    save_model(small_vit(), path / "model.safetensors")
    return path


def test_inspect_prints_the_table_and_writes_every_file(run, folder, tmp_path):
    code, out, err = run("inspect", folder, "--output", "made")
    assert code == 0
    assert "effective products" in out
    assert [line.split()[0] for line in out.splitlines()[4:7]] == ["0", "1", "2"]
    assert "wrote stats.csv, stats.json and figures" in err
    assert {path.name for path in (tmp_path / "made").iterdir()} == {
        "stats.csv",
        "stats.json",
        "qk_heatmap.png",
        "ov_heatmap.png",
        "depth_profile.png",
        "spectra.png",
    }


def test_the_default_folder_is_named_after_the_model(run, folder, tmp_path):
    assert run("inspect", folder)[0] == 0
    assert (tmp_path / "figures" / folder.name / "stats.csv").is_file()


def test_json_on_stdout_is_the_file_and_names_schema_and_provenance(run, folder, tmp_path):
    _, out, _ = run("inspect", folder, "--json", "-o", "made", "--fold", "raw")
    data = json.loads(out)
    assert out == (tmp_path / "made" / "stats.json").read_text()
    assert (data["schema"], data["schema_version"]) == ("attnlens.stats", 1)
    assert set(data["provenance"]) >= {"model", "file", "sha256", "versions", "command", "time"}
    assert data["provenance"]["command"].startswith("attnlens inspect ")
    expected = attnlens.inspect(folder, fold="raw").stats.json_rows()
    assert data["stats"] == expected


@pytest.mark.parametrize("kind", ["pdf", "svg"])
def test_figures_come_in_the_format_asked_for(run, folder, tmp_path, kind):
    assert run("inspect", folder, "-o", "made", "--format", kind)[0] == 0
    assert (tmp_path / "made" / f"qk_heatmap.{kind}").stat().st_size > 1000


def test_layers_and_fold_choose_what_is_in_the_table(run, folder):
    _, out, _ = run("inspect", folder, "--layers", "0,2", "--fold", "raw", "--json")
    rows = json.loads(out)["stats"]
    assert {row["layer"] for row in rows} == {0, 2}
    assert {row["fold"] for row in rows} == {"raw"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("inspect", "vit_bas_patch16_224"), 1, "did you mean vit_base_patch16_224"),
        (("inspect", "vit_bse"), 1, "did you mean vit_base_"),
        (("inspect", "absent.safetensors"), 1, "absent.safetensors"),
        (("inspect", "--layers", "3-1"), 2, "--layers '3-1' is not understood: give indices and ranges, e.g. 0-3,11"),
        (("inspect", "--layers", "99"), 2, "layer 99 of embedded cannot be read"),
    ],
)
def test_a_failure_is_one_line_on_stderr_with_its_exit_code(run, tmp_path, arguments, code, message):
    found, out, err = run(*arguments)
    assert found == code
    assert out == ""
    assert err.startswith("attnlens: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unwritable_output_is_one_line_and_leaves_nothing(run, folder, tmp_path):
    (tmp_path / "file").write_text("kept")
    code, _, err = run("inspect", folder, "-o", "file/deep")
    assert code == 1
    assert "cannot write" in err
    assert (tmp_path / "file").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_debug_shows_the_traceback(run):
    with pytest.raises(attnlens.AttnlensError):
        run("inspect", "vit_bas_patch16_224", "--debug")


def test_usage_mistakes_exit_2(run):
    assert run("inspect", "--fold", "sideways")[0] == 2
    assert run("inspekt")[0] == 2


def test_with_no_model_the_shipped_one_is_inspected(run):
    code, out, _ = run("inspect", "-o", "made")
    assert code == 0
    assert out.startswith("embedded: effective products")


def test_version_is_told(run):
    assert run("--version")[1] == f"attnlens {attnlens.__version__}\n"


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['attnlens', 'inspect', '--help']\n"
        "from attnlens.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'numpy', 'pydantic', 'rich', 'scipy', 'torch', 'timm', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_has_a_whole_sentence_and_debug_is_among_them(name):
    options = [param for param in load_command(name).params if param.param_type_name == "option"]
    assert [param.opts for param in options][-1] == ["--debug"]
    for param in options:
        assert re.fullmatch(r"[A-Z][a-z]+ .+\.", param.help or ""), f"{param.opts}: {param.help}"
        told = param.default is not None or param.required or "Default: " in param.help
        assert told or param.multiple or param.name in WITHOUT_DEFAULT, param.opts


def test_an_option_of_one_meaning_has_one_help_text():
    texts = {}
    for name in COMMANDS:
        for param in load_command(name).params:
            if (name, param.opts[0]) != ("train-compare", "--num-heads"):  # of a network to draw, not of a file to read
                texts.setdefault(param.opts[0], set()).add(getattr(param, "help", None))
    of_one = ("--num-heads", "--offline", "--remote", "--json", "--debug", "--format", "--dpi", "--layers", "--params")
    assert {name: len(texts[name]) for name in of_one} == dict.fromkeys(of_one, 1)


def test_a_known_architecture_is_inspected_without_torch_or_timm(folder, tmp_path):
    code = (
        "import sys; sys.argv = ['attnlens', 'inspect', sys.argv[1], '-o', sys.argv[2]]\n"
        "from attnlens.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'timm', 'pandas', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    for _ in range(2):  # the first run may describe the architecture, the second finds it described
        command = [sys.executable, "-c", code, str(folder), str(tmp_path / "made")]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_corrupt_file_leaves_no_output(run, folder, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    code, out, err = run("inspect", folder, "--checkpoint", "bad.safetensors", "-o", "made")
    assert (code, out) == (1, "")
    assert "truncated or corrupt" in err
    assert not (tmp_path / "made").exists()


def test_a_code_carrying_pickle_is_refused(run, folder, tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "hook": os.system}, tmp_path / "a.pth")
    code, _, err = run("inspect", folder, "--checkpoint", "a.pth")
    assert code == 1
    assert "could run code: refused" in err


def test_a_global_outside_the_weights_is_a_stand_in_that_is_never_called(run, folder, tmp_path):
    torch.save({"model": {"w": torch.ones(1)}, "hook": print}, tmp_path / "a.pth")
    code, out, err = run("inspect", folder, "--checkpoint", "a.pth")
    assert (code, out) == (1, "")
    assert "the weights are not of" in err


def test_layer_ranges_read_and_write():
    assert parse_layers("0-2, 5") == [0, 1, 2, 5]
    assert numbered([5, 0, 1, 2], "layer") == "layers 0-2, 5"
    with pytest.raises(UsageError, match="not understood"):
        parse_layers("a")
