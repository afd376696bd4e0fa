"""What the commands say of the shipped ViT is what they said before: every number to 1e-9 of itself.

The numbers were stored before the code was made faster. After a deliberate change of a definition:
``python -m tests.test_stored_outputs``.
"""

import json
import lzma
import math
from pathlib import Path

import pytest

import attnlens

STORED = Path(__file__).parent / "golden" / "embedded_outputs.json.xz"
TOLERANCE = 1e-9
ABOUT_THE_RUN = ("created", "schema_version", "sources")


def outputs() -> dict:
    """Return the numbers that inspect, fit-params, compose and compare give for the shipped ViT."""
    params = attnlens.fit_params()
    compared = attnlens.compare(None, None)
    return json.loads(
        json.dumps({
            "stats": attnlens.inspect(fold="all").stats.json_rows(),
            "params": params.model_dump(mode="json", exclude=set(ABOUT_THE_RUN)),
            "pairs": attnlens.compose().to_json()["pairs"],
            "profiles": [[p.circuit, p.statistic, p.values.tolist()] for p in compared.profiles],
        })
    )  # fmt: skip


def apart(found, stored, place=""):
    """Yield every place where two outputs differ by more than the tolerance, or in what is no number."""
    if isinstance(stored, dict) and isinstance(found, dict):
        for name in stored.keys() | found.keys():
            yield from apart(found.get(name), stored.get(name), f"{place}.{name}")
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        for index, pair in enumerate(zip(found, stored, strict=True)):
            yield from apart(*pair, f"{place}[{index}]")
    elif isinstance(stored, float) and isinstance(found, int | float):
        if not math.isclose(found, stored, rel_tol=TOLERANCE, abs_tol=0.0):
            yield f"{place}: {found!r}, stored {stored!r}"
    elif found != stored:
        yield f"{place}: {found!r}, stored {stored!r}"


@pytest.fixture(scope="module")
def stored():
    return json.loads(lzma.decompress(STORED.read_bytes()))


def test_no_number_has_moved(stored):
    assert list(apart(outputs(), stored)) == []


def test_a_number_that_moved_is_found(stored):
    moved = json.loads(json.dumps(stored))
    moved["stats"][7]["alpha"] *= 1 + 2e-9
    moved["params"]["entries"][3]["verdict"] = "other"
    del moved["pairs"][0]["scores"][0]
    assert [line.partition(":")[0] for line in sorted(apart(moved, stored))] == [
        ".pairs[0].scores",
        ".params.entries[3].verdict",
        ".stats[7].alpha",
    ]


if __name__ == "__main__":
    STORED.write_bytes(lzma.compress(json.dumps(outputs()).encode(), preset=9))
