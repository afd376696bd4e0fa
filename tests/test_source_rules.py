"""What every module of the package keeps to: frozen dataclasses, strict zips, and the signatures people call.

The signatures are stored. After a deliberate change of one: ``python -m tests.test_source_rules``.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "attnlens"
STORED = Path(__file__).parent / "golden" / "signatures.txt"
CHANGES = {
    "training/trainer.py": 1,  # where a run is
    "statistics/corners.py": 1,  # corners, one product after the other
    "checkpoints/pickled_data.py": 1,  # items and state, as a pickle gives them
    "checkpoints/computed.py": 1,  # what a view changes, one tensor after the other
    "figures/panels.py": 1,  # axes that were drawn on
    "models/undress.py": 1,  # shells of a copy that is being made
    "cli/sheet.py": 1,  # rows
}
"""Dataclasses that are not frozen, by file: each collects something."""
UNEQUAL = {
    "inits/rules/impulse.py": 1,  # the heads before each layer, and before none after the last
    "inits/rules/fitted.py": 1,  # no requests where the parameters hold nothing for a layer
    "training/engine.py": 1,  # beginnings and ends of parts
    "patterns.py": 1,  # parts and the ones before them
    "scans/landscape.py": 1,  # looks for as many groups as there are
    "checkpoints/networks.py": 1,  # levels of names down to the shortest
    "figures/heatmaps.py": 1,  # tops of panels, and the bottom
    "figures/panels.py": 1,  # a last row that is not full
    "filters/closed_form.py": 1,  # steps of the parameters that have a grid
}
"""Zips that end with the shortest, by file."""


def counted(found):
    """Return by file how many nodes of the package's syntax trees are found."""
    counts = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        number = sum(map(found, ast.walk(ast.parse(path.read_text()))))
        if number:
            counts[str(path.relative_to(PACKAGE))] = number
    return counts


def changeable(node):
    """Whether a node is a dataclass that is not frozen."""
    decorators = map(ast.unparse, node.decorator_list) if isinstance(node, ast.ClassDef) else ()
    return any(text.startswith("dataclass") and "frozen=True" not in text for text in decorators)


def ends_early(node):
    """Whether a node is a zip that leaves out what the longer ones have more."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip"):
        return False
    return [ast.unparse(given) for given in node.keywords] != ["strict=True"]


def unlike_type_checking(node):
    """Whether a node is a condition on TYPE_CHECKING that is more, or less, than that."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) != "TYPE_CHECKING"


def signatures():
    """Yield the parameters of the public functions and classes of the core that have defaults or kinds of their own."""
    for part in ("circuits", "inits", "layouts", "statistics"):
        for path in sorted((PACKAGE / part).rglob("*.py")):
            module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text())):
                told = _parameters(node)
                if told and not node.name.startswith("_"):
                    yield f"{module}.{node.name}({told})"


def _parameters(node):
    if isinstance(node, ast.FunctionDef):
        given = node.args
        for argument in ast.walk(given):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        own = (*given.defaults, *given.kwonlyargs, *given.posonlyargs, given.kwarg, given.vararg)
        return ast.unparse(given) if any(own) else ""
    fields = node.body if isinstance(node, ast.ClassDef) else ()
    given = [each for each in fields if isinstance(each, ast.AnnAssign) and each.value is not None]
    return ", ".join(f"{ast.unparse(each.target)}={ast.unparse(each.value)}" for each in given)


def test_every_dataclass_is_frozen_but_those_that_collect():
    assert counted(changeable) == CHANGES


def test_every_zip_is_strict_but_those_of_unequal_lengths():
    assert counted(ends_early) == UNEQUAL


def test_what_is_imported_for_type_checkers_is_imported_for_them_alone():
    assert counted(unlike_type_checking) == {}


def test_functions_and_classes_take_what_they_took():
    assert list(signatures()) == STORED.read_text().splitlines()


if __name__ == "__main__":
    STORED.write_text("".join(f"{line}\n" for line in signatures()))
