"""Profiles over relative depth and their trend, against closed forms."""

import numpy as np
import pytest
from pydantic import ValidationError

from attnlens.statistics.depth import GRID, Profile, Trend, relative_depth, rms_over_depth


def test_a_parabola_is_found_again_and_what_is_left_is_its_residual():
    depth = np.array([0.0, 0.1, 0.4, 0.7, 1.0])
    values = 2 - 3 * depth + 5 * depth**2
    exact = Trend.fit(depth.tolist(), values)
    assert exact.coefficients == pytest.approx([2, -3, 5])
    assert exact.residual_sd == pytest.approx(0, abs=1e-12)
    assert exact(0.5) == pytest.approx(2 - 1.5 + 1.25)
    cubic = Trend.fit(depth.tolist(), values + depth**3)
    design = np.vander(depth, 3, increasing=True)
    solution, *_ = np.linalg.lstsq(design, values + depth**3, rcond=None)
    assert cubic.coefficients == pytest.approx(solution.tolist())
    left = values + depth**3 - design @ solution
    assert cubic.residual_sd == pytest.approx(np.sqrt((left**2).mean()))


@pytest.mark.parametrize(
    ("depths", "values", "coefficients", "spread"),
    [
        ([0.5], [3.0], [3.0], 0.0),
        ([0.5, 0.5], [3.0, 5.0], [4.0], 1.0),
        ([0.0, 1.0, 1.0], [1.0, 2.0, 4.0], [1, 2], np.sqrt(2 / 3)),
    ],
)
def test_few_depths_allow_a_lower_degree(depths, values, coefficients, spread):
    found = Trend.fit(depths, np.array(values))
    assert found.coefficients == pytest.approx(coefficients)
    assert found.residual_sd == pytest.approx(spread)


@pytest.mark.parametrize("wrong", [{"coefficients": []}, {"residual_sd": -1.0}, {"residual_sd": np.nan}, {"more": 1}])
def test_a_trend_that_is_none_is_refused(wrong):
    with pytest.raises(ValidationError):
        Trend(**({"coefficients": [1.0], "residual_sd": 0.0} | wrong))
    assert Trend(coefficients=[1.0], residual_sd=0.0)(0.3) == 1
    with pytest.raises(ValidationError):
        Trend(coefficients=[1.0], residual_sd=0.0).residual_sd = 1.0


def test_relative_depth_runs_from_zero_to_one_and_is_a_half_for_one_layer():
    assert [relative_depth(layer, 5) for layer in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [relative_depth(layer, 2) for layer in range(2)] == [0, 1]
    assert relative_depth(0, 1) == 0.5


def test_a_profile_is_linear_between_its_layers_and_its_root_mean_square_is_the_integrals():
    profile = Profile("model", "qk", "beta", np.array([0.0, 0.5, 1.0]), np.array([1.0, 3.0, -1.0]))
    np.testing.assert_allclose(profile.at(np.array([0.25, 0.5, 0.875])), [2, 3, 0])
    assert (GRID[0], GRID[-1]) == (0, 1)
    assert rms_over_depth(np.full_like(GRID, -3.0)) == pytest.approx(3)
    assert rms_over_depth(GRID) == pytest.approx(1 / np.sqrt(3), rel=1e-4)
    step = np.where(GRID < 0.5, 0.0, 2.0)
    assert rms_over_depth(step) == pytest.approx(np.sqrt(2), abs=0.02)
