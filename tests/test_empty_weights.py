"""Weights with an axis of no length: each way of reading them ends in one line that names the tensor."""

import itertools
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import Attention

import attnlens
from attnlens.checkpoints.codes import dequantised
from attnlens.checkpoints.memory import StateDict
from attnlens.errors import CheckpointError, UnsupportedAttentionError, UsageError
from tests.conftest import random_heads

FULL = {"q": (6, 8), "k": (6, 8), "v": (6, 8), "o": (8, 6)}


def split(shapes):
    return {f"l.0.attn.{role}_proj.weight": torch.ones(shape) for role, shape in shapes.items()}


@pytest.mark.parametrize(("role", "axis"), [*itertools.product("qkv", (1,)), ("o", 0)])
def test_a_projection_without_input_or_output_is_refused_by_name(role, axis):
    shape = tuple(0 if place == axis else length for place, length in enumerate(FULL[role]))
    with pytest.raises(UnsupportedAttentionError, match=rf"^l\.0\.attn: W_{role.upper()} has no entries, its shape is"):
        attnlens.inspect(split({**FULL, role: shape}), num_heads=2)


@pytest.mark.parametrize("role", FULL)
def test_a_projection_without_units_is_refused_by_its_heads(role):
    shape = tuple(0 if length == 6 else length for length in FULL[role])
    with pytest.raises(UsageError, match=r"^l\.0\.attn cannot have 2 heads: it has .*\b0\b"):
        attnlens.inspect(split({**FULL, role: shape}), num_heads=2)


@pytest.mark.parametrize(("qkv", "proj", "named"), [((18, 0), (8, 6), "qkv"), ((18, 8), (0, 6), "proj")])
@pytest.mark.parametrize("command", [attnlens.inspect, attnlens.fit_params, attnlens.compose])
def test_packed_rows_without_entries_are_refused_by_name(command, qkv, proj, named):
    state = {"blocks.0.attn.qkv.weight": torch.ones(qkv), "blocks.0.attn.proj.weight": torch.ones(proj)}
    with pytest.raises(CheckpointError, match=rf"^blocks\.0\.attn\.{named}\.weight has no entries, its shape is \["):
        command(state, num_heads=2)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_live_layer_without_input_is_refused():
    module = Attention(8, num_heads=2)
    module.qkv = torch.nn.Linear(0, 24, bias=False)
    with pytest.raises(UnsupportedAttentionError, match=r"^the layer: W_Q has no entries, its shape is \[2, 0, 4\]$"):
        attnlens.inspect(module)


@pytest.mark.parametrize(
    ("axis", "emptied", "named"),
    [
        (1, ("W_Q",), "W_Q"),
        (1, ("W_K",), "W_K"),
        (1, ("W_V",), "W_V"),
        (2, ("W_Q", "W_K"), "W_Q"),
        (2, ("W_O",), "W_O"),
    ],
)
def test_heads_hold_no_weight_without_entries(axis, emptied, named):
    heads = random_heads()
    changes = dict.fromkeys(("b_Q", "b_K", "b_V", "b_O", "norm_gain", "layer_scale"))
    for name in emptied:
        shape = list(getattr(heads, name).shape)
        shape[axis] = 0
        changes[name] = np.zeros(shape)
    with pytest.raises(UnsupportedAttentionError, match=rf"{named} has no entries, its shape is \["):
        heads.replace(**changes)


LONG = 120_000_000
SEPARATE = {f"l.0.attn.{role}_proj.weight": (LONG, 0) for role in "qkv"} | {"l.0.attn.o_proj.weight": (0, LONG)}
PACKED = {"l.0.attn.qkv.weight": (3 * LONG, 0), "l.0.attn.proj.weight": (0, LONG)}
SCALES = {"l.0.attn.qkv.weight_scale": (1,)}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
@pytest.mark.parametrize(
    ("shapes", "order"),
    [(SEPARATE, None), (PACKED, None), (PACKED, "head,dim,qkv"), (PACKED | SCALES, None)],
)
def test_an_empty_tensor_longer_than_its_file_is_refused_by_name(suffix, shapes, order, tmp_path):
    """Its length takes no bytes: what is made for each of its rows would be of any size."""
    path, tensors = tmp_path / f"x{suffix}", {name: torch.zeros(shape) for name, shape in shapes.items()}
    if suffix == ".safetensors":
        save_file(tensors, path)
    elif suffix == ".pth":
        torch.save(tensors, path)
    else:
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    tracemalloc.start()
    with pytest.raises(
        CheckpointError, match=rf"^{next(iter(shapes))[:8]}\S* in .* is beyond the \d+ bytes of the file"
    ):
        attnlens.inspect(path, num_heads=4, row_order=order)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_one_scale_is_spread_over_blocks_of_any_size():
    codes, scales = np.ones((3, 5), np.float32), np.array([[1.0, 2.0, 3.0]])
    stored = StateDict({"a.weight": codes, "a.weight_scale_inv": scales})
    found = dequantised(stored, lambda: {"quantization_config": {"weight_block_size": [10**18, 2]}})
    np.testing.assert_array_equal(found["a.weight"], [[1, 1, 2, 2, 3]] * 3)
