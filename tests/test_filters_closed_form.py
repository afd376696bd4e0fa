"""The closed form is a covariance whatever its shape, its fit finds what was put in, and transfer keeps it one."""

import itertools
import math

import numpy as np
import pytest

from attnlens.filters.closed_form import (
    NARROWEST,
    Shape,
    closed_form,
    explained,
    fit_closed_form,
    side,
    width_bound,
    width_range,
    within_range,
)
from attnlens.filters.entries import carried_over
from attnlens.filters.trained import trained_shape
from attnlens.filters.transfer import alike, interpolated, resampled, resampling, square_root

KERNELS = [(3, 3), (2, 5), (7, 7), (1, 11), (3, 7)]


def smallest_eigenvalue(covariance):
    return float(np.linalg.eigvalsh(covariance)[0])


def random_covariance(size, seed=0, rank=4):
    factor = np.random.default_rng(seed).normal(size=(size, rank))
    return factor @ factor.T


def smooth(kernel, s):
    """Smoothing and slopes alone: smooth filters."""
    return closed_form(kernel, Shape(s, 0.6, 0.4, 0.0))


def by_the_formula(kernel, shape):
    """The docstring's equation, entry by entry."""
    rows, columns = kernel
    places = [
        (y - (rows - 1) / 2 - shape.centre[0], x - (columns - 1) / 2 - shape.centre[1])
        for y in range(rows)
        for x in range(columns)
    ]
    g = [math.exp(-(y * y + x * x) / (2 * shape.s)) for y, x in places]
    n = [math.exp(-(y * y + x * x) / (2 * 0.25)) for y, x in places]
    v = [a / sum(n) - b / sum(g) for a, b in zip(n, g, strict=True)]
    slopes = [
        [y * a for (y, _), a in zip(places, g, strict=True)],
        [x * a for (_, x), a in zip(places, g, strict=True)],
    ]
    slope_norm = sum(a * a for slope in slopes for a in slope)
    found = np.empty((len(places), len(places)))
    for i, j in itertools.product(range(len(places)), repeat=2):
        found[i, j] = (
            shape.blur * g[i] * g[j] / sum(a * a for a in g)
            + shape.slope * sum(slope[i] * slope[j] for slope in slopes) / slope_norm
            + shape.contrast * v[i] * v[j] / sum(a * a for a in v)
            + (1 - shape.blur - shape.slope - shape.contrast) * (i == j) / len(places)
        )
    return found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "shape", [Shape(0.6, 0.2, 0.3, 0.4), Shape(2.0, 0.5, 0.0, 0.25, (0.5, -0.7)), Shape(8.0, 0.0, 0.6, 0.1)]
)
def test_the_closed_form_is_the_equation_of_its_docstring(kernel, shape):
    np.testing.assert_allclose(closed_form(kernel, shape), by_the_formula(kernel, shape), atol=1e-14)


@pytest.mark.parametrize("kernel", [*KERNELS, (4, 4), (9, 9), (2, 2), (1, 2)])
def test_the_closed_form_is_a_covariance_at_every_width_and_share(kernel):
    for s in np.geomspace(*width_range(kernel), 7):
        for shares in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0.2, 0.1, 0.4)):
            found = closed_form(kernel, Shape(s, *shares))
            assert np.trace(found) == pytest.approx(1)
            np.testing.assert_array_equal(found, found.T)
            assert smallest_eigenvalue(found) > -1e-15


def test_a_part_that_a_kernel_cannot_hold_leaves_its_share_to_isotropy():
    """All four places of a 2 x 2 kernel are equally far from its centre: there is no contrast."""
    np.testing.assert_allclose(closed_form((2, 2), Shape(1.0, 0.0, 0.0, 0.7)), np.eye(4) / 4)
    fit = fit_closed_form(closed_form((2, 2), Shape(1.0, 0.5, 0.2, 0.0)), (2, 2))
    np.testing.assert_allclose(fit.shape.shares, [0.5, 0.2, 0.0], atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("relative", "shares"),
    [(0.05, (0.1, 0.2, 0.3)), (0.12, (0.7, 0.1, 0.0)), (0.4, (0.0, 0.3, 0.5)), (0.08, (0.5, 0.3, 0.2))],
)
def test_the_fit_finds_the_width_and_the_shares_that_were_put_in(kernel, relative, shares):
    shape = Shape(max(relative * side(kernel) ** 2, 1.5 * NARROWEST), *shares)
    fit = fit_closed_form(3.7 * closed_form(kernel, shape), kernel)
    assert fit.shape.s == pytest.approx(shape.s, rel=1e-3)
    np.testing.assert_allclose(fit.shape.shares, shares, atol=1e-4)
    assert fit[1:] == pytest.approx((1, 1, 1), abs=1e-6)


@pytest.mark.parametrize(("stride", "centre"), [((2, 2), (-0.6, -0.6)), ((2, 1), (0.45, 0.0)), ((1, 3), (0.0, 0.8))])
def test_the_centre_is_found_along_axes_of_stride_above_1_and_fixed_along_others(stride, centre):
    put_in = closed_form((5, 5), Shape(1.7, 0.5, 0.2, 0.1, centre))
    fit = fit_closed_form(put_in, (5, 5), stride)
    np.testing.assert_allclose(fit.shape.centre, centre, atol=1e-3)
    assert fit.explained == pytest.approx(1, abs=1e-6)
    fixed = fit_closed_form(put_in, (5, 5))
    assert fixed.shape.centre == (0, 0)
    assert fixed.explained < 0.95


@pytest.mark.parametrize("seed", range(4))
def test_no_other_shape_lies_nearer(seed):
    """The fit against shapes by the thousand, each with its distance by the dense matrices."""
    kernel = (3, 5)
    S = random_covariance(15, seed, rank=9) + 9 * closed_form(kernel, Shape(1.0, 0.4, 0.1, 0.5))
    S /= np.trace(S)
    best = ((S - closed_form(kernel, fit_closed_form(S, kernel).shape)) ** 2).sum()
    steps = np.linspace(0, 1, 9)
    for s in np.geomspace(*width_range(kernel), 12):
        for shares in itertools.product(steps, repeat=3):
            if sum(shares) <= 1:
                assert ((S - closed_form(kernel, Shape(s, *shares))) ** 2).sum() >= best - 1e-9


def test_explained_is_what_its_definition_says_of_all_variances_and_covariances():
    S, form = (random_covariance(9, seed) for seed in (1, 2))
    S, form = S / np.trace(S), form / np.trace(form)
    isotropy, off = np.eye(9) / 9, ~np.eye(9, dtype=bool)
    wanted = (
        1 - ((S - form) ** 2).sum() / ((S - isotropy) ** 2).sum(),
        1 - ((S - form)[~off] ** 2).sum() / ((S - isotropy)[~off] ** 2).sum(),
        1 - ((S - form)[off] ** 2).sum() / (S[off] ** 2).sum(),
    )
    assert explained(S, form) == pytest.approx(wanted)
    fit = fit_closed_form(S, (3, 3))
    assert fit[1:] == pytest.approx(explained(S, closed_form((3, 3), fit.shape)))


def test_variances_alone_are_no_covariances():
    """A diagonal that falls off from the centre is explained in part, of covariances there is nothing to explain."""
    g = closed_form((5, 5), Shape(1.5, 1.0, 0.0, 0.0))
    fit = fit_closed_form(np.diag(np.diag(g)), (5, 5))
    assert fit.explained_variances > 0.2
    assert fit.explained_covariances == 0


def test_isotropy_leaves_nothing_to_explain():
    fit = fit_closed_form(np.eye(25), (5, 5))
    assert fit.shape.isotropic == pytest.approx(1)
    assert fit[1:] == (0, 0, 0)


def test_a_width_at_an_end_of_its_range_is_told_from_one_inside():
    flat = closed_form((5, 5), Shape(4000.0, 0.4, 0.2, 0.2))
    assert width_bound(fit_closed_form(flat, (5, 5)).shape.s, (5, 5)) == "upper"
    narrow = closed_form((5, 5), Shape(0.1, 0.5, 0.2, 0.0))
    assert width_bound(fit_closed_form(narrow, (5, 5)).shape.s, (5, 5)) == "lower"
    assert width_bound(1.0, (5, 5)) == ""
    assert [within_range(s, (3, 3)) for s in (0.01, 2.0, 50.0)] == [0.3, 2.0, 9.0]


@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (2, 2), (1, 9)])
def test_the_shape_of_trained_networks_is_one_for_every_kernel(kernel):
    for strided in (False, True):
        shape = trained_shape(strided).at(kernel)
        low, high = width_range(kernel)
        assert low <= shape.s <= high
        assert smallest_eigenvalue(closed_form(kernel, shape)) > 0


def test_resampling_keeps_sizes_constants_and_mirror_images():
    np.testing.assert_array_equal(resampling(5, 5), np.eye(5))
    for old, new in ((5, 7), (7, 3), (4, 9), (1, 5)):
        A = resampling(old, new)
        np.testing.assert_allclose(A.sum(1), 1)
        np.testing.assert_allclose(A[::-1, ::-1], A, atol=1e-15)
    np.testing.assert_allclose(resampling(2, 4), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])


@pytest.mark.parametrize("new", [(3, 3), (7, 7), (4, 6), (9, 9)])
def test_another_kernel_size_has_a_covariance_again(new):
    found = resampled(random_covariance(25), (5, 5), new)
    assert found.shape == (new[0] * new[1],) * 2
    assert np.trace(found) == pytest.approx(1)
    assert smallest_eigenvalue(found) > -1e-15


def test_filters_resampled_have_the_covariance_resampled():
    rng, old, new = np.random.default_rng(0), (3, 5), (4, 7)
    filters = rng.normal(size=(11, *old))
    rows, columns = resampling(old[0], new[0]), resampling(old[1], new[1])
    theirs = np.stack([rows @ one @ columns.T for one in filters]).reshape(11, -1)
    flat = filters.reshape(11, -1)
    expected = theirs.T @ theirs
    np.testing.assert_allclose(resampled(flat.T @ flat, old, new), expected / np.trace(expected), atol=1e-12)


@pytest.mark.parametrize("new", [(3, 3), (7, 7), (4, 9)])
def test_a_white_floor_stays_white_at_another_kernel_size(new):
    """Linear resampling alone would make neighbours alike in filters that have no structure."""
    size = new[0] * new[1]
    np.testing.assert_allclose(resampled(np.eye(25), (5, 5), new), np.eye(size) / size, atol=1e-14)
    structure = smooth((5, 5), 3.0)  # singular: its own floor is zero
    found = resampled(0.7 * structure + 0.3 * np.eye(25) / 25, (5, 5), new)
    expected = 0.7 * resampled(structure, (5, 5), new) + 0.3 * np.eye(size) / size
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_two_rules_for_kernel_size_agree_where_filters_are_smooth():
    """Linear resampling of the closed form is close to the closed form with s scaled by (k'/k)^2."""
    one, other = resampled(smooth((5, 5), 3.0), (5, 5), (9, 9)), smooth((9, 9), 3.0 * (9 / 5) ** 2)
    assert (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other) > 0.98
    wrong = smooth((9, 9), 3.0)
    assert (one * wrong).sum() / np.linalg.norm(one) / np.linalg.norm(wrong) < 0.95


def test_interpolation_in_depth_goes_through_its_ends_and_stays_a_covariance():
    first, last = random_covariance(9, 1), random_covariance(9, 2)
    np.testing.assert_array_equal(interpolated([0.25, 0.75], [first, last], 0.0), first)
    np.testing.assert_array_equal(interpolated([0.25, 0.75], [first, last], 0.75), last)
    np.testing.assert_array_equal(interpolated([0.25, 0.75], [first, last], 1.0), last)
    between = interpolated([0.25, 0.75], [first, last], 0.35)
    np.testing.assert_allclose(between, 0.8 * first + 0.2 * last)
    assert smallest_eigenvalue(between) > -1e-14
    assert smallest_eigenvalue(2 * first - last) < -0.1  # what extrapolating would have given


def test_filters_along_other_axes_do_not_stand_for_each_other():
    assert alike((7, 7), (3, 5))
    assert not alike((1, 7), (7, 7))
    assert carried_over([], 0.5, (3, 3)) is None


def test_the_square_root_is_one_also_of_a_singular_matrix():
    covariance = random_covariance(16, rank=2)
    root = square_root(covariance)
    np.testing.assert_allclose(root @ root, covariance, atol=1e-12)
    np.testing.assert_array_equal(root, square_root(covariance))
