"""What is found, read and written of small attention modules is what their forward pass uses, and what it was.

Every case of `tests.layout_cases` is stored whole: each field of its layout or refusal, and a digest of each array that
is read and of each tensor that writing changes. After a deliberate change: ``python -m tests.test_layouts_stored``,
which stores nothing that the oracle of `tests.test_layouts_forward` does not bear out.
"""

import inspect
import json
import lzma
import math
from pathlib import Path

import pytest
import torch

from attnlens.layouts.describe import attention_spec, rules_by_class
from attnlens.layouts.registry import REFUSED
from tests import layout_forms
from tests.layout_cases import CASES, stored_of
from tests.test_layouts_forward import hold

STORED = Path(__file__).parent / "golden" / "layouts.json.xz"
FOLLOWED = [title for title, case in CASES.items() if case.inputs]


def apart(found, stored, place=""):
    """Yield every place where two outputs differ; numbers that are no whole ones agree to 1e-7."""
    if isinstance(stored, dict) and isinstance(found, dict) and list(stored) == list(found):
        for name in stored:
            yield from apart(found[name], stored[name], f"{place}.{name}")
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        for index, pair in enumerate(zip(found, stored, strict=True)):
            yield from apart(*pair, f"{place}[{index}]")
    elif isinstance(stored, float) and isinstance(found, float):
        if not math.isclose(found, stored, rel_tol=1e-7, abs_tol=1e-7):
            yield f"{place}: {found!r}, stored {stored!r}"
    elif found != stored or type(found) is not type(stored):
        yield f"{place}: {found!r}, stored {stored!r}"


def held(title):
    """Hold what is read of a case against the forward pass of its module."""
    case = CASES[title]
    module = case.build().double().requires_grad_(False)
    torch.manual_seed(1)
    layout_forms.fill_(module)
    arguments = inspect.signature(module.forward).bind(*case.arguments()).arguments
    hold(module, attention_spec(module, ""), dict(arguments), case.without)


@pytest.fixture(scope="module")
def stored():
    return json.loads(lzma.decompress(STORED.read_bytes()))


def test_every_case_is_stored_and_every_class_has_one(stored):
    assert list(stored) == list(CASES)
    assert {case.module_class for case in CASES.values()} == {*rules_by_class(), *REFUSED}


@pytest.mark.parametrize("title", CASES)
def test_a_module_is_read_and_written_as_it_was(stored, title):
    assert list(apart(stored_of(CASES[title].build()), stored[title])) == []


@pytest.mark.parametrize("title", FOLLOWED)
def test_what_is_read_of_a_module_is_what_its_forward_pass_multiplies(title):
    held(title)


def test_what_moved_is_found():
    told = {"a": [1.0, None], "b": "x", "c": 3}
    assert [line.partition(":")[0] for line in apart({"a": [1.0 + 2e-7, 0], "b": "y", "c": True}, told)] == [
        *(".a[0]", ".a[1]", ".b", ".c"),
    ]
    assert list(apart({"a": [1.0, None], "b": "x"}, told)) != []
    assert list(apart({"a": [1.0], "b": "x", "c": 3}, told)) != []


if __name__ == "__main__":
    for followed in FOLLOWED:
        held(followed)
    found = {title: stored_of(case.build()) for title, case in CASES.items()}
    STORED.write_bytes(lzma.compress(json.dumps(found).encode(), preset=9))
