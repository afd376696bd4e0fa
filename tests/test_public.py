"""The public face: every name of `attnlens.__all__` is there, is what type checkers see, and is documented."""

import ast
import inspect
from pathlib import Path

import pytest

import attnlens

ROOT = Path(__file__).parent.parent


def test_type_checkers_see_the_names_that_are_imported_at_first_use():
    tree = ast.parse((ROOT / "attnlens" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"attnlens.{module}" for name, module in attnlens._HOME.items()}


@pytest.mark.parametrize("name", sorted(set(attnlens.__all__) - {"__version__"}))
def test_every_public_name_is_itself_and_documented_in_the_api_page(name):
    value = getattr(attnlens, name)
    assert callable(value)
    assert value.__name__ == name
    assert inspect.getdoc(value)
    page = (ROOT / "docs" / "api.md").read_text()
    assert f".{name}\n" in page or f"attnlens.{name}" in page


@pytest.mark.parametrize(
    "name", sorted(name for name in set(attnlens.__all__) if inspect.isfunction(getattr(attnlens, name)))
)
def test_the_first_line_of_a_public_function_says_what_comes_back(name):
    assert "return" in inspect.getdoc(getattr(attnlens, name)).split("\n")[0].lower()
