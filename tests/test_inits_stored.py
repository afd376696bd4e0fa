"""What a seed draws, and what is said of it and of planted mistakes, is what it was: a seed is a promise.

Stored of every case of `tests.drawn_cases`: norms and projections of each tensor, every row of the reports, every
sentence. Numbers agree to 1e-5, no bits are compared. After a deliberate change: ``python -m tests.test_inits_stored``.
"""

import json
import lzma
import math
import re
from decimal import Decimal
from pathlib import Path

import pytest

from tests.drawn_cases import CASES

STORED = Path(__file__).parent / "golden" / "drawn.json.xz"
RELATIVE, ABSOLUTE, ROUNDING = 1e-5, 3e-6, "3e-7"
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def apart(found, stored, place=""):
    """Yield every place where two outputs differ."""
    if isinstance(stored, dict) and isinstance(found, dict):
        for name in stored.keys() | found.keys():
            yield from apart(found.get(name, "nothing"), stored.get(name, "nothing"), f"{place}.{name}")
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        for index, pair in enumerate(zip(found, stored, strict=True)):
            yield from apart(*pair, f"{place}[{index}]")
    elif isinstance(stored, float) and isinstance(found, int | float):
        if not math.isclose(found, stored, rel_tol=RELATIVE, abs_tol=ABSOLUTE):
            yield f"{place}: {found!r}, stored {stored!r}"
    elif isinstance(stored, str) and isinstance(found, str):
        if not same_text(found, stored):
            yield f"{place}: {found!r}, stored {stored!r}"
    elif found != stored or type(found) is not type(stored):
        yield f"{place}: {found!r}, stored {stored!r}"


def same_text(found, stored):
    """Whether two sentences are one, but for the last digit of numbers that are no whole ones, and for rounding."""
    if NUMBER.split(found) != NUMBER.split(stored):
        return False
    pairs = zip(map(Decimal, NUMBER.findall(found)), map(Decimal, NUMBER.findall(stored)), strict=True)
    return all(abs(one - other) <= _leeway(other) for one, other in pairs)


def _leeway(number):
    last = int(number.as_tuple().exponent)
    return max(Decimal(1).scaleb(last), Decimal(ROUNDING)) if last < 0 else 0


@pytest.fixture(scope="module")
def stored():
    return json.loads(lzma.decompress(STORED.read_bytes()))


def test_every_case_is_stored(stored):
    assert stored.keys() == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_a_seed_draws_what_it_drew_and_the_same_is_said_of_it(stored, case):
    assert list(apart(CASES[case](), stored[case])) == []


def test_what_moved_is_found():
    assert same_text("alpha is 0.4123 of 7", "alpha is 0.4124 of 7")
    for other in ("alpha is 0.4126 of 7", "alpha is 0.4123 of 8", "beta is 0.4123 of 7"):
        assert not same_text("alpha is 0.4123 of 7", other)
    told = {"a": [1.0, None], "b": "x", "c": 3}
    moved = {"a": [1.0 + 2e-5, None], "b": "y", "c": 4, "d": None}
    assert sorted(line.partition(":")[0] for line in apart(moved, told)) == [".a[0]", ".b", ".c", ".d"]


if __name__ == "__main__":
    STORED.write_bytes(lzma.compress(json.dumps({name: case() for name, case in CASES.items()}).encode(), preset=9))
