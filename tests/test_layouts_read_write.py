"""The reader and the writer of slots against loops over single entries, and what they refuse."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from attnlens.errors import CheckpointError
from attnlens.layouts import AttentionSpec, NormSpec, Slot, read_heads, write_heads
from attnlens.layouts.read_write import stored_as, widened

EPS = 0.25
Q = Slot(tensor="q.weight", heads=3, width=2, head_stride=2)
O = replace(Q, tensor="o.weight", axis=1)  # noqa: E741
SLOTS = {
    "rows": Q,
    "rows further on": replace(Q, offset=5, bias="q.bias", bias_offset=7),
    "one row": replace(Q, heads=1, width=1, bias="q.bias"),
    "rows apart": replace(Q, head_stride=7, unit_stride=3, bias="q.bias"),
    "rows by groups": replace(Q, heads=6, group=2, group_stride=9, offset=1, bias="q.bias", bias_offset=2),
    "rows by groups of one": replace(Q, group=1, group_stride=5, head_stride=3),
    "a tensor for each head": replace(Q, tensor="q.{head}.weight", head_stride=0, offset=2, bias="q.{head}.bias"),
    "a tensor for each of two heads": replace(
        Q, tensor="q.{head}.weight", heads=2, head_stride=0, bias="q.{head}.bias"
    ),
    "a batch norm": replace(Q, batch_norm="bn", batch_norm_offset=3, batch_norm_eps=EPS),
    "a batch norm and a bias": replace(Q, offset=4, bias="q.bias", bias_offset=1, batch_norm="bn", batch_norm_eps=EPS),
    "a batch norm for each head": replace(
        Q, tensor="q.{head}.weight", head_stride=0, batch_norm="bn.{head}", batch_norm_offset=1, batch_norm_eps=EPS
    ),
    "columns": O,
    "columns further on": replace(O, offset=3, bias="o.bias"),
    "interleaved columns": replace(O, head_stride=1, unit_stride=3),
    "columns and a batch norm": replace(O, batch_norm="bn", batch_norm_eps=EPS),
    "columns, a bias and a batch norm": replace(O, bias="o.bias", batch_norm="bn", batch_norm_eps=EPS),
}


def drawn(name, shape):
    values = np.random.default_rng(len(name) + sum(map(ord, name))).normal(size=shape)
    return np.abs(values) + 0.5 if name.endswith("running_var") else values


def places(slot, offset):
    """Return the index of every unit of every head, one after the other."""
    for head in range(slot.heads):
        for unit in range(slot.width):
            in_group, group = (head % slot.group, head // slot.group) if slot.group else (head, 0)
            start = offset + group * slot.group_stride + in_group * slot.head_stride
            yield head, unit, start + unit * slot.unit_stride


def stored(slot, other=4):
    """Return tensors that the slot just fits into."""
    size = 1 + max(index for *_, index in places(slot, slot.offset))
    shape = (size, other) if slot.axis == 0 else (other, size)
    tensors = {name: drawn(name, shape) for name in slot.named(slot.tensor)}
    for name, offset in ((slot.bias, slot.bias_offset), (slot.batch_norm, slot.batch_norm_offset)):
        length = other if slot.axis else 1 + max(index for *_, index in places(slot, offset))
        leaves = [""] if name == slot.bias else [".weight", ".bias", ".running_mean", ".running_var"]
        for one in slot.named(name) if name else ():
            tensors |= {one + leaf: drawn(one + leaf, length) for leaf in leaves}
    return tensors


def spec_of(slot, **more):
    """Return a layout in which one slot stands for q, k and v, or for o beside plain others."""
    if slot.axis == 1:
        plain = replace(Q, tensor="plain")
        return AttentionSpec(path="a", module_class="", family="", scale=0.5, q=plain, k=plain, v=plain, o=slot, **more)
    return AttentionSpec(path="a", module_class="", family="", scale=0.5, q=slot, k=slot, v=slot, o=None, **more)


def with_plain(tensors):
    return {**tensors, "plain": drawn("plain", (6, 3))}


def by_hand(slot, tensors):
    """Return weight and bias of a slot, entry by entry."""
    weight, bias = np.empty((slot.heads, slot.width, 4)), np.zeros((slot.heads, slot.width))
    for head, unit, index in places(slot, slot.offset):
        matrix = tensors[slot.tensor.format(head=head)]
        weight[head, unit] = matrix[index] if slot.axis == 0 else matrix[:, index]
    if slot.axis == 1:
        bias = tensors[slot.bias].copy() if slot.bias else np.zeros(4)
    elif slot.bias:
        for head, unit, index in places(slot, slot.bias_offset):
            bias[head, unit] = tensors[slot.bias.format(head=head)][index]
    if slot.batch_norm and slot.axis == 1:
        gain, mean, shift = norm_at(tensors, slot.batch_norm, slice(None))
        return weight * gain, (bias - mean) * gain + shift
    if slot.batch_norm:
        for head, unit, index in places(slot, slot.batch_norm_offset):
            gain, mean, shift = norm_at(tensors, slot.batch_norm.format(head=head), index)
            weight[head, unit] *= gain
            bias[head, unit] = (bias[head, unit] - mean) * gain + shift
    return weight, bias if slot.bias or slot.batch_norm else None


def norm_at(tensors, norm, index):
    gain = tensors[f"{norm}.weight"][index] / np.sqrt(tensors[f"{norm}.running_var"][index] + EPS)
    return gain, tensors[f"{norm}.running_mean"][index], tensors[f"{norm}.bias"][index]


def hold(read, expected):
    assert (read is None) == (expected is None)
    if read is not None:
        np.testing.assert_allclose(read, expected, rtol=1e-12)


@pytest.mark.parametrize("name", SLOTS)
def test_a_slot_is_read_entry_by_entry(name):
    slot = SLOTS[name]
    tensors = with_plain(stored(slot))
    heads = read_heads(spec_of(slot), tensors)
    weight, bias = by_hand(slot, tensors)
    if slot.axis == 1:
        hold(heads.W_O, weight)
        hold(heads.b_O, bias if slot.bias or slot.batch_norm else None)
        return
    for read, read_bias in ((heads.W_Q, heads.b_Q), (heads.W_K, heads.b_K), (heads.W_V, heads.b_V)):
        hold(read, np.swapaxes(weight, 1, 2))
        hold(read_bias, bias)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("name", SLOTS)
def test_what_is_written_is_read_again_and_nothing_else_changes(name, kind):
    slot = SLOTS[name]
    tensors = with_plain(stored(slot))
    heads = read_heads(spec_of(slot), tensors)
    wanted = heads.replace(**{key: array + 1 for key, array in heads.arrays().items() if key[:2] in ("W_", "b_")})
    written = {key: array.copy() if kind == "numpy" else torch.tensor(array) for key, array in tensors.items()}
    write_heads(spec_of(slot), wanted, written)
    again = read_heads(spec_of(slot), written)
    for key in heads.arrays():
        np.testing.assert_allclose(again.arrays()[key], wanted.arrays()[key], rtol=1e-12, atol=1e-12)
    if slot.axis == 0:
        changed = {key for key, array in tensors.items() if not np.array_equal(np.asarray(written[key]), array)}
        biases = slot.bias or (f"{slot.batch_norm}.bias" if slot.batch_norm else None)
        assert changed == {*slot.named(slot.tensor), *(slot.named(biases) if biases else ())}


@pytest.mark.parametrize("name", SLOTS)
def test_a_tensor_one_entry_short_is_refused(name):
    slot = SLOTS[name]
    tensors = with_plain(stored(slot))
    last = slot.named(slot.tensor)[-1]
    short = {**tensors, last: tensors[last][:-1] if slot.axis == 0 else tensors[last][:, :-1]}
    wanted = (
        f"{last} has shape {short[last].shape}, too small for {slot.heads} heads of width {slot.width}: "
        "name the architecture this file was made for"
    )
    with pytest.raises(CheckpointError) as raised:
        read_heads(spec_of(slot), short)
    assert str(raised.value) == wanted
    for vector in [key for key in tensors if key[:2] in ("bn", "q.") and tensors[key].ndim == 1 and slot.axis == 0]:
        size = len(tensors[vector]) - 1
        with pytest.raises(CheckpointError) as raised:
            read_heads(spec_of(slot), {**tensors, vector: tensors[vector][:-1]})
        assert str(raised.value) == f"{vector} has {size} entries, too few for {slot.heads} heads of {slot.width}"


@pytest.mark.parametrize(
    ("shape", "read"),
    [((6, 4), True), ((6, 4, 1), True), ((6, 4, 1, 1), True), ((6,), False), ((6, 4, 2), False), ((6, 4, 1, 3), False)],
)
def test_a_matrix_may_have_trailing_axes_of_one(shape, read):
    tensors = {"q.weight": drawn("q.weight", shape)}
    if read:
        found = read_heads(spec_of(Q), tensors).W_Q
        np.testing.assert_array_equal(found, np.swapaxes(tensors["q.weight"].reshape(3, 2, 4), 1, 2))
        return
    with pytest.raises(CheckpointError) as raised:
        read_heads(spec_of(Q), tensors)
    assert str(raised.value) == f"q.weight has shape {shape}; a matrix is needed: is this the right model?"


def test_a_convolution_is_written_as_it_is_stored():
    tensors = {"q.weight": np.zeros((6, 4, 1, 1), np.float16)}
    heads = read_heads(spec_of(Q), {"q.weight": drawn("q.weight", (6, 4))})
    write_heads(spec_of(Q), heads, tensors)
    np.testing.assert_array_equal(tensors["q.weight"][:, :, 0, 0], drawn("q.weight", (6, 4)).astype(np.float16))


def test_a_layer_keeps_its_number_its_scale_and_what_it_leaves_out():
    tensors = stored(Q)
    assert read_heads(spec_of(Q), tensors).layer == 0
    heads = read_heads(spec_of(Q, leaves_out=("rope",)), tensors, 3)
    assert (heads.layer, heads.name, heads.scale, heads.leaves_out) == (3, "a", 0.5, ("rope",))
    assert heads.layer_scale is None
    scaled = read_heads(spec_of(Q, layer_scale="g"), {**tensors, "g": np.arange(8.0).reshape(8, 1, 1)})
    np.testing.assert_array_equal(scaled.layer_scale, np.arange(8.0))


def test_a_bias_goes_only_where_one_is_stored():
    tensors = stored(Q)
    heads = read_heads(spec_of(Q), tensors)
    write_heads(spec_of(Q), heads.replace(b_Q=np.ones((3, 2)), b_V=np.ones((3, 2))), tensors)
    assert list(tensors) == ["q.weight"]
    slot = SLOTS["rows further on"]
    tensors = stored(slot)
    before = tensors["q.bias"].copy()
    write_heads(spec_of(slot), read_heads(spec_of(slot), tensors).replace(b_Q=None, b_K=None, b_V=None), tensors)
    np.testing.assert_array_equal(tensors["q.bias"], before)


def test_heads_without_an_output_are_not_written_where_one_is_stored():
    tensors = with_plain(stored(O))
    heads = read_heads(spec_of(O), tensors)
    with pytest.raises(AssertionError, match="a stores an output projection and the heads hold none"):
        write_heads(spec_of(O), heads.replace(W_O=None), tensors)


NORMS = {"g": np.array([2.0, 3, 5, 7]), "v": np.array([0.75, 3.75, 8.75, 15.75]), "h": np.array([1.0, 2, 3, 4])}
BATCH = NormSpec(kind="batch", roles="q", weight="g", variance="v", eps=EPS)


@pytest.mark.parametrize(
    ("norm", "gain", "centres"),
    [
        (NormSpec(kind="layer", weight="g"), [2, 3, 5, 7], True),
        (NormSpec(kind="rms", weight="g", gain_offset=1.0), [3, 4, 6, 8], False),
        (NormSpec(kind="group", weight="h"), [1, 2, 3, 4], False),
        (NormSpec(kind="layer"), None, True),
        (replace(BATCH, roles="qkv"), [2, 1.5, 5 / 3, 7 / 4], False),
        (replace(BATCH, roles="qkv", weight=None), [1, 1 / 2, 1 / 3, 1 / 4], False),
    ],
)
def test_the_gain_of_a_norm_is_read(norm, gain, centres):
    heads = read_heads(spec_of(Q, norms=(norm,)), stored(Q) | NORMS)
    hold(heads.norm_gain, gain)
    assert heads.norm_centres is centres
    assert not heads.own_norms


def test_a_role_with_a_norm_of_its_own_or_none_stands_apart():
    other = NormSpec(kind="layer", roles="v", weight="h")
    heads = read_heads(spec_of(Q, norms=(BATCH, other)), stored(Q) | NORMS)
    hold(heads.norm_gain, [2, 1.5, 5 / 3, 7 / 4])
    assert set(heads.own_norms) == {"k", "v"}
    assert heads.own_norms["k"].gain is None
    assert not heads.own_norms["k"].centres
    hold(heads.own_norms["v"].gain, NORMS["h"])
    assert heads.own_norms["v"].centres
    assert read_heads(spec_of(Q), stored(Q)).norm_gain is None


@pytest.mark.parametrize(("variance", "read"), [(1e-9 - EPS, True), (-EPS, False), (-1.0, False)])
def test_a_variance_is_above_zero(variance, read):
    slot = SLOTS["a batch norm"]
    one = stored(slot)
    one["bn.running_var"][4] = variance
    other = stored(Q) | NORMS | {"v": np.array([1.0, variance, 1, 1])}
    for name, spec, tensors in (("bn.running_var", spec_of(slot), one), ("v", spec_of(Q, norms=(BATCH,)), other)):
        if read:
            assert np.isfinite(read_heads(spec, tensors).W_Q).all()
            continue
        with pytest.raises(CheckpointError) as raised:
            read_heads(spec, tensors)
        assert str(raised.value) == f"{name} holds a variance that is not above 0: this checkpoint is broken"


@pytest.mark.parametrize("name", ["a batch norm", "a batch norm and a bias", "columns and a batch norm"])
def test_behind_a_silent_channel_only_zero_is_written(name):
    slot = SLOTS[name]
    tensors = with_plain(stored(slot))
    tensors["bn.weight"][slot.batch_norm_offset + 1] = 0
    spec = spec_of(slot)
    heads = read_heads(spec, tensors)
    write_heads(spec, heads, tensors)
    again = read_heads(spec, tensors)
    for key, array in heads.arrays().items():
        np.testing.assert_allclose(again.arrays()[key], array, atol=1e-12)
    role = "W_Q" if slot.axis == 0 else "W_O"
    with pytest.raises(CheckpointError) as raised:
        write_heads(spec, heads.replace(**{role: heads.arrays()[role] + 1}), tensors)
    assert str(raised.value) == (
        f"bn.weight is zero for some channels of {slot.tensor}: no weight before it can make the heads given; "
        "set it before writing"
    )


KINDS = "float16 float32 float64 f2 <f4 >f8 bfloat16 float8_e4m3fn float8_e5m2 float8_e3m4 float128"
CODES = "int8 uint8 int64 bool complex64 float8_e8m0fnu float4_e2m1fn_x2 f16"


class Kind:
    """A stored array of a type that numpy may not know."""

    def __init__(self, kind):
        self.dtype = kind

    def detach(self):
        return torch.ones(2)


@pytest.mark.parametrize("kind", KINDS.split())
def test_weights_are_numbers_with_a_point(kind):
    np.testing.assert_array_equal(widened(Kind(kind), "w"), [1, 1])
    np.testing.assert_array_equal(widened(Kind(f"torch.{kind}"), "w"), [1, 1])


@pytest.mark.parametrize("kind", CODES.split())
def test_codes_are_no_weights(kind):
    with pytest.raises(CheckpointError) as raised:
        widened(Kind(kind), "w")
    assert str(raised.value) == (
        f"w is stored as {kind}: codes and no weights, and no scales that are known stand beside them. Give the model "
        "it was quantised from"
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([1.0, -1e15], None),
        ([1e15, 0.0], None),
        ([], None),
        ([np.nextafter(-1e15, -1e16), 1.0], "w holds values beyond 1e+15: this checkpoint is broken"),
        ([0.0, np.nextafter(1e15, 1e16)], "w holds values beyond 1e+15: this checkpoint is broken"),
        ([1.0, np.nan, np.inf], "w holds 2 NaN or Inf values of 3 read: "),
        ([1.0, -np.inf], "w holds 1 NaN or Inf values of 2 read: "),
    ],
)
def test_weights_are_finite_and_not_too_large(values, told):
    given = np.array(values)
    if told is None:
        read = widened(given, "w")
        np.testing.assert_array_equal(read, given)
        assert read.dtype == np.float64
        assert not np.shares_memory(read, given)
        return
    with pytest.raises(CheckpointError) as raised:
        widened(given, "w")
    ends = "this checkpoint is broken, take one from before training diverged" if "NaN" in told else ""
    assert str(raised.value) == told + ends


def test_values_take_the_type_of_what_is_stored():
    values = np.arange(6.0).reshape(2, 3).T / 3
    for kind in (np.float16, np.float32):
        assert stored_as(np.zeros(1, kind), values).dtype == kind
    for kind in (torch.float16, torch.bfloat16):
        found = stored_as(torch.zeros(1, dtype=kind), values)
        assert found.dtype == kind
        np.testing.assert_allclose(found.double().numpy(), values, rtol=0.01)
