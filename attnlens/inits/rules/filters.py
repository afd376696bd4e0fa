"""Depthwise filters drawn with a covariance: the closed form as trained filters have it, or one measured elsewhere."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attnlens.errors import UsageError
from attnlens.filters.closed_form import WIDEST, closed_form
from attnlens.filters.trained import Relative, trained_shape
from attnlens.filters.transfer import square_root
from attnlens.heads import Array
from attnlens.inits.plan import FilterLayer, FilterPlan, Network, Rule
from attnlens.inits.registry import choose, initialiser, number
from attnlens.inits.rules.fitted import Form, load_params


@initialiser("conv-covariance")
def conv_covariance(
    network: Network,  # noqa: ARG001  # the signature of every initialiser
    *,
    params: Any = None,
    form: Form | None = None,
    relative_s: float | None = None,
    blur: float | None = None,
    slope: float | None = None,
    contrast: float | None = None,
) -> Rule:
    """Draw the filters of every depthwise convolution from N(0, Sigma), Sigma the same for all filters of a layer.

    ``form="parametric"``, the default without ``params``: `filters.closed_form.closed_form`, a sum of smoothing, its
    first derivatives, a centre against its surround, and equal variances without correlation. The squared width
    ``s / side^2`` and the first three parts' shares of the trace are those of trained networks (`filters.trained`),
    which differ between layers of stride 1 and above and not reliably with depth; an option that is given holds for
    all layers. With ``params`` they are the medians measured there. ``form="full"``, the default with ``params``: the
    covariances measured there (an `InitParams`, the path of its file, or a model to fit), carried over as
    `InitParams.filter_covariance` says. All filters of a layer are multiplied by one number, so that their sum of
    squares is the one the layer holds now: in a new network the scale of its own initialisation. Biases zero. Inspired
    by Trockman, Willmott & Kolter, ICLR 2023 (arXiv 2210.03651), whose closed form was not at hand.
    """
    fitted = None if params is None else load_params(params)
    resolved = choose("form", form or ("parametric" if fitted is None else "full"), ("full", "parametric"))
    if fitted is None and resolved == "full":
        raise UsageError("form = 'full' needs params: covariances that `attnlens fit-params` measured in some network")
    given = _given(relative_s=relative_s, blur=blur, slope=slope, contrast=contrast)
    if fitted is not None and given:
        raise UsageError(f"{', '.join(given)}: width and shares are measured in the params, leave one of the two out")
    shapes = {strided: _resolved_shape(strided, given) for strided in (False, True)}

    def target(layer: FilterLayer) -> Array | None:
        spec = layer.spec
        if fitted is not None:
            return fitted.filter_covariance(layer.depth, spec.kernel, resolved, spec.strided)
        return closed_form(spec.kernel, shapes[spec.strided].at(spec.kernel))

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


def _given(**options: float | None) -> dict[str, float]:
    """Return the options that were given, each within its range."""
    found = {name: number(name, value, 0) for name, value in options.items() if value is not None}
    for name, value in found.items():
        if name == "relative_s" and not 0 < value <= WIDEST:
            raise UsageError(f"relative_s = {value:g} is not accepted: pass s / side^2, above 0 and up to {WIDEST:g}")
        if value > 1:
            raise UsageError(f"{name} = {value:g} is not accepted: pass a share of the trace, from 0 to 1")
    return found


def _resolved_shape(strided: bool, given: dict[str, float]) -> Relative:
    """Return the shape of layers of stride 1 or above, the given options in place of what was measured."""
    shape = trained_shape(strided)._replace(**given)
    if shape.blur + shape.slope + shape.contrast > 1 + 1e-9:
        raise UsageError(
            f"blur, slope and contrast are {shape.blur:g}, {shape.slope:g} and {shape.contrast:g} in layers of stride "
            f"{'above 1' if strided else '1'}: shares of one trace come to 1 at most, name all three"
        )
    return shape
