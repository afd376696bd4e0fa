"""What the tool says to people is said in one way: numbers agree with what they count."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "attnlens"
LAYOUTS = PACKAGE / "layouts"
COUNTED = (
    *("architectures", "arms", "blocks", "classes", "contrasts", "cores", "devices", "epochs", "files", "groups"),
    *("heads", "layers", "models", "pairs", "requests", "runs", "seeds", "shards", "sources", "tensors", "tokens"),
    "windows",
)
PLURAL = re.compile(rf"^ (?:[a-z-]+ )?({'|'.join(COUNTED)})\b")
NEVER_ONE = {
    "SCREENING_BELOW",
    "number",  # words.counted itself
    "len(classes)",  # of a data set, which has two at least
    "len(split.classes)",
    "params.fold",
    "propagation.tokens",
    "self.tokens",
    "len(self.log_P)",
    "len(kernel)",
    "group",  # of heads that share a projection: said of two or more
    "groups[0]",
    "layer.query_groups",
    "layer.value_groups",
    "format_",
    "shape.contrast",
    "family.name",
    "opened.name",
    "'%' if metric.share else ''",
}
"""Expressions that never are 1, or no number at all."""


def sentences() -> list[tuple[str, ast.JoinedStr]]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if LAYOUTS not in path.parents:
            tree = ast.parse(path.read_text())
            texts = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
            found += [(f"{path.relative_to(PACKAGE)}:{text.lineno}", text) for text in texts]
    return found


def plurals_by_hand(text: ast.JoinedStr) -> list[str]:
    """Return the numbers of an f-string that are followed by a plural, or by an s that is multiplied."""
    found = [
        ast.unparse(value.value)
        for value, after in zip(text.values, text.values[1:], strict=False)
        if isinstance(value, ast.FormattedValue)
        and isinstance(after, ast.Constant)
        and PLURAL.match(after.value)
        and not ast.unparse(value.value).startswith("counted(")
    ]
    parts = [ast.unparse(value.value) for value in text.values if isinstance(value, ast.FormattedValue)]
    return [*(one for one in found if one not in NEVER_ONE), *(one for one in parts if re.match(r"'e?s' \*", one))]


def test_a_number_and_what_it_counts_are_written_by_counted():
    assert len(sentences()) > 500
    wrong = [(place, found) for place, text in sentences() if (found := plurals_by_hand(text))]
    assert wrong == []


def test_templates_write_a_number_and_what_it_counts_by_counted():
    templates = sorted((PACKAGE / "templates").glob("*.j2"))
    assert len(templates) > 2
    wrong = []
    for path in templates:
        for number, after in re.findall(r"{{ ([^}]*) }}( [a-z -]*)", path.read_text()):
            if PLURAL.match(after) and "counted" not in number:
                wrong.append((path.name, number, after))
    assert wrong == []


@pytest.mark.parametrize(
    "planted",
    ["f'{len(rows)} layers'", "f'of {n} seeds'", "f'{n} training runs ended'", "f'{n} class{\"es\" * (n > 1)}'"],
)
def test_a_plural_by_hand_is_seen(planted):
    assert plurals_by_hand(ast.parse(planted, mode="eval").body)
