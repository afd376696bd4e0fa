"""Map requested to realised parameters of the truncated mimetic draw, and back, in closed form.

The draw is `A = alpha * Z + beta * I` (Z Gaussian, variance 1/embed_dim); a head keeps the head_dim largest singular
triplets, `M = U_k S_k V_k^T`, which changes both parameters. `docs/inverse.md` derives the equations below and states
how close they come to finite draws.
"""

from math import hypot, isfinite, pi, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnlens.errors import AttnlensError, UsageError
from attnlens.heads import Array
from attnlens.statistics.roots import bracketed_roots


class UnreachableParametersError(AttnlensError, ValueError):
    """No request, however chosen, makes a product of this rank realise these parameters."""


class Parameters(NamedTuple):
    """The two numbers of `alpha * Z + beta * I`, requested or realised."""

    alpha: float
    beta: float


def realised(alpha: float, beta: float, head_dim: int, embed_dim: int) -> Parameters:
    """Return the parameters a draw of `alpha * Z + beta * I` has after truncation to its head_dim largest directions.

    `beta_r = tr(M) / d`, `alpha_r = sqrt(d) * rms(off-diagonal of M)`, `M = U_k S_k V_k^T` of shape [d, d], in
    expectation and at leading order in d = embed_dim (`docs/inverse.md`: derivation, distance to finite draws).
    head_dim == embed_dim changes nothing.

    Raises:
        UsageError: a parameter is negative (alpha) or not finite, head_dim is outside 1..embed_dim, or alpha is 0 while
            directions are dropped: beta * I has no largest ones.

    >>> alpha, beta = realised(0.7, 0.7, head_dim=64, embed_dim=192)
    >>> print(f"{alpha:.3f} {beta:.3f}")
    0.719 0.394
    """
    kept = _kept_share(head_dim, embed_dim)
    _check_parameters(alpha, beta)
    if kept == 1 or alpha == beta == 0:
        return Parameters(float(alpha), float(beta))
    if alpha == 0:
        raise UsageError(
            f"alpha = 0 leaves beta * I, whose singular values are all equal: which {head_dim} of {embed_dim} "
            "directions are largest is arbitrary. Pass alpha > 0, however small, or head_dim == embed_dim."
        )
    scale = alpha + abs(beta)
    unit_alpha, unit_beta = _truncated(np.array([alpha / scale]), np.array([beta / scale]), np.array([kept]))
    return Parameters(scale * float(unit_alpha[0]), scale * float(unit_beta[0]))


def request(alpha: float, beta: float, head_dim: int, embed_dim: int) -> Parameters:
    """Return the parameters to draw with so that the truncated product realises alpha and beta.

    `realised(*request(alpha, beta, k, d), k, d) == (alpha, beta)`. Scale equivariance leaves one unknown, the share of
    alpha in alpha + |beta|. The identity cosine must lie below that of a rank-k projection,
    `|beta| / hypot(alpha, beta) < sqrt(k / d)`, approached as the requested alpha goes to 0. Close to the bound the
    request is ill-conditioned (its alpha moves as the square root of the gap); what it realises is not.

    Raises:
        UnreachableParametersError: the identity cosine is at or above the bound.
        UsageError: a parameter is negative (alpha) or not finite, or head_dim is outside 1..embed_dim.

    >>> alpha, beta = request(0.7, 0.35, head_dim=64, embed_dim=192)
    >>> print(f"{alpha:.3f} {beta:.3f}")
    0.724 0.584
    """
    found = requests(*(np.array([value]) for value in (alpha, beta, head_dim, embed_dim)))
    if not found.reachable[0]:
        kept = _kept_share(head_dim, embed_dim)
        cosine = abs(beta) / hypot(alpha, beta)
        enough = min(embed_dim, int(embed_dim * cosine**2) + 1)
        raise UnreachableParametersError(
            f"alpha = {alpha:.4g}, beta = {beta:.4g} has identity cosine {cosine:.4g}, but a rank-{head_dim} product "
            f"of width {embed_dim} stays below sqrt(head_dim/embed_dim) = {sqrt(kept):.4g}. "
            f"Pass alpha above {abs(beta) * sqrt(1 / kept - 1):.4g} or head_dim of at least {enough}."
        )
    return Parameters(float(found.alpha[0]), float(found.beta[0]))


class Requests(NamedTuple):
    """What to draw with, ``[n]``; NaN where no request realises the parameters, which is then not ``reachable``."""

    alpha: Array
    beta: Array
    reachable: NDArray[np.bool_]


def requests(alpha: Array, beta: Array, head_dim: NDArray[np.int_], embed_dim: NDArray[np.int_]) -> Requests:
    """Return what `request` does for n pairs of parameters at once, ``[n]`` each; raises `UsageError` as it does."""
    kept = np.array([_kept_share(*sizes) for sizes in zip(head_dim.tolist(), embed_dim.tolist(), strict=True)])
    for pair in zip(alpha.tolist(), beta.tolist(), strict=True):
        _check_parameters(*pair)
    plain = (kept == 1) | ((alpha == 0) & (beta == 0))
    size = np.where(plain, 1.0, alpha + np.abs(beta))
    wanted = np.where(plain, 1.0, alpha / size)  # the share of alpha in alpha + |beta|

    def excess(share: Array) -> Array:
        unit_alpha, unit_beta = _truncated(share, 1 - share, kept)
        return np.asarray(unit_alpha / (unit_alpha + unit_beta) - wanted)

    reachable = plain | (excess(np.zeros_like(wanted)) < 0)
    wanted = np.where(reachable, wanted, 1.0)
    share = bracketed_roots(excess, np.zeros_like(wanted), np.ones_like(wanted))
    scale = size / sum(_truncated(share, 1 - share, kept))
    drawn = np.where(plain, alpha, scale * share), np.where(plain, beta, scale * (1 - share) * np.sign(beta))
    asked, common = (np.where(reachable, values, np.nan) for values in drawn)
    return Requests(asked, common, reachable)


def _truncated(alpha: Array, beta: Array, kept: Array) -> tuple[Array, Array]:
    """Return the large-d realised parameters when the share ``kept`` of the directions stays; all ``[n]``."""
    t, r = _cut(alpha, beta, kept)
    a2, b2 = alpha**2, beta**2
    trace = beta / pi * (t - (b2 + a2 / 2) * np.sin(2 * t) / r**2 - 2 / 3 * alpha * b2 * np.sin(3 * t) / r**3)
    square = (
        (a2 + b2) * t
        + alpha * (r - (a2 + b2) / r) * np.sin(t)
        - (b2**2 + 5 / 2 * a2 * b2 + a2**2 / 2) * np.sin(2 * t) / r**2
        - alpha * b2 * (4 / 3 * b2 + a2) * np.sin(3 * t) / r**3
        - a2 * b2**2 / 2 * np.sin(4 * t) / r**4
    ) / pi
    return np.sqrt(square - trace**2), trace


def cut(alpha: float, beta: float, kept: float) -> tuple[float, float]:
    """Return the angle t in [0, pi] above which a share ``kept`` of the singular values lies, and the cubic's root r.

    The angle runs over the singular values of alpha Z + beta I from the largest down, at large width; beta >= 0.
    """
    t, r = _cut(*(np.array([value], dtype=np.float64) for value in (alpha, beta, kept)))
    return float(t[0]), float(r[0])


def _cut(alpha: Array, beta: Array, kept: Array) -> tuple[Array, Array]:
    def excess(t: Array) -> Array:
        r = _radius(t, alpha, beta)
        share = (t - alpha / r * np.sin(t) - (beta / r) ** 2 * np.sin(2 * t)) / pi
        return np.where(kept == 1, t - pi, share - kept)

    t = bracketed_roots(excess, np.zeros_like(kept), np.full_like(kept, pi))
    return t, _radius(t, alpha, beta)


def _radius(t: Array, alpha: Array, beta: Array) -> Array:
    """Return the largest root r of `r^3 = (alpha^2 + 2 beta^2) r + 2 alpha beta^2 cos(t)`; all three are real."""
    p = alpha**2 + 2 * beta**2
    cosine = alpha * beta**2 * np.cos(t) * (3 / p) ** 1.5
    return np.asarray(2 * np.sqrt(p / 3) * np.cos(np.arccos(np.clip(cosine, -1.0, 1.0)) / 3))  # by rounding beyond


def _kept_share(head_dim: int, embed_dim: int) -> float:
    if not 1 <= head_dim <= embed_dim:
        raise UsageError(f"head_dim = {head_dim} with embed_dim = {embed_dim}: pass 1 <= head_dim <= embed_dim.")
    return head_dim / embed_dim


def _check_parameters(alpha: float, beta: float) -> None:
    if not (isfinite(alpha) and isfinite(beta) and alpha >= 0):
        raise UsageError(
            f"alpha = {alpha}, beta = {beta}: pass finite numbers with alpha >= 0; it is a standard deviation."
        )
