"""The attention variants by name: how each mixes tokens at the start, in numbers, for every layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from attnlens.errors import UsageError
from attnlens.heads import Array
from attnlens.signal.kernels import (
    Tokens,
    cosines,
    exponential_kernels,
    preserving_attention,
    split_rows,
    uniform_kernels,
)


@dataclass(frozen=True)
class Mix:
    """What a layer does to tokens in place of softmax(Q K^T / sqrt(head_dim)), with W_Q = 0 at the start.

        a I + b diag(D) softmax(Q K^T / sqrt(head_dim) + log P) - c P

    P ``[token, token]`` has rows that sum to one, zero above the diagonal where attention is causal: the softmax of
    zero logits. D ``[token]`` is fixed. a, b and c are trained, one of each a head, from these values; None leaves the
    term a or c out, and b fixed at 1.
    """

    P: Array
    D: Array | None = None
    a: float | None = None
    b: float | None = None
    c: float | None = None

    def matrix(self) -> Array:
        """Return the ``[token, token]`` matrix at the start, where the logits are zero."""
        attention = self.P if self.D is None else self.D[:, None] * self.P
        return (
            (self.a or 0.0) * np.eye(len(self.P))
            + (1.0 if self.b is None else self.b) * attention
            - (self.c or 0.0) * self.P
        )


@dataclass(frozen=True)
class Mixes:
    """The layers of a network, and what is known of them."""

    layers: tuple[Mix, ...]
    kernels: tuple[Array, ...] = ()
    """Sigma_0, ..., Sigma_L where the variant is made to follow such kernels."""
    least: float | None = None
    """Smallest entry of its attention matrices as computed, relative to the largest of its layer."""

    def product_error(self) -> float | None:
        """Return ||A A^T - Sigma_L|| / ||Sigma_L|| of the product A of all layers (Frobenius); None without kernels."""
        if not self.kernels:
            return None
        product = self.kernels[0]
        for mix in self.layers:
            product = mix.matrix() @ product
        return float(np.linalg.norm(product @ product.T - self.kernels[-1]) / np.linalg.norm(self.kernels[-1]))


def softmax(tokens: Tokens, depth: int) -> Mixes:
    """Mix as softmax does at zero logits: every token the mean of all, or of those up to it."""
    return Mixes((Mix(uniform(tokens)),) * depth)


def value_skipinit(tokens: Tokens, depth: int) -> Mixes:
    """Mix by a I + b A, a = 1 and b = 0 at the start."""
    return Mixes((Mix(uniform(tokens), a=1.0, b=0.0),) * depth)


def shaped(tokens: Tokens, depth: int) -> Mixes:
    """Mix by a I + b A - c C, all 1 at the start, C = A at zero logits."""
    return Mixes((Mix(uniform(tokens), a=1.0, b=1.0, c=1.0),) * depth)


def e_spa(tokens: Tokens, depth: int, *, gamma: float = 0.005, distance: str = "sequence") -> Mixes:
    """Mix so that kernels follow `exponential_kernels`: similarity falls with distance."""
    return _preserving(exponential_kernels(depth, gamma, tokens.distances(distance)), tokens)


def u_spa(tokens: Tokens, depth: int, *, rho: float = 0.8) -> Mixes:
    """Mix so that kernels follow `uniform_kernels`: all pairs of tokens are alike."""
    return _preserving(uniform_kernels(depth, rho, tokens.count), tokens)


VARIANTS: Mapping[str, Callable[..., Mixes]] = {
    "softmax": softmax,
    "value-skipinit": value_skipinit,
    "shaped": shaped,
    "e-spa": e_spa,
    "u-spa": u_spa,
}
"""Attention variants by name; their keyword arguments are the options."""


KEEP = "keep"
"""Named in place of a variant where every attention module and its weights stay as they are."""


def accepted_options(attention: str) -> dict[str, Any]:
    """Return the options of a variant with their defaults; raises `UsageError` for a name that is not known."""
    if attention == KEEP:
        return {}
    if attention not in VARIANTS:
        names = [*VARIANTS, KEEP]
        close = get_close_matches(str(attention).replace("_", "-"), names, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(names)}"
        raise UsageError(f"no attention is named {attention!r}: {hint}")
    parameters = inspect.signature(VARIANTS[attention]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def make_mixes(attention: str, tokens: Tokens, depth: int, options: Mapping[str, Any]) -> Mixes | None:
    """Return every layer's `Mix`, None for `KEEP`; raises `UsageError` for an option or value that is not accepted."""
    known = accepted_options(attention)
    for name in options:
        if name not in known:
            raise UsageError(f"attention {attention!r} has no option {name!r}: it accepts {', '.join(known) or 'none'}")
    return None if attention == KEEP else VARIANTS[attention](tokens, depth, **options)


def uniform(tokens: Tokens) -> Array:
    """Return softmax at zero logits: 1 / T everywhere, or 1 / (i + 1) up to the diagonal of row i."""
    allowed = np.ones((tokens.count, tokens.count))
    if tokens.causal:
        allowed = np.tril(allowed)
    return np.asarray(allowed / allowed.sum(1, keepdims=True))


def _preserving(kernels: list[Array], tokens: Tokens) -> Mixes:
    steps = preserving_attention(kernels, tokens.causal)
    layers = []
    for step in steps:
        D, P = split_rows(step.A)
        layers.append(Mix(P, D))
    least = min(step.least / float(step.A.max()) for step in steps)
    return Mixes(tuple(layers), tuple(kernels), least)


def predicted_kernels(
    mixes: Mixes, *, skips: bool, norms: bool, attend_only: bool, bend: Callable[[Array], Array] | None = None
) -> list[Array]:
    """Predict Sigma_0 = I, Sigma_1, ..., the kernels behind each block at the start, in the limit of wide layers.

        attention  Sigma <- [Sigma +] A N(Sigma) A^T        MLP  Sigma <- [Sigma +] M(N(Sigma))

    with Sigma + where there are skips and N(Sigma) = cosines where there are norms, else Sigma. W_V W_O is orthogonal
    and independent of the tokens, so that the terms of a skip add up on average. The MLP maps cosines by ``bend`` and
    keeps the diagonal; with ``attend_only`` there is none. Exact at any width for attention without skips and norms.
    """
    kernel = np.eye(len(mixes.layers[0].P))
    kernels = [kernel]
    for mix in mixes.layers:
        A = mix.matrix()
        branch = A @ (cosines(kernel) if norms else kernel) @ A.T
        kernel = kernel + branch if skips else branch
        if not attend_only:
            assert bend is not None, "the MLP's map of cosines is not known"
            bent = bend(cosines(kernel))
            lengths = np.sqrt(np.diagonal(kernel))
            branch = bent if norms else bent * np.outer(lengths, lengths)
            kernel = kernel + branch if skips else branch
        kernels.append(kernel)
    return kernels
