"""The closed form and its defaults against filters that were trained on images: EfficientNet-Lite0's sixteen layers."""

import numpy as np
import pytest

import attnlens
from attnlens.filters.closed_form import closed_form, explained, fit_closed_form
from attnlens.filters.trained import trained_shape
from benchmarks.trained_filters import Layer, held_out, unit

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def layers(lite0_file):
    """Every layer's spec and filters."""
    found = attnlens.inspect("tf_efficientnet_lite0", checkpoint=lite0_file).filters
    return [(spec, found.read(layer)) for layer, spec in found.specs]


def test_the_defaults_explain_most_of_what_is_beyond_isotropy(layers):
    found = [
        explained(unit(filters), closed_form(spec.kernel, trained_shape(spec.strided).at(spec.kernel)))
        for spec, filters in layers
    ]
    assert len(found) == 16
    whole, _, covariances = np.median(found, axis=0)
    assert whole >= 0.6
    assert covariances >= 0.25  # one shape for all layers of a kind: covariances differ more than variances do


def test_a_half_of_the_filters_explains_the_other_better_than_the_earlier_form_does(layers):
    halves = held_out([Layer(filters, spec.stride, 0.0) for spec, filters in layers])
    assert halves.shape == (15, 2, 3)
    gained = halves[:, 0] - halves[:, 1]
    assert (gained[:, 0] > 0).sum() >= 12
    assert (gained[:, 2] > 0).sum() >= 12
    whole, _, covariances = np.median(halves[:, 0], axis=0)
    assert whole >= 0.85
    assert covariances >= 0.55


def test_verdicts_follow_what_is_explained_of_covariances(lite0_file):
    rows = list(attnlens.inspect("tf_efficientnet_lite0", checkpoint=lite0_file).filters.stats.records())
    named = {row["layer"] for row in rows if row["verdict"] == "closed form"}
    assert named == {row["layer"] for row in rows if row["explained_covariances"] >= 0.5} - {0}
    assert rows[0]["verdict"] == "isotropic"  # 32 filters of unequal norms: chance has a rank as low
    assert {row["verdict"] for row in rows if row["layer"] in (4, 8, 9)} == {"structured"}


def test_strided_layers_smooth_and_their_centre_lies_before_the_kernels(layers):
    """TensorFlow pads an even image after its end: the middle of what a filter sees lies before the kernel's."""
    for spec, filters in layers:
        shape = fit_closed_form(unit(filters), spec.kernel, spec.stride).shape
        if spec.strided:
            assert shape.centre[0] == shape.centre[1] < -0.1
            assert shape.contrast <= 0.11
        else:
            assert shape.centre == (0, 0)
