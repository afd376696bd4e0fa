"""Readers against timm's own forward pass: what enters the attention product is x @ W + b, for every head, to 1e-9.

The oracle knows no layout. It records what each projection reads and what each product of the forward pass multiplies,
and looks the predicted queries, keys and values up among the operands. Columns of the output projection are found by
intervention: a different constant is added to each (head, unit) of the attention output, and the input column in which
it arrives belongs to that unit. Parts that stand between projection and product (norms, RoPE, activations) are replaced
by the identity, and a form says which; the length of q and k is left alone, where a class divides it out.
"""

import inspect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from attnlens.layouts import read_heads
from attnlens.layouts.builders import blocks, by_head, columns
from attnlens.layouts.describe import rules_by_class
from attnlens.layouts.registry import class_name
from tests.layout_forms import FORMS, FORMS_BY_CLASS, Form, build

TOLERANCE = 1e-9


@dataclass
class Product:
    """One product of the forward pass; ``v`` and ``scale`` only where it is scaled_dot_product_attention."""

    left: torch.Tensor
    right: torch.Tensor
    output: torch.Tensor
    v: torch.Tensor | None = None
    scale: float | None = None


class Recorder:
    """Record the input of every projection and the operands of every product; add ``edits`` to products' outputs."""

    def __init__(self, module: nn.Module, edits: dict[int, torch.Tensor] | None = None) -> None:
        self.names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.inputs: dict[str, torch.Tensor] = {}
        self.products: list[Product] = []
        self.edits = edits or {}

    def linear(self, x, weight, bias=None):
        self.inputs[self.names.get(id(weight), "")] = x.reshape(-1, x.shape[-1])
        return _linear(x, weight, bias)

    def conv2d(self, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        steps = stride if isinstance(stride, tuple) else (stride, stride)
        grid = x[:, :, :: steps[0], :: steps[1]].movedim(1, -1)
        self.inputs[self.names.get(id(weight), "")] = grid.reshape(-1, x.shape[1])
        return _conv2d(x, weight, bias, stride, padding, dilation, groups)

    def matmul(self, left, right):
        return self._add(Product(left, right, _matmul(left, right)))

    def attention(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        output = _attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
        return self._add(Product(q, k, output, v, q.shape[-1] ** -0.5 if scale is None else scale))

    def _add(self, product: Product) -> torch.Tensor:
        edit = self.edits.get(len(self.products))
        self.products.append(product)
        return product.output if edit is None else product.output + edit

    @contextmanager
    def watching(self, linear_attention: bool):
        def multiply(left, right):  # a function, so that the class binds it
            return self.matmul(left, right)

        with ExitStack() as stack:
            for owner, name, value in (
                (nn.functional, "linear", self.linear),
                (nn.functional, "conv2d", self.conv2d),
                (nn.functional, "scaled_dot_product_attention", self.attention),
                (nn.functional, "normalize", lambda x, **_: x),
                (torch, "matmul", self.matmul),
                (torch, "bmm", self.matmul),
                (torch.Tensor, "__matmul__", multiply),
            ):
                stack.enter_context(patch.object(owner, name, value))
            if linear_attention:
                for owner, name in ((torch.Tensor, "softmax"), (torch.Tensor, "float"), (nn.functional, "softmax")):
                    stack.enter_context(patch.object(owner, name, lambda x, *_, **__: x))
            torch.backends.mha.set_fastpath_enabled(False)
            try:
                yield
            finally:
                torch.backends.mha.set_fastpath_enabled(True)


_linear, _conv2d, _matmul = nn.functional.linear, nn.functional.conv2d, torch.matmul
_attention = nn.functional.scaled_dot_product_attention


class Unrotated(nn.Module):
    def get_embed(self, shape):
        ones = torch.ones(shape[0] * shape[1], 8, dtype=torch.float64)
        return torch.cat([0 * ones, ones], -1)


def remove_(module: nn.Module, parts: tuple[str, ...], arguments: dict[str, Any]) -> None:
    """Put the identity in the place of what stands between projection and product."""
    for part in parts:
        if part == "rope":
            arguments.update({name: None for name in ("rope",) if name in arguments})
            arguments.update({name: arguments[name] * 0 + still for name, still in _STILL.items() if name in arguments})
            continue
        owner, _, name = part.rpartition(".")
        parent = module.get_submodule(owner)
        old = getattr(parent, name)
        new = nn.ModuleList(nn.Identity() for _ in old) if isinstance(old, nn.ModuleList) else nn.Identity()
        setattr(parent, name, Unrotated() if part == "pos_embed" else new)


_STILL = {"rope_cos": 1.0, "rope_sin": 0.0}


def hold(module, spec, arguments, without=()) -> None:
    """Assert that ``spec`` reads ``module`` as its forward pass uses it."""
    remove_(module, without, arguments)
    heads = read_heads(spec, {name: value.numpy() for name, value in module.state_dict().items()})
    seen = run(module, spec, arguments)
    predicted = {
        role: predict(seen, spec.slots()[role], weight, bias)
        for role, weight, bias in (
            ("q", heads.W_Q, heads.b_Q),
            ("k", heads.W_K, heads.b_K),
            ("v", heads.W_V, heads.b_V),
        )
    }
    scores, outputs = find_products(seen, spec, predicted)
    asked = {int(head) for found in scores.values() for head in found.ravel() if head >= 0}
    assert asked == set(range(heads.num_heads)), f"queries of heads {sorted(asked)} were found of {heads.num_heads}"
    if heads.W_O is not None:
        places = find_columns(module, spec, arguments, seen, outputs, heads)
        hold_output(module, spec, heads, places)


def run(module, spec, arguments, edits=None) -> Recorder:
    recorder = Recorder(module, edits)
    with torch.no_grad(), recorder.watching(spec.kind == "linear"):
        module(**arguments)
    return recorder


def predict(seen, slot, weight, bias) -> np.ndarray:
    """Return x @ W + b of every head, ``[head, token, unit]``, x what the forward pass gave the projection."""
    found = []
    for head, W in enumerate(weight):
        x = seen.inputs[slot.tensor.format(head=head)].numpy()
        found.append(x @ W + (0 if bias is None else bias[head]))
    return np.stack(found)


def find_products(seen, spec, predicted):
    """Return the heads ``[batch of the product]`` of the score products and of those whose output is the heads'."""
    groups = len(predicted["q"]) // len(predicted["k"])
    scores, outputs = {}, {}
    for index, product in enumerate(seen.products):
        if product.v is not None:
            asking = look_up(product.left, predicted["q"])
            if asking is not None:
                assert (look_up(product.right, predicted["k"]) == asking // groups).all(), "keys of another head"
                sharing = len(predicted["q"]) // len(predicted["v"])
                assert (look_up(product.v, predicted["v"]) == asking // sharing).all(), "values of another head"
                if spec.kind == "token" and "cosine" not in spec.leaves_out:
                    assert product.scale == pytest.approx(spec.scale, rel=1e-12), "another scale"
                scores[index] = asking
                outputs[index] = (asking // (len(predicted["q"]) // spec_heads(spec)), -1)
            continue
        left, right = _same_batch(product.left, product.right)
        if spec.kind == "linear":
            asking = look_up(left, predicted["q"], partial=True)
            if asking is not None:
                scores[index], outputs[index] = asking, (asking, -1)
            continue
        sides = (left, right.mT) if spec.kind == "token" else (left.mT, right)
        scale = left.shape[-1] ** -0.5 if "token_count_scale" in spec.leaves_out else spec.scale
        asking = look_up_scaled(sides[0], predicted["q"], scale)
        asked = look_up_scaled(sides[1], predicted["k"], scale)
        if asking is not None and asked is not None:
            assert (asked == asking // groups).all(), "keys of another head"
            scores[index] = asking
        for side, axis in ((right, -1), (left.mT, -2)) if spec.kind == "token" else ((right.mT, -2),):
            valued = look_up(side, predicted["v"])
            if valued is not None:
                outputs[index] = (valued, axis)
    if spec.kind == "linear":
        pairs = [_same_batch(product.left, product.right) for product in seen.products]
        matched = [
            (look_up(left.mT, predicted["k"], partial=True), look_up(right, predicted["v"], partial=True))
            for left, right in pairs
        ]
        assert any(k is not None and v is not None and (k == v).all() for k, v in matched), "keys or values not found"
    assert scores, "no product of the forward pass multiplies the predicted queries and keys"
    assert outputs, "no product of the forward pass multiplies the predicted values"
    return scores, outputs


def spec_heads(spec) -> int:
    """Number of heads of the attention output."""
    return spec.v.heads if spec.o is None else spec.o.heads


def _same_batch(left, right):
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return left.expand(*batch, *left.shape[-2:]), right.expand(*batch, *right.shape[-2:])


def look_up_scaled(operand, predicted, scale):
    found = look_up(operand, predicted)
    return look_up(operand, predicted * scale) if found is None else found


def look_up(operand, predicted, partial=False):
    """Return whose rows ``operand`` ``[..., token, unit]`` holds: a head for each batch entry, None where nobody's.

    Every row must be a predicted one, all of an entry of one head; rows of zeros are padding. With ``partial`` some
    entries may hold other heads than the predicted (-1), and rows may be longer (a column of ones).
    """
    _, tokens, width = predicted.shape
    rows = operand.reshape(-1, *operand.shape[-2:]).numpy()
    if rows.shape[-1] != width and not (partial and rows.shape[-1] == width + 1):
        return None
    rows = rows[..., :width]
    known = predicted.reshape(-1, width)
    direction = np.random.default_rng(1).normal(size=width)
    order = np.argsort(known @ direction)
    keys = (known @ direction)[order]
    wanted = rows @ direction
    right = np.clip(np.searchsorted(keys, wanted), 1, len(keys) - 1) if len(keys) > 1 else np.zeros(wanted.shape, int)
    nearest = np.where(wanted - keys[right - 1] < keys[right] - wanted, right - 1, right)
    close = np.abs(known[order[nearest]] - rows).max(-1) <= TOLERANCE * np.abs(known).max()
    padding = ~rows.any(-1)
    owner = np.where(padding, -1, order[nearest] // tokens)
    entry = owner.max(-1)
    whole = ((close & (owner == entry[:, None])) | padding).all(-1) & (entry >= 0)
    if not (whole.any() if partial else whole.all()):
        return None
    return np.where(whole, entry, -1)


def find_columns(module, spec, arguments, seen, outputs, heads) -> np.ndarray:
    """Return the input column of the output projection that each unit arrives in, ``[head, unit]``."""
    shape = heads.W_O.shape[:2]
    codes = (np.ones(shape), 1 + np.arange(np.prod(shape)).reshape(shape) / np.prod(shape))
    before = seen.inputs[spec.o.tensor].numpy()
    places = np.full(shape, -1)
    for index in sorted(outputs, reverse=True):  # a cascaded head moves the columns of those behind it too
        edits = [{index: _edit(seen.products[index].output, *outputs[index], code)} for code in codes]
        once, twice = (run(module, spec, arguments, edit).inputs[spec.o.tensor].numpy() - before for edit in edits)
        free = np.setdiff1d(np.flatnonzero(np.abs(once).max(0) > 1e-6 * np.abs(once).max()), places)
        row = np.abs(once).argmax(0)[free]
        for where, ratio in zip(free, twice[row, free] / once[row, free], strict=True):
            unit = np.unravel_index(np.abs(codes[1] - ratio).argmin(), shape)
            assert abs(codes[1][unit] - ratio) < 1e-2 / np.prod(shape), "the columns mix units"
            assert places[unit] == -1, "two columns for one unit"
            places[unit] = where
    assert (places >= 0).all(), f"{(places < 0).sum()} units of the attention output reach no column"
    return places


def _edit(output, owner, axis, code) -> torch.Tensor:
    """Return what adds ``code[head]`` to the units of every token of a product's output; -1 owners stay as they are."""
    width = output.shape[axis]
    added = np.zeros((len(owner), width))
    added[owner >= 0, : code.shape[1]] = code[owner[owner >= 0]]
    added = torch.from_numpy(added).reshape(*output.shape[:-2], 1, width)
    return added if axis == -1 else added.mT


def hold_output(module, spec, heads, places) -> None:
    """Assert that the output projection maps those columns by W_O: its own call, BatchNorm and all, on random input."""
    leaf = spec.o.tensor.removesuffix(".weight")
    wrapper = module.get_submodule(leaf.rpartition(".")[0])
    normed = wrapper is not module and any(hasattr(part, "running_var") for part in wrapper.children())
    projection = wrapper if normed else module.get_submodule(leaf)
    width = module.get_submodule(leaf).weight.shape[1]
    z = np.random.default_rng(2).normal(size=(7, *places.shape))
    x = np.zeros((7, width))
    x[:, places] = z
    x = torch.from_numpy(x)[None]
    convolved = isinstance(module.get_submodule(leaf), nn.Conv2d)
    with torch.no_grad():
        y = projection(x.mT[..., None])[..., 0].mT if convolved else projection(x)
    expected = np.einsum("nhu,huo->no", z, heads.W_O) + (0 if heads.b_O is None else heads.b_O)
    np.testing.assert_allclose(y[0].numpy(), expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


def prepare(form: Form):
    module, spec, args, kwargs = build(form)
    return module, spec, dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.id)
def test_heads_are_what_the_forward_pass_multiplies(form):
    module, spec, arguments = prepare(form)
    assert class_name(type(module)) == form.module_class
    hold(module, spec, arguments, form.without)


def test_every_rule_is_held_against_a_forward_pass():
    assert set(rules_by_class()) == set(FORMS_BY_CLASS)


@pytest.mark.parametrize(
    ("name", "order"),
    [("test_vit", by_head), ("test_maxvit", blocks)],
    ids=["rows by role read by head", "rows by head read by role"],
)
def test_a_reader_of_permuted_rows_fails_the_oracle(name, order):
    module, spec, arguments = prepare(next(form for form in FORMS if form.source == name))
    width = module.qkv.out_features // (3 * module.num_heads)
    q, k, v = order(module, "qkv", module.num_heads, width, width, width)
    with pytest.raises(AssertionError):
        hold(module, spec.replace(q=q, k=k, v=v), arguments)


@pytest.mark.parametrize(
    ("name", "interleaved"),
    [("test_vit", True), ("nest_tiny", False)],
    ids=["plain columns read as interleaved", "interleaved columns read as plain"],
)
def test_a_reader_of_permuted_columns_fails_the_oracle(name, interleaved):
    module, spec, arguments = prepare(next(form for form in FORMS if form.source == name))
    width = module.proj.in_features // module.num_heads
    o = columns(module, "proj", module.num_heads, width, interleaved=interleaved)
    with pytest.raises(AssertionError):
        hold(module, spec.replace(o=o), arguments)


@pytest.mark.parametrize("role", "qkvo")
def test_a_transposed_reader_fails_the_oracle(role):
    module, spec, arguments = prepare(next(form for form in FORMS if form.path == "blocks_token_only.0.attn"))
    slot = spec.slots()[role]
    assert module.q.in_features == module.q.out_features, "only a square weight hides a transposed read"
    with pytest.raises(AssertionError):
        hold(module, spec.replace(**{role: replace(slot, axis=1 - slot.axis)}), arguments)


@pytest.mark.parametrize("roles", ["qk", "kv", "qv"])
def test_a_reader_that_swaps_two_roles_fails_the_oracle(roles):
    module, spec, arguments = prepare(next(form for form in FORMS if form.source == "test_vit"))
    first, second = roles
    swapped = {first: spec.slots()[second], second: spec.slots()[first]}
    with pytest.raises(AssertionError):
        hold(module, spec.replace(**swapped), arguments)


def test_a_reader_that_leaves_a_batch_norm_out_fails_the_oracle():
    form = next(form for form in FORMS if form.source == "levit_128s")
    for role in "qko":
        module, spec, arguments = prepare(form)
        with pytest.raises(AssertionError):
            hold(module, spec.replace(**{role: replace(spec.slots()[role], batch_norm=None)}), arguments, form.without)
