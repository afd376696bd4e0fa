import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import brentq

from attnlens.errors import AttnlensError, UsageError
from attnlens.statistics.inverse import Parameters, UnreachableParametersError, realised, request

RATIOS = (0.03, 0.3, 0.97, 1.0, 1.03, 3.0, 30.0)  # alpha / beta; at 1 the gap of the singular values around 0 closes
SIZES = ((1, 67), (13, 67), (61, 67), (31, 1999))  # head_dim, embed_dim


def truncated_draws(params: Parameters, head_dim: int, embed_dim: int, n: int) -> np.ndarray:
    """Return `[n, (alpha_r, beta_r)]` measured on the dense truncation of n draws of alpha * Z + beta * I."""
    rng = np.random.default_rng(head_dim)
    found = []
    for _ in range(n):
        noise = rng.standard_normal((embed_dim, embed_dim)) / math.sqrt(embed_dim)
        u, s, vt = np.linalg.svd(params.alpha * noise + params.beta * np.eye(embed_dim))
        m = (u[:, :head_dim] * s[:head_dim]) @ vt[:head_dim]
        off_diagonal = m[~np.eye(embed_dim, dtype=bool)]
        found.append((math.sqrt(embed_dim) * math.sqrt(np.mean(off_diagonal**2)), np.trace(m) / embed_dim))
    return np.array(found)


@pytest.mark.parametrize(
    ("alpha", "beta", "embed_dim", "alpha_r", "beta_r"),
    [
        (0.7, 0.7, 192, 0.718, 0.395),
        (0.7, 0.7, 384, 0.600, 0.222),
        (0.7, 0.7, 768, 0.465, 0.119),
    ],
)
def test_the_published_draw_at_head_dim_64_realises_the_measured_means(alpha, beta, embed_dim, alpha_r, beta_r):
    assert realised(alpha, beta, 64, embed_dim) == pytest.approx((alpha_r, beta_r), abs=0.01 * alpha_r)


@pytest.mark.parametrize(("head_dim", "embed_dim", "n"), [(1, 64, 400), (4, 64, 200), (32, 64, 200), (64, 192, 10)])
@pytest.mark.parametrize("ratio", [0.01, -0.5, 1.0, 10.0])
def test_a_request_realises_its_target_within_one_percent_of_the_larger_parameter(head_dim, embed_dim, n, ratio):
    target = realised(abs(ratio), math.copysign(1.0, ratio), head_dim, embed_dim)
    found = truncated_draws(request(*target, head_dim, embed_dim), head_dim, embed_dim, n).mean(axis=0)
    assert np.max(np.abs(found - target)) < 0.01 * max(target.alpha, abs(target.beta))


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_closed_form_agrees_with_the_density_from_the_cubic_of_the_resolvent(ratio):
    alpha, beta = ratio, 1.0

    def densities(x: float) -> tuple[float, float]:
        """Return the density of the singular value x and that density times the overlap <u, v>."""
        a2, b2 = alpha**2, beta**2  # g ((x - a2 g)^2 - b2) = x - a2 g
        roots = np.roots([a2**2, -2 * a2 * x, x * x - b2 + a2, -x])
        g = roots[np.argmin(roots.imag)]
        w = x - a2 * g
        return -2 / math.pi * g.imag, -2 / math.pi * (beta / (w * w - b2)).imag

    edge = brentq(lambda x: densities(x)[0] - 1e-6, alpha + beta, 2 * (alpha + beta), xtol=1e-14)
    cut = 0.8 * (alpha + beta)

    def integral(weight) -> float:
        # x = edge - (edge - cut) y^2 removes the square root at the edge
        span = edge - cut
        return quad(lambda y: weight(edge - span * y * y) * 2 * span * y, 0, 1, epsabs=1e-9, limit=200)[0]

    kept = integral(lambda x: densities(x)[0])
    square = integral(lambda x: x * x * densities(x)[0])
    trace = integral(lambda x: x * densities(x)[1])
    embed_dim = 10**9
    found = realised(alpha, beta, round(kept * embed_dim), embed_dim)
    assert found == pytest.approx((math.sqrt(square - trace**2), trace), rel=1e-5)


def test_pure_noise_keeps_the_second_moment_of_the_quarter_circle():
    embed_dim = 10**9
    cut = 1.3
    kept = quad(lambda s: math.sqrt(4 - s * s) / math.pi, cut, 2)[0]
    square = quad(lambda s: s * s * math.sqrt(4 - s * s) / math.pi, cut, 2)[0]
    assert realised(1.0, 0.0, round(kept * embed_dim), embed_dim) == pytest.approx((math.sqrt(square), 0.0), abs=1e-7)


@pytest.mark.parametrize(("alpha", "beta"), [(0.4, -0.4), (0.0, 0.7), (1.3, 0.0), (0.0, 0.0)])
def test_keeping_every_direction_is_the_identity_map(alpha, beta):
    assert realised(alpha, beta, 67, 67) == (alpha, beta)
    assert request(alpha, beta, 67, 67) == (alpha, beta)


@pytest.mark.parametrize("ratio", RATIOS)
def test_dropping_a_vanishing_share_of_directions_changes_nothing(ratio):
    assert realised(ratio, 1.0, 10**9 - 1, 10**9) == pytest.approx((ratio, 1.0), rel=1e-6)


@pytest.mark.parametrize(("head_dim", "embed_dim"), SIZES)
def test_vanishing_noise_keeps_a_random_projection_of_the_identity(head_dim, embed_dim):
    kept = head_dim / embed_dim
    found = realised(1e-9, 0.7, head_dim, embed_dim)
    assert found == pytest.approx((0.7 * math.sqrt(kept * (1 - kept)), 0.7 * kept), rel=1e-7)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_trace_is_the_derivative_of_half_the_kept_energy(ratio):
    step = 1e-5
    above, below = (np.hypot(*realised(ratio, 1 + sign * step, 13, 67)) ** 2 / 2 for sign in (1, -1))
    assert (above - below) / (2 * step) == pytest.approx(realised(ratio, 1.0, 13, 67).beta, rel=1e-8)


@pytest.mark.parametrize(("head_dim", "embed_dim"), SIZES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_request_undoes_realised(ratio, head_dim, embed_dim):
    drawn = (0.37 * ratio, -0.37)
    assert request(*realised(*drawn, head_dim, embed_dim), head_dim, embed_dim) == pytest.approx(drawn, rel=1e-9)


@pytest.mark.parametrize("function", [realised, request])
def test_scaling_and_sign_pass_through_both_directions(function):
    alpha, beta = function(0.9, 0.3, 13, 67)
    assert function(900.0, -300.0, 13, 67) == pytest.approx((1000 * alpha, -1000 * beta), rel=1e-12)


@pytest.mark.parametrize(("head_dim", "embed_dim"), SIZES)
def test_more_noise_lowers_the_realised_identity_cosine_from_its_bound_to_zero(head_dim, embed_dim):
    pairs = [realised(ratio, 1.0, head_dim, embed_dim) for ratio in np.geomspace(1e-3, 1e3, 301)]
    cosines = np.array([pair.beta / math.hypot(*pair) for pair in pairs])
    bound = math.sqrt(head_dim / embed_dim)
    assert np.all(np.diff(cosines) < 0)
    assert bound * (1 - 1e-6) < cosines[0] < bound
    assert cosines[-1] < 1e-2


def test_a_request_without_identity_has_none():
    assert request(1.0, 0.0, 13, 67).beta == 0.0
    assert request(0.0, 0.0, 13, 67) == (0.0, 0.0)


@pytest.mark.parametrize(("head_dim", "embed_dim"), SIZES)
def test_targets_up_to_the_cosine_bound_are_solved_and_those_above_refused(head_dim, embed_dim):
    kept = head_dim / embed_dim
    steepest = math.sqrt(1 / kept - 1)  # alpha / |beta| on the bound
    for margin in (1e-2, 1e-6, 1e-10):
        target = (steepest * (1 + margin), -1.0)
        assert realised(*request(*target, head_dim, embed_dim), head_dim, embed_dim) == pytest.approx(target, rel=1e-12)
        with pytest.raises(UnreachableParametersError):
            request(steepest * (1 - margin), -1.0, head_dim, embed_dim)


def test_the_refusal_names_the_values_the_bound_and_the_way_out():
    with pytest.raises(UnreachableParametersError) as refusal:
        request(0.1, 0.7, 64, 192)
    assert str(refusal.value) == (
        "alpha = 0.1, beta = 0.7 has identity cosine 0.9899, but a rank-64 product of width 192 stays below "
        "sqrt(head_dim/embed_dim) = 0.5774. Pass alpha above 0.9899 or head_dim of at least 189."
    )
    assert isinstance(refusal.value, AttnlensError)
    assert request(0.1, 0.7, 189, 192).alpha > 0
    with pytest.raises(UnreachableParametersError, match="head_dim of at least 192"):
        request(0.0, 0.7, 64, 192)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: realised(0.0, 0.7, 64, 192), "which 64 of 192 directions are largest is arbitrary"),
        (lambda: realised(-0.1, 0.7, 64, 192), "alpha = -0.1, beta = 0.7: pass finite numbers with alpha >= 0"),
        (lambda: request(math.nan, 0.7, 64, 192), "alpha = nan"),
        (lambda: request(0.7, math.inf, 64, 192), "beta = inf"),
        (lambda: request(0.7, 0.7, 193, 192), "pass 1 <= head_dim <= embed_dim"),
        (lambda: realised(0.7, 0.7, 0, 192), "pass 1 <= head_dim <= embed_dim"),
    ],
)
def test_malformed_input_is_refused_with_the_accepted_range(call, text):
    with pytest.raises(UsageError, match=text):
        call()
