"""read(write(heads)) == heads for every family, exactly, and only the layer's own rows and columns are touched."""

import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from attnlens.errors import CheckpointError
from attnlens.heads import HeadWeights
from attnlens.layouts import AttentionSpec, Slot, read_heads, write_heads
from attnlens.layouts.describe import attention_spec
from tests.layout_forms import FORMS, build, skipped_where_timm_is_older

ROLES = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
STORES = {
    "numpy float32": lambda tensor: tensor.numpy().astype(np.float32),
    "torch float32": lambda tensor: tensor.to(torch.float32),
    "torch float16": lambda tensor: tensor.to(torch.float16),
    "torch bfloat16": lambda tensor: tensor.to(torch.bfloat16),
}
FAMILIES = {form.module_class: form for form in FORMS}
"""One form of each class: the smallest one is built directly where there is one."""


def assert_same(first: HeadWeights, second: HeadWeights) -> None:
    for role in ROLES:
        left, right = getattr(first, role), getattr(second, role)
        assert (left is None) == (right is None), role
        if left is not None:
            np.testing.assert_array_equal(left, right, err_msg=role)


Shapes = dict[str, tuple[int, ...]]


def stored(shapes: Shapes, kind: str, seed: int) -> dict:
    """Return a state dict of random values that the storage type holds."""
    torch.manual_seed(seed)
    return {
        name: STORES[kind](torch.rand(shape) + 0.5 if name.endswith("running_var") else torch.randn(shape))
        for name, shape in shapes.items()
    }


def shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@cache
def family(name: str) -> tuple[AttentionSpec, Shapes]:
    module, spec, _, _ = build(FAMILIES[name])
    return spec, shapes_of(module)


@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("name", FAMILIES)
def test_written_heads_are_read_again_exactly(name, kind):
    spec, shapes = family(name)
    source, target = stored(shapes, kind, seed=1), stored(shapes, kind, seed=2)
    _same_batch_norm(spec, source, target)
    before = copy.deepcopy(target)
    heads = read_heads(spec, source)
    write_heads(spec, heads, target)
    assert_same(read_heads(spec, target), heads)
    _only_own_places_changed(spec, before, target)


def _same_batch_norm(spec: AttentionSpec, source: dict, target: dict) -> None:
    """Give both stores one BatchNorm: what is exact in front of one gain need not be in front of another."""
    for slot in spec.slots().values():
        leaves = ("weight", "running_mean", "running_var", *(["bias"] if slot.bias else []))
        for norm in slot.named(slot.batch_norm) if slot.batch_norm else ():
            for leaf in leaves:
                target[f"{norm}.{leaf}"] = source[f"{norm}.{leaf}"]


def _only_own_places_changed(spec: AttentionSpec, before: dict, after: dict) -> None:
    own = {name: np.zeros(tuple(value.shape), bool) for name, value in before.items()}
    for role, slot in spec.slots().items():
        for head in range(slot.heads):
            units = np.arange(slot.width) * slot.unit_stride + head * slot.head_stride
            weight = own[slot.tensor.format(head=head)]
            if slot.axis == 0:
                weight[slot.offset + units] = True
            else:
                weight[:, slot.offset + units] = True
            if slot.bias or slot.batch_norm:
                name = slot.bias or f"{slot.batch_norm}.bias"
                start = slot.bias_offset if slot.bias else slot.batch_norm_offset
                own[name.format(head=head)][slice(None) if role == "o" else start + units] = True
    for name, places in own.items():
        old, new = (torch.as_tensor(store[name]).float().numpy() for store in (before, after))
        np.testing.assert_array_equal(new[~places], old[~places], err_msg=name)
        if places.any() and not name.endswith(".bias"):
            assert (new[places] != old[places]).any(), f"{name} was not written"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layout_survives_json(name):
    spec, _ = family(name)
    assert AttentionSpec.from_json(spec.to_json()) == spec


def arange_store(**shapes) -> dict:
    return {name: np.arange(np.prod(shape), dtype=np.float32).reshape(shape) for name, shape in shapes.items()}


def slots_of(module) -> dict[str, Slot]:
    spec = attention_spec(module, "")
    assert spec is not None
    return spec.slots()


class TestLiteralNumbers:
    """Two heads of width 2, input and output of width 3 where the class allows: rows are counted by hand."""

    def heads(self, qkv_rows: int, **changes) -> HeadWeights:
        slot = Slot(tensor="qkv", heads=2, width=2, head_stride=2)
        o = Slot(tensor="proj", heads=2, width=2, head_stride=2, axis=1)
        slots = {"q": slot, "k": replace(slot, offset=4), "v": replace(slot, offset=8), "o": o} | changes
        spec = AttentionSpec(path="attn", module_class="", family="", scale=1.0, **slots)
        return read_heads(spec, arange_store(qkv=(qkv_rows, 3), proj=(3, 4), q=(4, 3)))

    def test_rows_by_role(self):
        read = self.heads(12)
        np.testing.assert_array_equal(read.W_Q[1], [[6, 9], [7, 10], [8, 11]])
        np.testing.assert_array_equal(read.W_K[0], [[12, 15], [13, 16], [14, 17]])
        np.testing.assert_array_equal(read.W_V[1], [[30, 33], [31, 34], [32, 35]])
        np.testing.assert_array_equal(read.W_O[1], [[2, 6, 10], [3, 7, 11]])

    def test_rows_by_head(self):
        q = Slot(tensor="qkv", heads=2, width=2, head_stride=6)
        read = self.heads(12, q=q, k=replace(q, offset=2), v=replace(q, offset=4))
        np.testing.assert_array_equal(read.W_Q[1], [[18, 21], [19, 22], [20, 23]])
        np.testing.assert_array_equal(read.W_K[0], [[6, 9], [7, 10], [8, 11]])
        np.testing.assert_array_equal(read.W_V[1], [[30, 33], [31, 34], [32, 35]])

    def test_rows_of_keys_and_values_apart_from_queries(self):
        q = Slot(tensor="q", heads=2, width=2, head_stride=2)
        k = replace(q, tensor="qkv")
        read = self.heads(8, q=q, k=k, v=replace(k, offset=4))
        np.testing.assert_array_equal(read.W_Q[1], [[6, 9], [7, 10], [8, 11]])
        np.testing.assert_array_equal(read.W_K[1], [[6, 9], [7, 10], [8, 11]])
        np.testing.assert_array_equal(read.W_V[0], [[12, 15], [13, 16], [14, 17]])

    def test_rows_by_groups_of_heads(self):
        q = Slot(tensor="qkv", heads=4, width=1, head_stride=1, group=2, group_stride=6)
        o = Slot(tensor="proj", heads=4, width=1, head_stride=1, axis=1)
        read = self.heads(12, q=q, v=replace(q, offset=2), k=replace(q, offset=4), o=o)
        np.testing.assert_array_equal(read.W_Q[:, 0, 0], [0, 3, 18, 21])
        np.testing.assert_array_equal(read.W_V[:, 0, 0], [6, 9, 24, 27])
        np.testing.assert_array_equal(read.W_K[:, 0, 0], [12, 15, 30, 33])

    def test_columns_interleaved_by_head(self):
        o = Slot(tensor="proj", heads=2, width=2, head_stride=1, unit_stride=2, axis=1)
        read = self.heads(12, o=o)
        np.testing.assert_array_equal(read.W_O[0], [[0, 4, 8], [2, 6, 10]])
        np.testing.assert_array_equal(read.W_O[1], [[1, 5, 9], [3, 7, 11]])


def test_classes_describe_those_rows():
    from timm.layers import Attention, AttentionPoolLatent
    from timm.models.maxxvit import AttentionCl
    from timm.models.nest import Attention as NestAttention

    with skipped_where_timm_is_older():
        by_role = slots_of(Attention(6, num_heads=2, attn_head_dim=5))
    assert [(slot.offset, slot.head_stride) for slot in by_role.values()] == [(0, 5), (10, 5), (20, 5), (0, 5)]
    by_head = slots_of(AttentionCl(10, dim_head=5))
    assert [(slot.offset, slot.head_stride) for slot in by_head.values()] == [(0, 15), (5, 15), (10, 15), (0, 5)]
    pair = slots_of(AttentionPoolLatent(10, num_heads=2))
    assert [(slot.tensor, slot.offset) for slot in pair.values()][1:3] == [("kv.weight", 0), ("kv.weight", 10)]
    nested = slots_of(NestAttention(10, num_heads=2))
    assert (nested["o"].head_stride, nested["o"].unit_stride) == (1, 2)


def levit_store():
    from timm.models.levit import Attention

    module = Attention(dim=13, key_dim=5, num_heads=3, attn_ratio=2, resolution=2)
    return attention_spec(module, ""), stored(shapes_of(module), "numpy float32", seed=3)


def test_a_bias_in_front_of_no_bias_goes_into_the_batch_norm():
    spec, tensors = levit_store()
    heads = read_heads(spec, tensors)
    write_heads(spec, heads.replace(b_Q=heads.b_Q + 0.25), tensors)
    np.testing.assert_allclose(read_heads(spec, tensors).b_Q, heads.b_Q + 0.25, atol=1e-6)
    np.testing.assert_array_equal(read_heads(spec, tensors).b_K, heads.b_K)


def test_nothing_but_zero_is_written_in_front_of_a_silent_batch_norm():
    spec, tensors = levit_store()
    tensors["proj.ln.bn.weight"][:] = 0
    heads = read_heads(spec, tensors)
    assert not heads.W_O.any()
    write_heads(spec, heads, tensors)
    assert_same(read_heads(spec, tensors), heads)
    with pytest.raises(CheckpointError, match=r"proj\.ln\.bn\.weight is zero"):
        write_heads(spec, heads.replace(W_O=heads.W_O + 1), tensors)


def test_a_missing_bias_leaves_the_stored_one():
    spec, shapes = family("timm.layers.attention.AttentionRope")
    tensors = stored(shapes, "numpy float32", seed=4)
    old = tensors["q_proj.bias"].copy()
    write_heads(spec, read_heads(spec, tensors).replace(b_Q=None), tensors)
    np.testing.assert_array_equal(tensors["q_proj.bias"], old)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("qkv.weight", np.zeros((40, 13)), "too small for 3 heads of width 5"),
        ("qkv.weight", np.zeros((45, 13, 3, 3)), "a matrix is needed"),
        ("qkv.bias", np.zeros(7), "has 7 entries, too few for 3 heads of 5"),
        ("proj.weight", np.full((13, 15), np.nan), "holds 195 NaN or Inf values of 195"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(name, value, message):
    from timm.layers import Attention

    with skipped_where_timm_is_older():
        module = Attention(13, num_heads=3, attn_head_dim=5, qkv_bias=True)
    tensors = stored(shapes_of(module), "numpy float32", seed=5) | {name: value}
    with pytest.raises(CheckpointError, match=message):
        read_heads(attention_spec(module, ""), tensors)
