"""`verify-init`: mistakes that leave alpha, beta or whole products as they are, each planted and caught by its name."""

import math

import pytest
import timm
import torch

from attnlens.inits import init_, verify_init
from attnlens.inits.verify.mistakes import MISTAKES
from tests.test_inits_names import NAMES, options, vit
from tests.test_inits_verify import RECIPE, WIDTH

D, K = 96, 32


@torch.no_grad()
def spoil(model, how):
    """Make one mistake in a network that `mimetic` or `fitted` made, with torch alone."""
    noise = torch.randn(D, D, generator=torch.Generator().manual_seed(11)) / math.sqrt(D)
    for block in model.blocks:
        qkv, proj = block.attn.qkv, block.attn.proj
        query, key, value = (qkv.weight[start : start + D] for start in (0, D, 2 * D))
        if how == "split of QK":
            query *= 1000
            key /= 1000
        elif how == "split of OV":
            value /= 3
            proj.weight *= 3
        elif how == "singular values on one side":
            roots = query.norm(dim=1, keepdim=True)
            query *= roots
            key /= roots
        elif how == "bias of q":
            qkv.bias[:D] = 0.1
        elif how == "bias of the output":
            proj.bias[7] = -0.1
        elif how == "an empty direction":
            query[5] = 0
        elif how == "packed [head][q|k|v]":
            qkv.weight.copy_(qkv.weight.reshape(3, -1, K, D).transpose(0, 1).reshape(3 * D, D))
        elif how == "one noise in all layers":
            for head in range(3):
                write_qk(query, key, head, 0.7 * torch.roll(noise, 31 * head, 1) + 0.7 * torch.eye(D))
        elif how == "one noise in both circuits":
            fresh = torch.randn(D, D, generator=torch.Generator().manual_seed(id_of(block, model))) / math.sqrt(D)
            write_qk(query, key, 1, 0.7 * fresh + 0.7 * torch.eye(D))
            U, S, Vh = torch.linalg.svd(0.4 * fresh - 0.4 * torch.eye(D))
            value.copy_((U * S.sqrt()).T)
            proj.weight.copy_((S.sqrt()[:, None] * Vh).T)


def write_qk(query, key, head, A, first=0):
    U, S, Vh = torch.linalg.svd(A)
    rows, kept = slice(head * K, (head + 1) * K), slice(first, first + K)
    query[rows] = (U[:, kept] * S[kept].sqrt()).T
    key[rows] = S[kept].sqrt()[:, None] * Vh[kept]


def id_of(block, model):
    return list(model.blocks).index(block)


PLANTED = {
    "split of QK": "unbalanced split",
    "split of OV": "unbalanced split",
    "singular values on one side": "unbalanced split",
    "bias of q": "bias not zero",
    "bias of the output": "bias not zero",
    "an empty direction": "skipped direction",
    "packed [head][q|k|v]": "packed by head",
    "one noise in all layers": "reused noise",
    "one noise in both circuits": "reused noise",
}


def test_every_mistake_is_planted_somewhere():
    assert {*PLANTED.values(), *RECIPE} == set(MISTAKES)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("how", PLANTED)
def test_each_planted_mistake_is_caught_by_its_name(how, seed):
    model = vit(**WIDTH)
    init_(model, "mimetic", seed=3)
    spoil(model, how)
    report = verify_init(model, init="mimetic", seed=seed)
    assert not report.passed
    assert list(report.mistakes) == [PLANTED[how]], [check.problem for check in report.checks if check.problem]


def test_the_checks_of_a_mistake_are_those_of_the_products_it_was_made_in():
    def found(how):
        model = vit(**WIDTH)
        init_(model, "mimetic", seed=3)
        spoil(model, how)
        report = verify_init(model, init="mimetic")
        return [(c.layer, c.circuit, c.head) for c in report.checks if c.problem]

    heads = [(layer, "qk", head) for layer in (0, 1) for head in (0, 1, 2)]
    assert found("split of QK") == heads
    assert found("split of OV") == [(0, "ov", "all"), (1, "ov", "all")]
    assert found("bias of the output") == [(0, "bias", "all"), (1, "bias", "all")]
    assert found("an empty direction") == [(0, "qk", 0), (1, "qk", 0)]
    assert found("one noise in all layers") == [(1, "qk", 0), (1, "qk", 1), (1, "qk", 2)]
    assert found("one noise in both circuits") == [(0, "ov", "all"), (1, "ov", "all")]


@pytest.mark.parametrize("seed", [None, 3])
def test_cloned_value_heads_are_caught(seed):
    model, params = vit(**WIDTH), vit(9, **WIDTH)
    init_(params, "mimetic")
    init_(model, "fitted", seed=3, params=params, ov="head")
    assert verify_init(model, init="fitted", seed=seed, params=params, ov="head").passed
    with torch.no_grad():
        attn = model.blocks[1].attn
        attn.qkv.weight[2 * D + K : 2 * D + 2 * K] = attn.qkv.weight[2 * D : 2 * D + K]
        attn.proj.weight[:, K : 2 * K] = attn.proj.weight[:, :K]
    report = verify_init(model, init="fitted", seed=seed, params=params, ov="head")
    assert [(c.layer, c.circuit, c.head) for c in report.mistakes["cloned heads"]] == [(1, "ov", 1)]


def test_a_direction_skipped_is_named_where_the_draw_is_known():
    """Directions 2 to k + 1 in place of 1 to k: alpha and beta stay within what draws differ by."""
    model = vit(**WIDTH)
    init_(model, "mimetic", seed=3)
    generator = torch.Generator()
    with torch.no_grad():
        qkv = model.blocks[0].attn.qkv.weight
        Q, key = qkv[K : 2 * K].double(), qkv[D + K : D + 2 * K].double()
        M = Q.T @ key
        U, S, Vh = torch.linalg.svd(M)
        other = torch.linalg.qr(torch.randn(D, D - K, generator=generator, dtype=torch.float64))[0]
        left = (U[:, K:] @ U[:, K:].T @ other)[:, :1]
        right = (Vh[K:].T @ Vh[K:] @ other)[:, 1:2]
        left, right = left / left.norm(), right / right.norm()
        U, V = torch.cat([U[:, 1:K], left], 1), torch.cat([Vh[1:K].T, right], 1)
        S = torch.cat([S[1:K], S[K - 1 : K] * 0.98])
        qkv[K : 2 * K], qkv[D + K : D + 2 * K] = (U * S.sqrt()).T, (V * S.sqrt()).T
    report = verify_init(model, init="mimetic", seed=3)
    assert [(c.layer, c.head) for c in report.mistakes["skipped direction"]] == [(0, 1)]
    assert list(report.mistakes) == ["skipped direction"]


NETWORKS = {
    "wide": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=16, depth=4, num_classes=3),
    "LayerScale": lambda: vit(embed_dim=64, depth=2, init_values=0.3),
    "twelve narrow layers": lambda: vit(depth=12, embed_dim=32, num_heads=2),
    "heads of another width": lambda: timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=60,
        depth=2,
        num_heads=5,
        num_classes=3,
        qkv_bias=False,
    ),
    "many narrow heads": lambda: vit(embed_dim=192, depth=3, num_heads=48),
    "swin": lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 2, 1)),
    "separate q, k, v": lambda: timm.create_model("eva02_tiny_patch14_224", depth=2, img_size=28, qkv_fused=False),
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", NAMES)
def test_no_initialiser_raises_a_false_alarm(name, network):
    if network == "swin" and name == "impulse":
        pytest.skip("it has no position embedding")
    torch.manual_seed(0)
    model = NETWORKS[network]()
    given = options(name)
    if "teacher" in given:
        given = {"teacher": NETWORKS[network]()}
    init_(model, name, seed=5, **given)
    for seed in (5, None):
        report = verify_init(model, init=name, seed=seed, **given)
        assert report.passed, [check.problem for check in report.checks if check.problem]
