"""The products a network computes with its own Linear layers are the requested matrices."""

import math

import numpy as np
import pytest
import timm
import torch
from timm.layers.attention2d import MultiQueryAttention2d
from torch import nn

from attnlens.checkpoints import ModuleWeights
from attnlens.circuits import qk_circuit
from attnlens.heads import expand_groups
from attnlens.inits import init_
from attnlens.inits.products import draw_matrix
from attnlens.inits.random import Streams
from attnlens.inits.truncation import split, unwanted_band
from attnlens.layouts import read_heads
from attnlens.models.architecture import describe_module

TINY = {"img_size": 32, "patch_size": 8, "num_classes": 3}


def vit(**more):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", **{**TINY, "embed_dim": 48, "depth": 2, "num_heads": 4, **more}
    ).eval()


def requested(kind, layer, head, pair, size, seed=0):
    return draw_matrix(pair, size, "normal", Streams(seed).generator(kind, layer, head))


def best(A, rank):
    """Return the best approximation of a rank, by a full SVD."""
    U, S, Vh = torch.linalg.svd(A)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def through_linears(block, x):
    """Return QK of each head and the summed OV as a timm block computes them from the rows of x, before any softmax."""
    attn = block.attn
    rows = len(x)
    with torch.no_grad():
        q, k, v = attn.qkv(x).reshape(rows, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        out = attn.proj(v.transpose(0, 1).reshape(rows, -1))
    return q @ k.transpose(1, 2), out


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def test_products_of_the_linears_are_the_requested_matrices():
    model = vit()
    init_(model, "mimetic")
    for layer, block in enumerate(model.blocks):
        qk, ov = through_linears(block, torch.eye(48))
        for head in range(4):
            wanted = best(requested("qk", layer, head, (0.7, 0.7), 48), 12)
            assert relative(qk[head], wanted) < 1e-5
        assert relative(ov, requested("ov", layer, 0, (0.4, -0.4), 48)) < 1e-5


def test_products_of_untransposed_factors_are_not():
    model = vit()
    init_(model, "mimetic")
    block = model.blocks[0]
    with torch.no_grad():
        block.attn.qkv.weight[96:] = block.attn.qkv.weight[96:].T.clone()
        block.attn.proj.weight[:] = block.attn.proj.weight.T.clone()
    _, ov = through_linears(block, torch.eye(48))
    assert relative(ov, requested("ov", 0, 0, (0.4, -0.4), 48)) > 0.5


def test_effective_products_hold_norm_gain_and_layer_scale():
    model = vit(init_values=0.1)
    for block in model.blocks:
        nn.init.uniform_(block.norm1.weight, 0.5, 2.0)
        nn.init.uniform_(block.ls1.gamma, -0.2, 0.2)
    init_(model, "mimetic", fold="effective", seed=3)
    for layer, block in enumerate(model.blocks):
        qk, ov = through_linears(block, torch.diag(block.norm1.weight.detach()))
        kept = block.ls1.gamma.detach().abs() >= 1e-3 * block.ls1.gamma.detach().abs().max()
        assert relative(qk[1], best(requested("qk", layer, 1, (0.7, 0.7), 48, 3), 12)) < 1e-5
        wanted = requested("ov", layer, 0, (0.4, -0.4), 48, 3) * kept
        assert relative(ov * block.ls1.gamma.detach(), wanted) < 1e-5


def test_wide_models_meet_the_same_bounds_by_the_fast_way():
    """At width 576 the Krylov space and the float32 eigenvectors are used, below 512 neither is."""
    model = vit(embed_dim=576, num_heads=9, depth=1)
    init_(model, "mimetic")
    qk, ov = through_linears(model.blocks[0], torch.eye(576))
    assert relative(ov, requested("ov", 0, 0, (0.4, -0.4), 576)) < 1e-5
    wanted = best(requested("qk", 0, 4, (0.7, 0.7), 576), 64)
    assert relative(qk[4], wanted) < 1e-5


@pytest.mark.parametrize("pair", [(0.7, 0.7), (1.0, 0.0), (0.1, -1.0), (2.0, 0.3)])
def test_fast_truncation_is_the_exact_one(pair):
    size, rank = 640, 64
    A = draw_matrix(pair, size, "normal", torch.Generator().manual_seed(1))
    left, right = (part[0] for part in split(A[None], rank, unwanted_band(*pair, rank, size)))
    exact = [part[0] for part in split(A[None], rank)]
    assert relative(left @ right.T, exact[0] @ exact[1].T) < 1e-5
    assert relative(left @ right.T, best(A, rank)) < 1e-5
    # no rank-k matrix is nearer, and this one's distance to A is the discarded singular values' to 1e-9
    discarded = torch.linalg.svdvals(A)[rank:].norm()
    assert float((A - left @ right.T).norm() / discarded - 1) < 1e-9


def test_factors_share_the_singular_values_and_the_largest_entries_are_positive():
    A = draw_matrix((0.7, 0.7), 30, "normal", torch.Generator().manual_seed(0))
    left, right = (part[0] for part in split(A[None], 7))
    values = torch.linalg.svdvals(A)[:7]
    torch.testing.assert_close((left**2).sum(0), values)
    torch.testing.assert_close((right**2).sum(0), values)
    largest = right.gather(0, right.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_multi_query_heads_share_their_error_as_the_least_squares_solution_does():
    torch.manual_seed(0)
    module = MultiQueryAttention2d(24, num_heads=4, key_dim=5, value_dim=7)
    report = init_(module, "mimetic", seed=2)
    spec = describe_module(module).specs[0]
    heads = read_heads(spec, ModuleWeights(module))
    assert (heads.num_heads, heads.num_kv_heads, heads.head_dim, heads.value_dim) == (4, 1, 5, 7)
    stack = torch.cat([requested("qk", 0, head, (0.7, 0.7), 24, 2) for head in range(4)])
    product = qk_circuit(heads).dense().reshape(96, 24)
    assert relative(torch.from_numpy(product), best(stack, 5)) < 1e-5
    assert any("share a key head" in note for note in report.notes)
    total = sum(v @ o for v, o in zip(expand_groups(heads.W_V, 4), heads.W_O, strict=True))
    assert relative(torch.from_numpy(total), best(requested("ov", 0, 0, (0.4, -0.4), 24, 2), 7)) < 1e-5


def test_multihead_attention_computes_the_requested_products():
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 3, batch_first=True)
    init_(module, "mimetic")
    q, k, v = (part.detach() for part in module.in_proj_weight.chunk(3))
    wanted = best(requested("qk", 0, 2, (0.7, 0.7), 24), 8)
    assert relative(q[16:24].T @ k[16:24], wanted) < 1e-5
    with torch.no_grad():
        ov = module.out_proj(torch.eye(24) @ v.T)
    assert relative(ov, requested("ov", 0, 0, (0.4, -0.4), 24)) < 1e-5


def test_a_head_wider_than_its_input_holds_all_of_the_draw_without_dead_units():
    torch.manual_seed(0)
    module = MultiQueryAttention2d(10, num_heads=1, key_dim=16, value_dim=13)
    init_(module, "mimetic")
    heads = read_heads(describe_module(module).specs[0], ModuleWeights(module))
    assert relative(torch.from_numpy(heads.W_Q[0] @ heads.W_K[0].T), requested("qk", 0, 0, (0.7, 0.7), 10)) < 1e-5
    assert relative(torch.from_numpy(heads.W_V[0] @ heads.W_O[0]), requested("ov", 0, 0, (0.4, -0.4), 10)) < 1e-5
    assert np.linalg.norm(heads.W_Q[0], axis=0).min() > 1e-3
    assert np.linalg.norm(heads.W_V[0], axis=0).min() > 1e-3


def test_shuffled_columns_make_heads_alike_and_keep_the_sum():
    def diagonals(columns):
        model = vit(embed_dim=192, num_heads=3, depth=1)
        init_(model, "ov-only", columns=columns)
        heads = read_heads(describe_module(model).specs[0], ModuleWeights(model))
        products = [v @ o for v, o in zip(heads.W_V, heads.W_O, strict=True)]
        return [float(np.diag(M).mean()) for M in products], sum(products)

    (ordered, total), (shuffled, same) = diagonals("svd"), diagonals("shuffled")
    np.testing.assert_allclose(same, total, atol=1e-6)
    np.testing.assert_allclose(ordered, [-0.226, -0.130, -0.044], atol=0.006)  # ../shared/inits.md, d = 192, H = 3
    assert max(shuffled) - min(shuffled) < 0.04


def test_alpha_zero_draws_the_directions_at_random():
    model = vit(depth=1)
    report = init_(model, "qk-only", alpha=0.0, beta=0.7)
    qk, _ = through_linears(model.blocks[0], torch.eye(48))
    for head in range(4):
        projection = qk[head].double() / 0.7
        assert relative(projection @ projection, projection) < 1e-5
    assert all(math.isclose(row.beta, 0.7 * 12 / 48, rel_tol=1e-6) for row in report.products)
    assert float((qk[0] - qk[1]).norm()) > 0.5
