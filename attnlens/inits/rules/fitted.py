"""Initialisation from a fit: the parameters measured in pre-trained models, drawn so that they are realised."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from attnlens.errors import UsageError
from attnlens.inits.plan import ALL_HEADS, Layer, Network, Plan, Request, Rule
from attnlens.inits.products import Columns, Noise, Pair, ov_reason, plan_ov, plan_ov_heads, plan_qk
from attnlens.inits.registry import choose, initialiser
from attnlens.inits.rules.mimetic import merged
from attnlens.words import counted

if TYPE_CHECKING:
    from attnlens.fit.gains import GainsOption, LayerGains
    from attnlens.fit.params import InitParams, LayerRequest

Form = Literal["full", "parametric"]
"""Of the covariance of depthwise filters: as it was measured, or the closed form fitted to it."""


@initialiser("fitted")
def fitted(
    network: Network,
    *,
    params: Any,
    ov: Literal["layer", "head"] = "layer",
    columns: Columns = "svd",
    noise: Noise = "normal",
    gains: GainsOption = "none",
) -> Rule:
    """Draw QK and OV with the parameters of a fit, such that each product realises what was measured.

    As `mimetic`, with (alpha, beta) of `InitParams.requests` for every head and layer: requests are solved for the
    truncation, ``realised(request) = fit``. ``params`` is an `InitParams`, the path of its file, or a model to fit
    (``fit_params(model)``). ``ov="head"`` draws every head's W_V W_O by itself in place of the layer's sum. In a file
    of effective products the network's own norm gain and LayerScale are divided out, so that its effective products
    have the parameters. Attention biases are set to zero.

    ``gains`` other than ``none`` draws the balanced products N of the source and multiplies them by its gains,
    diag(r) N diag(c) being the effective product: the source's own gains channel by channel (``channels``, for a
    network of its depth, widths and head counts), or gains of the same quantiles, correlation between r and c, and
    share between heads (``quantiles``, for any width). Of the places N's channels can take one is chosen at which the
    product's entries have the source's kurtosis: see `attnlens.inits.gained`.
    """
    gains = choose("gains", gains, ("none", "quantiles", "channels"))
    file = load_params(params)
    if file.fold not in ("raw", "effective") and gains == "none":
        raise UsageError(
            f"the parameters are of {file.fold} products: pass gains='channels' or 'quantiles', or fit again with "
            "fold='raw' or 'effective'"
        )
    ov = choose("ov", ov, ("layer", "head"))
    columns = choose("columns", columns, ("svd", "shuffled"))
    noise = choose("noise", noise, ("normal", "uniform"))
    by_layer = {request.layer: request for request in file.requests(network.architecture, gains)}
    if gains == "channels":
        _check_channels(network, by_layer, ov)

    def plan(layer: Layer) -> Plan:
        heads, total = _pairs(layer, by_layer, "qk"), _pairs(layer, by_layer, "ov" if ov == "layer" else "ov_heads")
        qk = plan_qk(layer, heads, noise, _gains(layer, by_layer, "qk")) if heads else _nothing("qk")
        if ov_reason(layer):
            return merged(qk, Plan(skipped=(("ov", ov_reason(layer)),)))
        if not total:
            return merged(qk, _nothing("ov"))
        if ov == "head":
            return merged(qk, plan_ov_heads(layer, total, noise, _gains(layer, by_layer, "ov_heads")))
        return merged(qk, plan_ov(layer, total[0], noise, columns, _gains(layer, by_layer, "ov")))

    def requests(layer: Layer) -> tuple[Request, ...]:
        heads, total = _pairs(layer, by_layer, "qk"), _pairs(layer, by_layer, "ov" if ov == "layer" else "ov_heads")
        square = layer.weights.W_Q.shape[1] == layer.weights.W_K.shape[1]
        requested = [Request("qk", head, *pair) for head, pair in enumerate(heads) if square]
        if not ov_reason(layer):
            names: Sequence[int | str] = [ALL_HEADS] if ov == "layer" else range(len(total))
            requested += [Request("ov", name, *pair) for name, pair in zip(names, total, strict=False)]
        return tuple(requested)

    return Rule(plan, file.fold if gains == "none" else "balanced", requests)


def load_params(params: Any) -> InitParams:
    """Return parameters from an object that has them, the path of a parameter file, or a model to fit."""
    if hasattr(params, "requests") and hasattr(params, "fold"):
        return params
    from attnlens.fit.params import InitParams

    if isinstance(params, str | os.PathLike) and os.fspath(params).endswith(".json"):
        return InitParams.load(params)
    from attnlens.fit.fit_params import fit_params

    return fit_params(params)


def _check_channels(network: Network, by_layer: dict[int, LayerRequest], ov: str) -> None:
    """Refuse gains of channels for a layer of another width or number of heads than the source's."""
    for index, spec in network.architecture.indexed():
        tensor = network.tensors[spec.q.named(spec.q.tensor)[0]]
        width = int(tensor.shape[1 - spec.q.axis])
        heads = {"qk_gains": spec.q.heads, "ov_gains": 1, "ov_heads_gains": spec.o.heads if spec.o else 0}
        for name in ("qk_gains", "ov_gains" if ov == "layer" else "ov_heads_gains"):
            found = getattr(by_layer[index], name)
            if found is not None and heads[name] and found.log_rows.shape != (heads[name], width):
                count, channels = found.log_rows.shape
                one = "head" if name != "ov_gains" else "sum of heads"
                raise UsageError(
                    f"gains='channels' are those of {counted(count, one)} of {counted(channels, 'channel')} in layer "
                    f"{index}, where {spec.path} has {counted(heads[name], one, f'{one}s')} of "
                    f"{counted(width, 'channel')}: pass gains='quantiles'"
                )


def _gains(layer: Layer, by_layer: dict[int, LayerRequest], which: str) -> LayerGains | None:
    return getattr(by_layer[layer.index], f"{which}_gains")


def _nothing(circuit: str) -> Plan:
    return Plan(skipped=((circuit, "the parameters hold nothing for this layer"),))


def _pairs(layer: Layer, by_layer: dict[int, LayerRequest], which: str) -> list[Pair]:
    """Return a layer's requests as pairs, one a head (one in all for ``ov``); empty where there are none."""
    request = by_layer.get(layer.index)
    given = None if request is None else getattr(request, which)
    if given is None:
        return []
    values = np.asarray(given, dtype=np.float64).reshape(-1, 2)
    expected = {"qk": layer.weights.num_heads, "ov": 1, "ov_heads": layer.weights.num_value_heads}[which]
    if len(values) != expected:
        raise UsageError(
            f"the parameters hold {counted(len(values), 'request')} for the {expected} of layer {layer.index} ({which})"
        )
    if not np.isfinite(values).all():
        return []
    if (values[:, 0] < 0).any():
        raise UsageError(f"the parameters request a negative alpha in layer {layer.index}: it is a standard deviation")
    return [(float(alpha), float(beta)) for alpha, beta in values]
