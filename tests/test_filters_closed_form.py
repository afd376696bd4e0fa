"""The closed form is a covariance whatever its width, its fit finds what was put in, and transfer keeps it one."""

import math

import numpy as np
import pytest

from attnlens.filters.closed_form import LARGEST, SMALLEST, closed_form, fit_closed_form, mixture, side
from attnlens.filters.entries import carried_over
from attnlens.filters.transfer import alike, interpolated, resampled, resampling, square_root

KERNELS = [(3, 3), (2, 5), (7, 7), (1, 11), (2, 2)]


def smallest_eigenvalue(covariance):
    return float(np.linalg.eigvalsh(covariance)[0])


def random_covariance(size, seed=0, rank=4):
    factor = np.random.default_rng(seed).normal(size=(size, rank))
    return factor @ factor.T


def by_the_formula(kernel, s):
    """The docstring's equation, entry by entry."""
    places = [(y - (kernel[0] - 1) / 2, x - (kernel[1] - 1) / 2) for y in range(kernel[0]) for x in range(kernel[1])]
    found = np.empty((len(places), len(places)))
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            apart, one, other = (y - v) ** 2 + (x - u) ** 2, y * y + x * x, v * v + u * u
            found[i, j] = math.exp(-apart / (2 * s)) * math.exp(-one / (2 * s)) * math.exp(-other / (2 * s))
    return found / np.trace(found)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("s", [0.6, 2.0, 40.0])
def test_the_closed_form_is_the_equation_of_its_docstring(kernel, s):
    np.testing.assert_allclose(closed_form(kernel, s), by_the_formula(kernel, s), rtol=1e-12)


@pytest.mark.parametrize("kernel", [*KERNELS, (4, 4), (9, 9)])
def test_the_closed_form_is_a_covariance_at_every_width(kernel):
    for relative in np.geomspace(SMALLEST, LARGEST, 9):
        found = closed_form(kernel, relative * side(kernel) ** 2)
        assert np.trace(found) == pytest.approx(1)
        assert (found == found.T).all()
        assert smallest_eigenvalue(found) > -1e-15


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("relative", "isotropic"), [(0.02, 0.0), (0.05, 0.4), (0.3, 0.85), (2.0, 0.1)])
def test_the_fit_finds_the_width_and_the_isotropic_share_that_were_put_in(kernel, relative, isotropic):
    if kernel == (2, 2):
        relative += 0.1  # below, its four positions are independent and have no width
    fit = fit_closed_form(3.7 * mixture(kernel, relative * side(kernel) ** 2, isotropic), kernel)
    assert fit.relative(kernel) == pytest.approx(relative, rel=1e-4)
    assert fit.isotropic == pytest.approx(isotropic, abs=1e-6)
    assert fit.explained == pytest.approx(1, abs=1e-9)
    assert (fit.cosine < 1 - 1e-6) == (isotropic > 0)


def test_goodness_is_what_its_definition_says():
    kernel = (3, 5)
    S = random_covariance(15, rank=9)
    S /= np.trace(S)
    fit = fit_closed_form(S, kernel)
    best = mixture(kernel, fit.s, fit.isotropic)
    form = closed_form(kernel, fit.s)
    isotropy = np.eye(15) / 15
    assert fit.explained == pytest.approx(1 - ((S - best) ** 2).sum() / ((S - isotropy) ** 2).sum())
    assert fit.cosine == pytest.approx((S * form).sum() / np.linalg.norm(S) / np.linalg.norm(form))
    for s in np.geomspace(0.05, 200, 60):  # and no other mixture is nearer
        for isotropic in np.linspace(0, 1, 21):
            assert ((S - mixture(kernel, s, isotropic)) ** 2).sum() >= ((S - best) ** 2).sum() - 1e-12


def test_isotropy_leaves_nothing_to_explain():
    fit = fit_closed_form(np.eye(25), (5, 5))
    assert fit.isotropic == pytest.approx(1)
    assert fit.explained == 0


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
    structure = closed_form((5, 5), 3.0)  # all but singular: its own floor is zero
    found = resampled(0.7 * structure + 0.3 * np.eye(25) / 25, (5, 5), new)
    expected = 0.7 * resampled(structure, (5, 5), new) + 0.3 * np.eye(size) / size
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_the_two_rules_for_kernel_size_agree_where_filters_are_smooth():
    """Linear resampling of the closed form is close to the closed form with s scaled by (k'/k)^2."""
    one, other = resampled(closed_form((5, 5), 3.0), (5, 5), (9, 9)), closed_form((9, 9), 3.0 * (9 / 5) ** 2)
    assert (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other) > 0.99
    wrong = closed_form((9, 9), 3.0)
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
