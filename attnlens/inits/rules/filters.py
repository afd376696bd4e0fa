"""Depthwise filters drawn with a covariance: a closed form that widens with depth, or one measured elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnlens.errors import UsageError
from attnlens.filters.closed_form import LARGEST, SMALLEST, mixture, side
from attnlens.filters.transfer import square_root
from attnlens.heads import Array
from attnlens.inits.plan import FilterLayer, FilterPlan, Network, Rule
from attnlens.inits.registry import choose, initialiser, number
from attnlens.inits.rules.fitted import Form, load_params

DEFAULTS = (0.02, 0.25, 0.0)
"""``s_first``, ``s_last`` and ``isotropic``, this project's own choice."""


@initialiser("conv-covariance")
def conv_covariance(
    network: Network,  # noqa: ARG001  # the signature of every initialiser
    *,
    params: Any = None,
    form: Form | None = None,
    s_first: float = DEFAULTS[0],
    s_last: float = DEFAULTS[1],
    isotropic: float = DEFAULTS[2],
) -> Rule:
    """Draw the filters of every depthwise convolution from N(0, Sigma), Sigma the same for all filters of a layer.

    ``form="parametric"``, the default without ``params``: ``Sigma = (1 - w) C + w I / p`` with ``C[p, q] ~ exp(-|p -
    q|^2 / 2s) exp(-|p|^2 / 2s) exp(-|q|^2 / 2s)``, p and q positions from the kernel's centre. ``s / side^2`` grows
    geometrically with relative depth from ``s_first`` to ``s_last`` and w is ``isotropic``; with ``params`` both follow
    the trends measured there. ``form="full"``, the default with ``params``: the covariances measured there (an
    `InitParams`, the path of its file, or a model to fit), carried over as `InitParams.filter_covariance` says. All
    filters of a layer are multiplied by one number, so that their sum of squares is the one the layer holds now: in a
    new network the scale of its own initialisation. Biases zero. Inspired by Trockman, Willmott & Kolter, ICLR 2023
    (arXiv 2210.03651), whose closed form was not at hand.
    """
    fitted = None if params is None else load_params(params)
    resolved = choose("form", form or ("parametric" if fitted is None else "full"), ("full", "parametric"))
    if fitted is None and resolved == "full":
        raise UsageError("form = 'full' needs params: covariances that `attnlens fit-params` measured in some network")
    if fitted is not None and (s_first, s_last, isotropic) != DEFAULTS:
        raise UsageError("s_first, s_last and isotropic go without params: with them, width and share are measured")
    share = number("isotropic", isotropic, 0)
    if share > 1:
        raise UsageError(f"isotropic = {isotropic!r} is not accepted: pass a share, from 0 to 1")
    first, last = (_relative(*given) for given in (("s_first", s_first), ("s_last", s_last)))

    def target(layer: FilterLayer) -> Array | None:
        if fitted is not None:
            return fitted.filter_covariance(layer.depth, layer.spec.kernel, resolved)
        relative = first ** (1 - layer.depth) * last**layer.depth
        return mixture(layer.spec.kernel, relative * side(layer.spec.kernel) ** 2, share)

    def plan(layer: FilterLayer) -> FilterPlan:
        if not layer.filters.any():
            return FilterPlan(skipped="holds zeros only: there is no scale to keep")
        covariance = target(layer)
        if covariance is None:
            h, w = layer.spec.kernel
            return FilterPlan(skipped=f"has {h} x {w} filters, and the parameters hold none that extend alike")
        drawn = draw(layer, covariance)
        drawn *= math.sqrt(float((layer.filters**2).sum() / (drawn**2).sum()))
        return FilterPlan(drawn, covariance)

    return Rule(filters=plan)


def draw(layer: FilterLayer, covariance: Array) -> Array:
    """Draw a layer's filters ``[filter, height, width]`` from N(0, Sigma), from its own stream on the CPU."""
    import torch

    count, size = layer.spec.filters, layer.spec.positions
    generator = layer.streams.generator("filters", layer.index)
    normal = torch.randn(count, size, generator=generator, dtype=torch.float64).numpy()
    return (normal @ square_root(covariance)).reshape(count, *layer.spec.kernel)


def turned(layer: FilterLayer, filters: Array) -> Array:
    """Give every filter a direction of its own, uniform on the sphere, and leave its norm."""
    import torch

    flat = filters.reshape(len(filters), -1)
    generator = layer.streams.generator("directions", layer.index)
    normal = torch.randn(*flat.shape, generator=generator, dtype=torch.float64).numpy()
    lengths = np.linalg.norm(flat, axis=1, keepdims=True) / np.linalg.norm(normal, axis=1, keepdims=True)
    return (normal * lengths).reshape(filters.shape)


def _relative(option: str, value: Any) -> float:
    given = number(option, value, SMALLEST)
    if given > LARGEST:
        raise UsageError(f"{option} = {value!r} is not accepted: pass s / side^2, from {SMALLEST:g} to {LARGEST:g}")
    return given
