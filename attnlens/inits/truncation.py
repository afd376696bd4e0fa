"""Splitting a drawn matrix into two factors: the k largest singular directions, or all of them.

    A = U S V^T -> left = U_k sqrt(S_k), right = V_k sqrt(S_k), left @ right^T = the best rank-k approximation of A

Stacks ``[batch, rows, cols]`` of float64 torch tensors on any device; a CPU caller passes one matrix at a time, on a
GPU all heads of a layer go at once. Three ways to the same factors:

- `_dense`: eigenvectors of A^T A in float64; up to width 512, and wherever the others do not apply;
- `_krylov`: a filtered block Krylov space in float32 that holds the k leading directions and some more, then
  Rayleigh-Ritz in float64 inside it; for wide matrices and small k, several times faster;
- all directions of a wide matrix: eigenvectors in float32. The errors of U and V cancel in the product: A to 2e-6.
"""

from __future__ import annotations

import contextlib
from math import cos, sin, sqrt
from typing import TYPE_CHECKING, NamedTuple

from attnlens.statistics.inverse import cut

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_WIDE = 512
"""Up to this width float64 costs little; above it float32 does the O(d^3) work."""
_KRYLOV_SHARE = 1 / 6
"""Largest k / d for which the Krylov space is smaller than the matrix by enough to pay."""
_BLOCK, _DEGREE, _EXTRA = 12, 4, 20
"""Columns added at a time, degree of the filter between them, and directions carried beyond k."""
_FIRST_CHECK = 2.2
"""Size of the Krylov space, in multiples of the wanted directions, at which convergence is first looked at."""
_ACCURACY = 3e-6
"""Bound on the error of the product that ends the iteration, relative to its norm."""


class Band(NamedTuple):
    """Where the singular values lie that `split` does not need: from the smallest to number ``count + 20`` or so."""

    low: float
    high: float


def split(A: Tensor, count: int, unwanted: Band | None = None) -> tuple[Tensor, Tensor]:
    """Return ``left [batch, rows, count]`` and ``right [batch, cols, count]`` of the ``count`` largest directions.

    ``left @ right^T`` is A's best approximation of that rank (A itself where count == cols), largest direction first;
    columns of left and right have equal length, sqrt(s_i). rows >= cols. ``unwanted``, an estimate, lets the fast way
    be taken where it pays; None always takes the exact one.
    """
    import torch

    width = A.shape[-1]
    factors = None
    if unwanted is not None and width > _WIDE and count <= _KRYLOV_SHARE * width:
        with contextlib.suppress(torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # rank lost: the exact way
            factors = _krylov(A, count, unwanted)
    if factors is None:
        wide = width > _WIDE and count == width and A.device.type == "cpu"
        basis = _dense(A.float() if wide else A, count).double()
        factors = A @ basis, basis
    image, basis = factors  # columns u_i s_i and v_i
    roots = torch.linalg.vector_norm(image, dim=-2, keepdim=True).sqrt()
    # A singular vector's sign is the library's choice, and another one's on a GPU: the largest entry of v is positive.
    largest = basis.gather(-2, basis.abs().argmax(-2, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)
    return image * torch.where(roots > 0, signs / roots, 0.0), basis * (roots * signs)


def _dense(A: Tensor, count: int) -> Tensor:
    """Return the ``count`` leading right singular vectors of A, ``[batch, cols, count]``, largest first."""
    import torch

    return torch.linalg.eigh(A.mT @ A).eigenvectors[..., -count:].flip(-1)


def _krylov(A: Tensor, count: int, unwanted: Band) -> tuple[Tensor, Tensor] | None:
    """Return the ``count`` leading u_i s_i and v_i from a block Krylov space, None where it does not converge.

    The space is that of X, F X, F^2 X, ... with X random and F = T_m((G - c) / e) the Chebyshev polynomial that is at
    most 1 on the unwanted eigenvalues [c - e, c + e] of G = A^T A and grows fast above. One Rayleigh-Ritz step of F
    picks count + 20 vectors; one of G in float64 orders those and cuts them at ``count``. What float32 misses of the
    leading directions lies beyond the extra ones: an error of 1e-6, where the cut itself sees float64.
    """
    import torch

    centre, radius = (unwanted.high**2 + unwanted.low**2) / 2, (unwanted.high**2 - unwanted.low**2) / 2
    G = _gram(A.float()).div_(radius)
    G.diagonal(dim1=-2, dim2=-1).sub_(centre / radius)
    batch, width = G.shape[0], G.shape[-1]
    wanted = count + _EXTRA
    most = width // 2 // _BLOCK
    space = G.new_empty(batch, most * _BLOCK, width)  # rows are the orthonormal basis
    projected = G.new_zeros(batch, most * _BLOCK, most * _BLOCK)
    start = torch.Generator().manual_seed(0)  # any start will do: the result does not depend on it
    block = torch.randn(_BLOCK, width, generator=start).to(G).expand(batch, -1, -1)
    block = _orthonormal_rows(block)
    for step in range(most):
        size = (step + 1) * _BLOCK
        here = slice(size - _BLOCK, size)
        space[:, here] = block
        known = space[:, :size]
        image = _chebyshev(G, block)
        overlap = image @ known.mT
        projected[:, here, :size] = overlap
        image = torch.baddbmm(image, overlap, known, alpha=-1)
        image = torch.baddbmm(image, image @ known.mT, known, alpha=-1)
        if size >= _FIRST_CHECK * wanted and step % 2:
            values, vectors = torch.linalg.eigh(projected[:, :size, :size])
            vectors = vectors[..., -wanted:]
            # |F v - value v| of each Ritz vector v, over its distance from what was left out: the angle still missing
            residual = torch.linalg.matrix_norm(image.mT @ vectors[:, -_BLOCK:, -count:])
            angle = residual / (values[:, -count] - values[:, -wanted]).clamp_min(1e-30)
            if bool((angle * sqrt(2 / count) < _ACCURACY).all()):
                return _rayleigh_ritz(A, known.mT @ vectors, count)
        block = _orthonormal_rows(image)
    return None


def _gram(A: Tensor) -> Tensor:
    """Return A^T A from the columns of its lower triangle, five eighths of the whole product's cost."""
    width = A.shape[-1]
    G = A.new_empty(A.shape[0], width, width)
    panel = -(-width // 4)
    for start in range(0, width, panel):
        stop = min(start + panel, width)
        G[:, start:, start:stop] = A[..., start:].mT @ A[..., start:stop]
        G[:, start:stop, stop:] = G[:, stop:, start:stop].mT
    return G


def _chebyshev(G: Tensor, block: Tensor) -> Tensor:
    """Return T_m(G) applied to the rows of ``block``."""
    import torch

    before, now = block, block @ G
    for _ in range(_DEGREE - 1):
        before, now = now, torch.baddbmm(before, now, G, beta=-1, alpha=2)
    return now


def _orthonormal_rows(block: Tensor) -> Tensor:
    import torch

    lower = torch.linalg.cholesky(block @ block.mT)
    return torch.linalg.solve_triangular(lower, block, upper=False)


def _rayleigh_ritz(A: Tensor, space: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return u_i s_i and v_i of the ``count`` unit vectors of a space that A stretches most, in float64."""
    basis = _orthonormal_rows(space.mT.double()).mT
    image = A @ basis
    turn = _dense(image, count)
    return image @ turn, basis @ turn


def unwanted_band(alpha: float, beta: float, count: int, width: int) -> Band | None:
    """Estimate the band `split` may ignore from the law of alpha Z + beta I.

    None where nothing is left over, and where the spectrum is too narrow for float32 to tell directions apart.
    """
    kept = (count + _EXTRA) / width
    if alpha <= 0.05 * abs(beta) or kept >= 1:
        return None
    return Band(singular_value(alpha, beta, 1.0), singular_value(alpha, beta, kept))


def singular_value(alpha: float, beta: float, kept: float) -> float:
    """Return the singular value of alpha Z + beta I above which a share ``kept`` of them lies, at large width.

    With t the angle of `docs/inverse.md` at which that share is kept, r the root of its cubic and s = alpha r e^it:
    w^2 = s + beta^2, and the singular value is Re(w + alpha^2 w / s).
    """
    alpha, beta = abs(alpha), abs(beta)
    t, r = cut(alpha, beta, kept)
    s = alpha * r * complex(cos(t), sin(t))
    w = (s + beta**2) ** 0.5
    return abs((w + alpha**2 * w / s).real)


def haar(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """Draw a uniformly distributed matrix with orthonormal columns, ``[rows, cols]`` with rows >= cols, float64."""
    import torch

    drawn = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    Q, R = torch.linalg.qr(drawn)
    return Q * R.diagonal().sign()
