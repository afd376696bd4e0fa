"""Layouts, refusals and filters as data: what they hold, what stands for what is not given, that nothing changes."""

import json
import subprocess
import sys
from dataclasses import MISSING, FrozenInstanceError, asdict, fields, replace

import numpy as np
import pytest
import torch
from timm.layers import StdConv2d
from torch import nn

from attnlens.errors import CheckpointError
from attnlens.layouts import AttentionSpec, NormSpec, Refusal, Slot
from attnlens.layouts.depthwise import FilterSpec, filter_modules, filter_parameters, read_filters, write_filters
from attnlens.layouts.depthwise.by_shape import LABEL, filters_by_shape
from attnlens.layouts.depthwise.find import STANDARDISED
from attnlens.layouts.flags import in_words, layers_by_reason
from attnlens.layouts.registry import REFUSED, RULES, RefusedClass, Rule, has, refuse, rule
from attnlens.layouts.tracing import Surroundings
from tests.test_layouts_pieces import Shapes

SLOT = Slot(tensor="w", heads=2, width=3, head_stride=3)
SPEC = AttentionSpec(path="a", module_class="m.Class", family="A", q=SLOT, k=SLOT, v=SLOT, o=SLOT, scale=0.5)
FILTERS = FilterSpec(
    path="c",
    module_class="m.Conv",
    tensor="c.weight",
    bias="c.bias",
    filters=6,
    channels=3,
    kernel=(5, 3),
    stride=(1, 2),
    dilation=(1, 1),
)
REFUSAL = Refusal("a", "m.Class", "C7", "is not read")
NAMED = (Slot, NormSpec, AttentionSpec, FilterSpec, Rule)
"""Data whose fields are given by name alone."""


def test_what_is_not_given_stands_for_the_usual():
    usual = {field.name: field.default for field in fields(Slot) if field.default is not MISSING}
    assert usual == {
        "offset": 0,
        "unit_stride": 1,
        "group": None,
        "group_stride": 0,
        "axis": 0,
        "bias": None,
        "bias_offset": 0,
        "batch_norm": None,
        "batch_norm_offset": 0,
        "batch_norm_eps": 1e-5,
    }
    norm = {"kind": "rms", "roles": "qkv", "weight": None, "gain_offset": 0.0, "variance": None, "eps": 1e-5}
    assert asdict(NormSpec(kind="rms")) == norm
    assert (SPEC.norms, SPEC.layer_scale, SPEC.leaves_out, SPEC.kind, SPEC.label) == ((), None, (), "token", "")
    assert FILTERS.label == ""
    assert Surroundings() == Surroundings((), None, ())
    given = Rule(family="A", describe=dict)
    assert given.sdpa_scale is False
    assert (given.leaves_out, given.flags, given.kind, given.label, given.refusal) == ((), {}, "token", "", "")


@pytest.mark.parametrize(
    "data", [SLOT, NormSpec(kind="rms"), SPEC, FILTERS, REFUSAL, RefusedClass("A", "no"), Surroundings()]
)
def test_nothing_that_was_described_changes(data):
    with pytest.raises(FrozenInstanceError):
        setattr(data, fields(data)[0].name, None)
    hash(data)


def test_a_rule_does_not_change():
    with pytest.raises(FrozenInstanceError):
        Rule(family="A", describe=dict).family = "B1"


@pytest.mark.parametrize("data", NAMED)
def test_fields_of_descriptions_are_given_by_name(data):
    values = [None for field in fields(data) if field.default is MISSING]
    with pytest.raises(TypeError, match="positional"):
        data(*values)


SPECS = {
    "plain": SPEC,
    "without o": SPEC.replace(o=None),
    "with norms": SPEC.replace(norms=(NormSpec(kind="layer", roles="q"), NormSpec(kind="rms", roles="kv", weight="g"))),
    "with all": SPEC.replace(layer_scale="s", leaves_out=("rope", "gate"), kind="linear", label="told"),
    "of other slots": SPEC.replace(q=replace(SLOT, bias="b"), k=replace(SLOT, offset=3), v=replace(SLOT, axis=1)),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_layout_comes_back_from_json(name):
    spec = SPECS[name]
    data = json.loads(json.dumps(spec.to_json()))
    again = AttentionSpec.from_json(data)
    assert again == spec
    assert again.replace(path="b").path == "b"
    assert list(spec.slots()) == list("qkv" if name == "without o" else "qkvo")
    assert all(spec.slots()[role] is getattr(spec, role) for role in spec.slots())
    assert data == json.loads(json.dumps(spec.to_json())), "what was read is as it was"


def test_filters_come_back_from_json():
    assert FilterSpec.from_json(json.loads(json.dumps(FILTERS.to_json()))) == FILTERS
    assert FILTERS.positions == 15
    assert replace(FILTERS, kernel=(7, 2)).positions == 14
    assert FILTERS.strided
    assert FILTERS.tensors() == ("c.weight", "c.bias")
    assert replace(FILTERS, bias=None).tensors() == ("c.weight",)


def test_tensors_are_named_once_in_their_order():
    plain = replace(SLOT, bias="b", batch_norm="n")
    leaves = ("n.weight", "n.bias", "n.running_mean", "n.running_var")
    assert plain.tensors() == ("w", "b", *leaves)
    each = Slot(tensor="w.{head}", heads=2, width=3, head_stride=0, bias="b.{head}", batch_norm="n.{head}")
    assert each.per_head
    assert not plain.per_head
    assert each.tensors()[:4] == ("w.0", "w.1", "b.0", "b.1")
    assert each.tensors()[4:] == tuple(leaf.replace("n", f"n.{head}", 1) for head in (0, 1) for leaf in leaves)
    assert SLOT.tensors() == ("w",)
    assert plain.named("x.{head}") == ("x.{head}",)
    norms = (NormSpec(kind="layer", roles="q"), NormSpec(kind="batch", roles="kv", weight="g", variance="v"))
    spec = SPEC.replace(q=plain, k=each, norms=norms, layer_scale="s")
    assert spec.tensors() == (*plain.tensors(), *each.tensors(), "g", "v", "s")
    assert SPEC.tensors() == ("w",)


def test_a_role_reads_the_first_norm_that_names_it():
    one, two = NormSpec(kind="layer", roles="qk"), NormSpec(kind="rms", roles="k")
    spec = SPEC.replace(norms=(one, two))
    assert [spec.norm_of(role) for role in "qkv"] == [one, one, None]


@pytest.mark.parametrize(
    ("fold", "flags", "known"),
    [
        ("raw", (), True),
        ("raw", ("norm_unknown",), True),
        ("effective", (), True),
        ("effective", ("norm_unknown",), False),
    ],
)
def test_products_are_known_under_every_fold_but_where_the_norm_is_not(fold, flags, known):
    assert SPEC.replace(leaves_out=flags).has_fold(fold) is known


def test_layers_of_other_products_are_read_on_request():
    assert SPEC.opt_in_refusal() is None
    channel = SPEC.replace(kind="channel").opt_in_refusal()
    assert channel == Refusal(
        "a",
        "m.Class",
        "A",
        "is Class (channel attention): its product never acts between tokens. Pass --include-channel to see it anyway.",
    )


def test_reasons_are_told_with_the_layers_they_are_true_of():
    by_reason = layers_by_reason([(0, ("a", "b")), (3, ("", "b")), (4, ())])
    assert by_reason == {"a": [0], "b": [0, 3]}
    assert in_words(by_reason, 2) == "a (1 of 2 layers); b"
    assert in_words(by_reason, 5) == "a (1 of 5 layers); b (2 of 5 layers)"
    assert in_words({}, 5) == ""


def test_rules_are_kept_in_their_order_for_every_class():
    names = ("nowhere.One", "nowhere.Two")
    try:

        @rule("B1", *names, label="first")
        @rule("A", names[1], sdpa_scale=True)
        def describe(module):
            return module

        refuse("C7", "for no reason", *names)
        assert [one.family for one in RULES[names[0]]] == ["B1"]
        assert [(one.family, one.label, one.sdpa_scale) for one in RULES[names[1]]] == [
            ("A", "", True),
            ("B1", "first", False),
        ]
        assert all(one.describe is describe for name in names for one in RULES[name])
        assert [REFUSED[name] for name in names] == [RefusedClass("C7", "for no reason")] * 2
    finally:
        for name in names:
            RULES.pop(name, None)
            REFUSED.pop(name, None)


def test_what_is_none_is_not_there():
    module = nn.Module()
    module.nothing, module.zero = None, 0
    assert has(module, "zero")
    assert not has(module, "nothing")
    assert not has(module, "absent")


LAZY = """
import sys
from pathlib import Path
import attnlens.layouts
from importlib import import_module
for path in Path(attnlens.layouts.__path__[0]).rglob("*.py"):
    parts = path.relative_to(Path(attnlens.__path__[0]).parent).with_suffix("").parts
    import_module(".".join(parts).removesuffix(".__init__"))
print(sorted({"torch", "timm"} & set(sys.modules)))
"""


def test_layouts_import_neither_torch_nor_timm():
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Depthwise filters.


def conv(*args, **options):
    return nn.Conv2d(*args, **options)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (conv(6, 6, 3, groups=6), {}),
        (conv(6, 12, 3, groups=6), {"filters": 12}),
        (conv(2, 2, 3, groups=2), {"filters": 2, "channels": 2}),
        (conv(6, 6, (1, 2), groups=6), {"kernel": (1, 2)}),
        (conv(6, 6, (5, 1), groups=6), {"kernel": (5, 1)}),
        (conv(6, 6, 3, groups=6, bias=False), {"bias": None}),
        (conv(6, 6, 3, groups=6, stride=(2, 3), dilation=(4, 5)), {"stride": (2, 3), "dilation": (4, 5)}),
        (conv(6, 6, 1, groups=6), None),
        (conv(1, 4, 3), None),
        (conv(6, 6, 3), None),
        (conv(6, 6, 3, groups=3), None),
        (nn.Conv1d(6, 6, 3, groups=6), None),
        (nn.Linear(6, 6), None),
    ],
)
def test_a_convolution_of_one_channel_each_is_described_whole(module, expected):
    usual = {"filters": 6, "channels": 6, "kernel": (3, 3), "stride": (1, 1), "dilation": (1, 1)}
    usual |= {"module_class": "torch.nn.modules.conv.Conv2d"}
    alone = (
        ()
        if expected is None
        else (FilterSpec(**{"path": "", "tensor": "weight", "bias": "bias", **usual, **expected}),)
    )
    assert tuple(filter_modules(module)) == alone
    placed = list(filter_modules(nn.Sequential(nn.Identity(), nn.ModuleDict({"mix": module}))))
    assert placed == [
        replace(spec, path="1.mix", tensor="1.mix.weight", bias=spec.bias and "1.mix.bias") for spec in alone
    ]


def test_every_convolution_is_looked_at_whatever_stands_before_it():
    refused = nn.utils.parametrizations.weight_norm(conv(4, 4, 3, groups=4))
    parts = [conv(3, 4, 3), conv(4, 4, 1, groups=4), refused, StdConv2d(4, 4, kernel_size=3, groups=4), nn.ReLU()]
    model = nn.Sequential(*parts, conv(4, 4, 3, groups=4))
    one, two, three = filter_modules(model)
    name = f"{type(refused).__module__}.{type(refused).__qualname__}"
    assert one == Refusal("2", name, "depthwise", "computes its filters from other tensors: nothing is stored as such")
    assert (two.path, two.label) == ("3", STANDARDISED)
    assert (three.path, three.label) == ("5", "")
    assert filter_parameters(model) == ["3.weight", "5.weight"]


@pytest.mark.parametrize("store", [np.array, torch.tensor])
def test_filters_are_read_and_written_with_their_bias(store):
    given = np.arange(6.0 * 5 * 3).reshape(6, 5, 3)
    tensors = {"c.weight": store(np.zeros((6, 1, 5, 3), np.float32)), "c.bias": store(np.ones(6, np.float32))}
    write_filters(FILTERS, given, tensors, None)
    np.testing.assert_array_equal(read_filters(FILTERS, tensors), given)
    np.testing.assert_array_equal(np.asarray(tensors["c.bias"]), np.ones(6))
    write_filters(FILTERS, given, tensors, np.arange(6.0))
    np.testing.assert_array_equal(np.asarray(tensors["c.bias"]), np.arange(6))
    write_filters(replace(FILTERS, bias=None), given, {"c.weight": tensors["c.weight"]}, np.arange(6.0))
    for shape in ((6, 2, 5, 3), (6, 1, 3, 5), (5, 1, 5, 3)):
        with pytest.raises(CheckpointError) as raised:
            read_filters(FILTERS, {"c.weight": np.zeros(shape)})
        assert str(raised.value) == f"c.weight has shape {shape}, not (6, 1, 5, 3): is this the right model?"


def test_filters_told_by_shape_have_each_field():
    found = filters_by_shape(
        Shapes({"a.b.weight": (6, 1, 5, 3), "a.b.bias": (6,), "c.weight": (2, 1, 1, 2)}), ["a.b.weight", "c.weight"]
    )
    first = FilterSpec(
        path="a.b",
        module_class="tensor shapes",
        tensor="a.b.weight",
        bias="a.b.bias",
        filters=6,
        channels=6,
        kernel=(5, 3),
        stride=(1, 1),
        dilation=(1, 1),
        label=LABEL,
    )
    second = replace(first, path="c", tensor="c.weight", bias=None, filters=2, channels=2, kernel=(1, 2))
    assert found == (first, second)
