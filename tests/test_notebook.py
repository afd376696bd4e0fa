"""The notebook of the docs: the cells of its script, run from the first to the last, and what they print."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("jupytext", reason="jupytext is not installed: pip install --group docs")
pytest.importorskip("nbclient", reason="nbclient is not installed: pip install --group docs")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install --group docs")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("build_notebook", ROOT / "scripts" / "build_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebook_runs_and_shows_what_it_shows(build, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook, kept = build.cells(), build.stored()
    assert build.sources(notebook) == build.sources(kept), "run `make notebook`"
    assert build.printed(notebook) == build.printed(kept), "run `make notebook`"
    shown = "".join(build.printed(kept))
    assert shown.count("image/png") >= 3
    assert "text/html" in shown


def test_the_notebook_holds_no_warning_no_error_and_no_path(build):
    outputs = [output for cell in build.stored()["cells"] for output in cell.get("outputs", [])]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result", "display_data"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    text = (ROOT / "docs" / "notebook.ipynb").read_text()
    assert not re.search(rf"{re.escape(sys.prefix)}|{re.escape(str(ROOT))}|/home/|/root/", text)
