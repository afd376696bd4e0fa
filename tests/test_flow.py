"""The order of the house: every import, at the top of a file or in a function, stays in its room or goes down."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (
    *(
        "printable",
        "words",
        "arguments",
        "errors",
        "vocabulary",
        "figure_styles",
        "provenance",
        "threads",
        "memory",
        "atomic",
        "strict_json",
        "csv_text",
        "state",
        "patterns",
        "templates",
    ),
    *(
        "heads",
        "balance",
        "krylov",
        "circuits",
        "layouts",
        "checkpoints",
        "outputs",
        "statistics",
        "figures",
        "drawn",
        "models",
        "filters",
    ),
    *(
        "inspection",
        "composition",
        "composition_files",
        "fit",
        "inits",
        "reports",
        "scans",
        "gpt",
        "signal",
        "training",
        "cli",
    ),
)
"""From the ground up; the root ``attnlens`` itself names the public functions and is imported for its version alone."""
HEAVY = {
    "torch": ("gpt", "signal", "training", "inits"),
    "timm": ("gpt", "signal", "training"),
    "matplotlib": ("figures", "filters", "fit", "scans", "signal", "training", "reports"),
    "torchvision": (),
    "sklearn": (),
    "huggingface_hub": (),
}
"""Packages that cost a second or a download to import, and the rooms whose files may import them at their top."""


@cache
def modules() -> dict[str, ast.Module]:
    """Parse every file of the package, by the name it is imported under."""
    files = {path.relative_to(ROOT).with_suffix(""): path for path in (ROOT / "attnlens").rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in files.items()}


def imported(tree: ast.AST) -> set[str]:
    """Return what a file imports of the package, lazily or not: modules, never names in them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules() else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in modules() and name != "attnlens"}


def room(module: str) -> str:
    """Return the folder or file below ``attnlens`` that a module is of; empty for the root and for ``__main__``."""
    return module.removeprefix("attnlens").removeprefix(".").split(".")[0].replace("__main__", "")


def test_no_import_eager_or_lazy_closes_a_circle():
    try:
        list(
            TopologicalSorter(
                {name: imported(tree) - {name} for name, tree in modules().items() if room(name)}
            ).static_order()
        )
    except CycleError as error:
        pytest.fail(f"these files import each other: {' -> '.join(error.args[1])}")


def test_every_import_stays_in_its_room_or_goes_down():
    against = [
        f"{name} imports {other}"
        for name, tree in modules().items()
        for other in imported(tree)
        if room(name) and room(other) and ROOMS.index(room(other)) > ROOMS.index(room(name))
    ]
    assert not against


def test_the_root_is_imported_for_its_version_alone():
    wrong = [
        f"{name}: {alias.name}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "attnlens"
        for alias in node.names
        if alias.name != "__version__"
    ]
    assert not wrong


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_are_imported_at_the_top_only_where_everything_needs_them(package):
    at_top = {
        name
        for name, tree in modules().items()
        for node in tree.body
        for module in (
            [node.module]
            if isinstance(node, ast.ImportFrom)
            else [a.name for a in getattr(node, "names", [])]
            if isinstance(node, ast.Import)
            else []
        )
        if module and module.split(".")[0] == package
    }
    assert {room(name) for name in at_top} <= set(HEAVY[package])
