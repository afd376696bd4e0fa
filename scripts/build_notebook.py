"""Write docs/notebook.ipynb: the cells of docs/notebook.py, run from the first to the last.

    python scripts/build_notebook.py [--check]

``--check`` writes nothing: it says whether the notebook has the script's cells and what they print when they are run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import jupytext
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
SCRIPT, NOTEBOOK = ROOT / "docs" / "notebook.py", ROOT / "docs" / "notebook.ipynb"
_KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}


def cells(seconds: int = 300) -> Any:
    """Run the script's cells in a kernel of this Python, in docs/, and return the notebook with what they show."""
    notebook = jupytext.read(SCRIPT, fmt="py:percent")
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # the same from run to run
        cell["metadata"] = {}
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm's, of a bar that nothing here shows
    NotebookClient(notebook, timeout=seconds, kernel_name="python3", record_timing=False).execute(
        cwd=str(ROOT / "docs")
    )
    notebook.metadata = {"kernelspec": _KERNEL, "language_info": {"name": "python"}}
    return notebook


def printed(notebook: Any) -> list[str]:
    """Return what each cell of code prints, and of what else it shows the kinds."""
    return [
        "".join(
            output["text"] if output["output_type"] == "stream" else f"<{' '.join(sorted(output['data']))}>\n"
            for output in cell["outputs"]
        )
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
    ]


def sources(notebook: Any) -> list[tuple[str, str]]:
    """Return kind and text of every cell."""
    return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def stored() -> Any:
    """Return the notebook as it is kept."""
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"), object_hook=_joined)


def _joined(data: dict[str, Any]) -> dict[str, Any]:
    """Join the lines that the format splits a stream's text into."""
    return {**data, "text": "".join(data["text"])} if isinstance(data.get("text"), list) else data


def main() -> None:
    """Write the notebook, or check the one that is there."""
    parser = argparse.ArgumentParser(description="Run docs/notebook.py into docs/notebook.ipynb.")
    parser.add_argument("--check", action="store_true", help="write nothing, say what differs")
    check = parser.parse_args().check
    notebook = cells()
    if not check:
        jupytext.write(notebook, NOTEBOOK, fmt="ipynb")
    elif (sources(notebook), printed(notebook)) != (sources(stored()), printed(stored())):
        sys.exit("docs/notebook.ipynb is not what its script gives: run `make notebook`")


if __name__ == "__main__":
    main()
