"""Hold the closed form of depthwise filters against networks that were trained on images.

    python benchmarks/trained_filters.py NAME=FILE[@TIMM] ...

FILE is a state dict whose depthwise layers stand in the order of timm's TIMM, which says their strides, or an ONNX
graph (needs `onnx`), which says them itself. Names of one family begin alike up to a hyphen (``lite-0 lite-1``).
Printed are, for each network: what the fit explains of a half of the filters that it was not fitted to, beside the form
this project had before; what the defaults explain; the medians of the fit; and what medians and trends over the other
families explain of it. Medians are over layers of 16 filters or more, halves over those of 33 or more.
"""

import sys
from typing import NamedTuple

import numpy as np
from scipy.stats import theilslopes

import attnlens
from attnlens.filters.closed_form import (
    Shape,
    closed_form,
    explained,
    fit_closed_form,
    positions,
    side,
    width_bound,
    within_range,
)
from attnlens.filters.covariance import second_moment
from attnlens.filters.trained import trained_shape

FEWEST, FEWEST_OF_HALVES = 16, 33


class Layer(NamedTuple):
    """One layer: its filters, stride and relative depth."""

    filters: np.ndarray
    stride: tuple[int, int]
    depth: float

    @property
    def kernel(self):
        """Height and width."""
        return self.filters.shape[1:]

    @property
    def strided(self):
        """Whether the stride is above 1."""
        return max(self.stride) > 1


def unit(filters):
    """Return the covariance with trace 1."""
    S = second_moment(filters)
    return S / np.trace(S)


def earlier_form(kernel, s):
    """Return the form before this one: ``exp(-(|p - q|^2 + |p|^2 + |q|^2) / 2s)``, positions from the centre."""
    sides = []
    for size in kernel:
        x = positions(size)
        exponent = (x[:, None] - x) ** 2 + x[:, None] ** 2 + x**2
        factor = np.exp((exponent.min() - exponent) / (2 * s))
        sides.append(factor / np.trace(factor))
    return np.kron(*sides)


def earlier_fit(S, kernel):
    """Return its best mixture with isotropy, over its whole range of widths."""
    best, isotropy = None, np.eye(len(S)) / len(S)
    for relative in np.geomspace(1e-3, 10, 161):
        C = earlier_form(kernel, relative * side(kernel) ** 2)
        beyond = ((C - isotropy) ** 2).sum()
        share = np.clip(((S - isotropy) * (C - isotropy)).sum() / beyond, 0, 1)
        mixture = share * C + (1 - share) * isotropy
        if best is None or ((S - mixture) ** 2).sum() < ((S - best) ** 2).sum():
            best = mixture
    return best


def held_out(layers):
    """Return what this form and the earlier one explain of the other half of every layer, ``[layer, 2, 3]``."""
    found = []
    for place, layer in enumerate(layers):
        if len(layer.filters) < FEWEST_OF_HALVES:
            continue
        order = np.random.default_rng(place).permutation(len(layer.filters))
        halves = [unit(layer.filters[half]) for half in np.array_split(order, 2)]
        both = []
        for one, other in (halves, halves[::-1]):
            ours = closed_form(layer.kernel, fit_closed_form(one, layer.kernel, layer.stride).shape)
            both.append([explained(other, ours), explained(other, earlier_fit(one, layer.kernel))])
        found.append(np.mean(both, axis=0))
    return np.array(found)


def read(file, timm_name):
    """Read every depthwise layer of a file."""
    if file.endswith(".onnx"):
        layers = list(_onnx_layers(file))
    else:
        import timm
        import torch

        from attnlens.layouts.depthwise import filter_modules

        with torch.device("meta"):
            strides = [spec.stride for spec in filter_modules(timm.create_model(timm_name))]
        filters = attnlens.inspect(file).filters
        layers = [(filters.read(layer), stride) for layer, stride in zip(filters.layers, strides, strict=True)]
    large = [(weights, stride) for weights, stride in layers if len(weights) >= FEWEST]
    return [Layer(weights, stride, place / (len(large) - 1)) for place, (weights, stride) in enumerate(large)]


def _onnx_layers(file):
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    stored |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Conv" and given.get("group", 1) > 1 and node.input[1] in stored:
            weights = numpy_helper.to_array(stored[node.input[1]]).astype(np.float64)
            if weights.shape[1] == 1 and weights[0].size > 1:
                yield weights[:, 0], tuple(given.get("strides", (1, 1)))


def fits(layers):
    """Return the fit of every layer as ``[layer, (log relative s, blur, slope, contrast)]``; no width is NaN."""
    rows = []
    for layer in layers:
        shape = fit_closed_form(unit(layer.filters), layer.kernel, layer.stride).shape
        width = np.nan if width_bound(shape.s, layer.kernel) else np.log(shape.s / side(layer.kernel) ** 2)
        rows.append([width, *shape.shares])
    return np.array(rows)


def medians(fitted, networks, chosen):
    """Return the median over networks of each one's median over the layers that ``chosen`` takes."""
    own = [fitted[name][[chosen(layer) for layer in layers]] for name, layers in networks.items()]
    return np.nanmedian([np.nanmedian(rows, axis=0) for rows in own if len(rows)], axis=0)


def trends(fitted, networks):
    """Return a function of depth: Theil and Sen's line through each number, over the layers of stride 1."""
    rows = np.concatenate(
        [np.column_stack([[layer.depth for layer in layers], fitted[name]])[[not x.strided for x in layers]]
         for name, layers in networks.items()]
    )  # fmt: skip
    lines = []
    for column in range(1, 5):
        known = np.isfinite(rows[:, column])
        lines.append(theilslopes(rows[known, column], rows[known, 0]))
    return lambda depth: np.array([line.intercept + line.slope * depth for line in lines])


def shape_of(numbers, kernel):
    """Return the shape that four numbers as in `fits` stand for."""
    shares = np.clip(numbers[1:], 0, 1)
    width = within_range(float(np.exp(numbers[0])) * side(kernel) ** 2, kernel)
    return Shape.of(width, shares / max(1.0, shares.sum()))


def scored(layers, shape_for):
    """Return the medians over layers of what a shape for each explains: all, variances, covariances."""
    return np.median([explained(unit(x.filters), closed_form(x.kernel, shape_for(x))) for x in layers], axis=0)


def main() -> None:
    """Read the networks named on the command line and print the tables."""
    networks = {}
    for argument in sys.argv[1:]:
        name, _, rest = argument.partition("=")
        file, _, timm_name = rest.partition("@")
        networks[name] = read(file, timm_name)
    fitted = {name: fits(layers) for name, layers in networks.items()}
    print("explained, medians of layers:    halves, this form    halves, earlier    better    defaults")
    for name, layers in networks.items():
        halves = held_out(layers)
        ours, theirs = np.median(halves, axis=0)[:, [0, 2]]
        better = " ".join(f"{(halves[:, 0, i] > halves[:, 1, i]).sum()}" for i in (0, 2))
        default = scored(layers, lambda x: trained_shape(x.strided).at(x.kernel))
        print(f"{name:14} {len(layers):3} layers (all, covariances) {ours[0]:5.2f} {ours[1]:5.2f}   {theirs[0]:5.2f} "
              f"{theirs[1]:5.2f}   {better} of {len(halves)}   {default[0]:5.2f} {default[2]:5.2f}")  # fmt: skip
    print("fits, medians of layers: s/side², blur, slope, contrast, what they leave; stride 1, then above")
    for name, layers in networks.items():
        one, above = (fitted[name][[x.strided == kind for x in layers]] for kind in (False, True))
        cells = [np.nanmedian(rows, axis=0) for rows in (one, above)]
        words = [f"{np.exp(v[0]):.3f} {v[1]:.2f} {v[2]:.2f} {v[3]:.2f} {1 - v[1:].sum():.2f}" for v in cells]
        print(f"{name:14} {words[0]}   {words[1]}")
    print("explained (all, covariances) by the other families: medians, by stride, trend with depth at stride 1")
    for name, layers in networks.items():
        family = name.partition("-")[0]
        others = {n: x for n, x in networks.items() if n.partition("-")[0] != family}
        if not others:
            continue
        every = medians(fitted, others, lambda _: True)
        kinds = {kind: medians(fitted, others, lambda x, kind=kind: x.strided == kind) for kind in (False, True)}
        line = trends(fitted, others)
        rules = (
            lambda x, every=every: shape_of(every, x.kernel),
            lambda x, kinds=kinds: shape_of(kinds[x.strided], x.kernel),
            lambda x, kinds=kinds, line=line: shape_of(kinds[True] if x.strided else line(x.depth), x.kernel),
        )
        found = [scored(layers, rule) for rule in rules]
        print(f"{name:14} " + "   ".join(f"{row[0]:5.2f} {row[2]:5.2f}" for row in found))


if __name__ == "__main__":
    main()
