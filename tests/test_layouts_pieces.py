"""The pieces that layouts are made of, each alone: filters told by shape, strides, runs of rows, options by name."""

import inspect

import numpy as np
import pytest

from attnlens.layouts import builders
from attnlens.layouts.depthwise.by_shape import LABEL, filters_by_shape
from attnlens.layouts.depthwise.spec import FilterSpec
from attnlens.layouts.read_write import _run


class Shapes(dict):
    """The names and shapes of a file's tensors."""

    def shape(self, name):
        return self[name]


def spec(stride=(1, 1), **fields):
    usual = {"path": "a", "module_class": "tensor shapes", "tensor": "a.weight", "bias": None, "filters": 6}
    usual |= {"channels": 6, "kernel": (3, 3), "dilation": (1, 1), "label": LABEL}
    return FilterSpec(**{**usual, **fields}, stride=stride)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((6, 1, 3, 3), (3, 3)),
        ((6, 1, 5, 1), (5, 1)),
        ((6, 1, 1, 5), (1, 5)),
        ((2, 1, 1, 2), (1, 2)),
        ((6, 1, 1, 1), None),  # scales
        ((1, 1, 3, 3), None),  # one filter
        ((6, 2, 3, 3), None),  # reads two channels
        ((6, 1, 9), None),
        ((6, 1, 3, 3, 3), None),
    ],
)
def test_what_is_shaped_like_depthwise_filters_is_described_whole(shape, kernel):
    found = filters_by_shape(Shapes({"a.weight": shape}), ["a.weight"])
    assert found == (() if kernel is None else (spec(kernel=kernel, filters=shape[0], channels=shape[0]),))


def test_a_bias_belongs_to_its_filters_and_other_names_to_none():
    names = {"a.weight": (6, 1, 3, 3), "a.bias": (6,), "b.kernel": (6, 1, 3, 3), "weight": (4, 1, 3, 3)}
    assert filters_by_shape(Shapes(names), list(names)) == (
        spec(bias="a.bias"),
        spec(path="", tensor="weight", filters=4, channels=4),
    )


@pytest.mark.parametrize(
    ("stride", "strided"), [((1, 1), False), ((2, 2), True), ((1, 2), True), ((2, 1), True), ((3, 3), True)]
)
def test_a_layer_is_strided_from_two_on_either_side(stride, strided):
    assert spec(stride).strided is strided


@pytest.mark.parametrize(
    ("units", "slice_"),
    [([4], slice(4, 5)), ([2, 3, 4], slice(2, 5)), ([2, 4], None), ([3, 2], None), ([2, 2], None), ([], None)],
)
def test_units_in_a_row_make_a_slice(units, slice_):
    given = np.array(units, dtype=np.int_)
    found = _run(given)
    assert found == slice_ if slice_ else found is given


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_the_options_of_a_slot_are_given_by_name(name):
    parameters = inspect.signature(getattr(builders, name)).parameters.values()
    options = [one for one in parameters if one.default is not one.empty]
    assert options
    assert all(one.kind is one.KEYWORD_ONLY for one in options)
