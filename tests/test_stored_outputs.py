"""What the commands say of the shipped ViT and of DINOv2's ViT-S is what they said before: every number to 1e-9.

The numbers were stored before the code was made faster. After a deliberate change of a definition:
``python -m tests.test_stored_outputs [VIT-S.safetensors]``.
"""

import json
import lzma
import math
import sys
from pathlib import Path

import pytest

import attnlens

GOLDEN = Path(__file__).parent / "golden"
STORED, STORED_SMALL = GOLDEN / "embedded_outputs.json.xz", GOLDEN / "vit_small_outputs.json.xz"
TOLERANCE = 1e-9
ROUNDING = {"balance_residual": 384 * sys.float_info.epsilon}
"""Absolute error of what is a distance from 1: that of a sum of 384 squares, whose order the processor decides."""
ABOUT_THE_RUN = ("created", "schema_version", "sources")
SMALL = "vit_small_patch14_dinov2.lvd142m"


def outputs(*model) -> dict:
    """Return the numbers that inspect, fit-params and compose give for a model, the shipped ViT by itself."""
    checkpoint = dict(zip(("checkpoint",), model[1:], strict=False))
    params = attnlens.fit_params(*model[:1], **checkpoint)
    return json.loads(
        json.dumps({
            "stats": attnlens.inspect(*model, fold="all").stats.json_rows(),
            "params": params.model_dump(mode="json", exclude=set(ABOUT_THE_RUN)),
            "pairs": attnlens.compose(*model).to_json()["pairs"],
        })
    )  # fmt: skip


def embedded_outputs() -> dict:
    """Return also what compare says of the shipped ViT."""
    profiles = [[p.circuit, p.statistic, p.values.tolist()] for p in attnlens.compare(None, None).profiles]
    return {**outputs(), "profiles": profiles}


def small_outputs(file: Path) -> dict:
    """Return the numbers of a trained ViT-S, without gains by channel and what follows from scores of compositions."""
    found = outputs(SMALL, file)
    params = {name: value for name, value in found["params"].items() if name != "gains"}
    pairs = [{name: value for name, value in pair.items() if name != "deviations"} for pair in found["pairs"]]
    return {**found, "params": params, "pairs": pairs}


def apart(found, stored, place=""):
    """Yield every place where two outputs differ by more than the tolerance, or in what is no number."""
    if isinstance(stored, dict) and isinstance(found, dict):
        for name in stored.keys() | found.keys():
            yield from apart(found.get(name), stored.get(name), f"{place}.{name}")
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        for index, pair in enumerate(zip(found, stored, strict=True)):
            yield from apart(*pair, f"{place}[{index}]")
    elif isinstance(stored, float) and isinstance(found, int | float):
        rounding = ROUNDING.get(place.rpartition(".")[2], 0.0)
        if not math.isclose(found, stored, rel_tol=TOLERANCE, abs_tol=rounding):
            yield f"{place}: {found!r}, stored {stored!r}"
    elif found != stored:
        yield f"{place}: {found!r}, stored {stored!r}"


def read(path: Path) -> dict:
    """Return what was stored."""
    return json.loads(lzma.decompress(path.read_bytes()))


@pytest.fixture(scope="module")
def stored():
    return read(STORED)


def test_no_number_has_moved(stored):
    assert list(apart(embedded_outputs(), stored)) == []


def test_no_number_of_a_trained_vit_small_has_moved(dinov2_file):
    assert list(apart(small_outputs(dinov2_file), read(STORED_SMALL))) == []


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


def store(path: Path, found: dict) -> None:
    """Write what is found in the place of what was stored."""
    path.write_bytes(lzma.compress(json.dumps(found).encode(), preset=9))


if __name__ == "__main__":
    store(STORED, embedded_outputs())
    for file in sys.argv[1:]:
        store(STORED_SMALL, small_outputs(Path(file)))
