"""The DINOv2-family ViT-S in shared/data: the summed OV products of all 12 layers, held by a golden file.

Regenerate (after a deliberate change of a definition) with
``attnlens inspect vit_small_patch14_dinov2 --checkpoint FILE --output DIR`` and
``python -m tests.test_golden DIR/stats.json``.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import attnlens
from attnlens.circuits import layer_ov
from attnlens.statistics.diagonal import fit_diagonal

GOLDEN = Path(__file__).parent / "golden" / "vit_small_patch14_dinov2.json"
COLUMNS = ("alpha", "beta", "beta_stderr", "diagonal_prominence", "frobenius_norm", "spectral_norm")

# The published account of this file: effective summed-OV diagonal prominence by layer.
EFFECTIVE = [-9.9, -24.4, -8.6, -4.0, -5.3, -2.5, -4.8, -2.4, -3.1, -4.4, -5.2, 0.6]


def golden_rows(rows):
    """Keep the summed OV of each layer and fold, and every head's QK alpha and beta."""
    sums = [row for row in rows if row["head"] == "all"]
    heads = [row for row in rows if row["circuit"] == "qk"]
    return {
        "sums": [[r["layer"], r["fold"], *(float(f"{r[c]:.9g}") for c in COLUMNS)] for r in sums],
        "qk": [[r["layer"], r["head"], r["fold"], *(float(f"{r[c]:.9g}") for c in ("alpha", "beta"))] for r in heads],
    }


@pytest.fixture(scope="module")
def inspection(dinov2_file):
    return attnlens.inspect("vit_small_patch14_dinov2", dinov2_file)


@pytest.mark.weights
def test_real_weights_give_the_golden_statistics(inspection):
    found, expected = golden_rows(inspection.stats.json_rows()), json.loads(GOLDEN.read_text())
    for part in ("sums", "qk"):
        for row, wanted in zip(found[part], expected[part], strict=True):
            assert [v for v in row if isinstance(v, str)] == [v for v in wanted if isinstance(v, str)]
            numbers = [v for v in wanted if not isinstance(v, str)]
            assert [v for v in row if not isinstance(v, str)] == pytest.approx(numbers, rel=1e-7)


@pytest.mark.weights
def test_the_effective_summed_ov_is_a_negative_identity_in_layers_0_to_10(inspection):
    stats = inspection.stats.select(circuit="ov", head="all", fold="effective")
    np.testing.assert_allclose(stats.column("diagonal_prominence"), EFFECTIVE, atol=0.051)
    assert (stats.column("beta")[:11] < 0).all()


@pytest.mark.weights
def test_the_raw_summed_ov_shows_no_diagonal(inspection):
    raw = inspection.stats.select(circuit="ov", head="all", fold="raw").column("diagonal_prominence")
    assert raw.min() == pytest.approx(-1.4, abs=0.051)
    assert raw.max() == pytest.approx(1.0, abs=0.051)


@pytest.mark.weights
def test_the_sign_of_layer_scale_alone_carries_the_effect(inspection):
    weights = inspection.heads(1)
    unsigned = weights.replace(layer_scale=np.abs(weights.layer_scale))
    found = [fit_diagonal(layer_ov(w, "effective"), None).diagonal_prominence for w in (weights, unsigned)]
    assert found[0] < -20
    assert abs(found[1]) < 2


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(golden_rows(json.loads(Path(sys.argv[1]).read_text())["stats"])) + "\n")
