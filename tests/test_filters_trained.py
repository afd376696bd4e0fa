"""The closed form and its defaults against filters that were trained on images: EfficientNet-Lite0's sixteen layers."""

import numpy as np
import pytest

import attnlens
from attnlens.filters.closed_form import closed_form, explained, fit_closed_form, positions, side
from attnlens.filters.covariance import second_moment
from attnlens.filters.trained import trained_shape

pytestmark = pytest.mark.weights
FEWEST = 33
"""Filters a layer must have for halves of it to say anything: more than the stem's 32."""


@pytest.fixture(scope="module")
def layers(lite0_file):
    """Every layer's spec and filters."""
    found = attnlens.inspect("tf_efficientnet_lite0", checkpoint=lite0_file).filters
    return [(spec, found.read(layer)) for layer, spec in found.specs]


def unit(filters):
    S = second_moment(filters)
    return S / np.trace(S)


def earlier_form(kernel, s):
    """The form this project had before: ``exp(-(|p - q|^2 + |p|^2 + |q|^2) / 2s)``, positions from the centre."""
    sides = []
    for size in kernel:
        x = positions(size)
        exponent = (x[:, None] - x) ** 2 + x[:, None] ** 2 + x**2
        factor = np.exp((exponent.min() - exponent) / (2 * s))
        sides.append(factor / np.trace(factor))
    return np.kron(*sides)


def earlier_fit(S, kernel):
    """Its best mixture with isotropy, over its whole range of widths."""
    best, isotropy = None, np.eye(len(S)) / len(S)
    for relative in np.geomspace(1e-3, 10, 161):
        C = earlier_form(kernel, relative * side(kernel) ** 2)
        beyond = ((C - isotropy) ** 2).sum()
        share = np.clip(((S - isotropy) * (C - isotropy)).sum() / beyond, 0, 1)
        mixture = share * C + (1 - share) * isotropy
        if best is None or ((S - mixture) ** 2).sum() < ((S - best) ** 2).sum():
            best = mixture
    return best


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
    ours, theirs = [], []
    for place, (spec, filters) in enumerate(layers):
        if len(filters) < FEWEST:
            continue
        order = np.random.default_rng(place).permutation(len(filters))
        halves = [unit(filters[half]) for half in np.array_split(order, 2)]
        for one, other in (halves, halves[::-1]):
            form = closed_form(spec.kernel, fit_closed_form(one, spec.kernel, spec.stride).shape)
            ours.append(explained(other, form))
            theirs.append(explained(other, earlier_fit(one, spec.kernel)))
    gained = (np.array(ours) - np.array(theirs)).reshape(15, 2, 3).mean(1)
    assert (gained[:, 0] > 0).sum() >= 12
    assert (gained[:, 2] > 0).sum() >= 12
    assert np.median(ours, axis=0)[0] >= 0.85
    assert np.median(ours, axis=0)[2] >= 0.55


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
