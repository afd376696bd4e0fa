"""Every initialiser by name: what it sets, what it leaves alone, and that a seed determines it."""

import numpy as np
import pytest
import timm
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn

import attnlens
from attnlens.checkpoints import ModuleWeights
from attnlens.circuits import layer_ov, qk_circuit
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.inits import UnusableScaleError, init_, initialisers
from attnlens.layouts import read_heads
from attnlens.models.architecture import describe_module

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 3}
FILTERS_ONLY = ("conv-covariance", "transfer-filters")
NAMES = tuple(name for name in initialisers() if name not in FILTERS_ONLY)
ATTENTION = (".attn.qkv.", ".attn.proj.")


def vit(seed=0, **more):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **more}).eval()


def options(name, **teacher):
    if name in ("weight-selection", "transfer-attention"):
        return {"teacher": vit(9, **teacher)}
    return {"params": vit(9, **teacher)} if name == "fitted" else {}


def heads_of(model):
    weights = ModuleWeights(model)
    return [read_heads(spec, weights, layer) for layer, spec in describe_module(model).indexed()]


def test_the_names_of_the_registry():
    assert {*NAMES, *FILTERS_ONLY} == set(initialisers())
    assert set(NAMES) == {
        *("default", "mimetic", "fitted", "qk-only", "ov-only", "ov-positive", "norm-matched", "identity", "impulse"),
        *("conditioned", "weight-selection", "transfer-attention"),
    }
    assert all(chosen.summary.endswith(".") for chosen in initialisers().values())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_attention_changes_and_the_seed_determines_it(name):
    given = options(name)
    model, twin, other, before = vit(), vit(), vit(), vit().state_dict()
    state = torch.get_rng_state()
    init_(model, name, seed=4, **given)
    init_(twin, name, seed=4, **given)
    assert torch.equal(torch.get_rng_state(), state)
    init_(other, name, seed=5, **given)
    changed = set()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[key]), key
        if not torch.equal(tensor, before[key]):
            changed.add(key)
    assert changed
    assert all(any(part in key for part in ATTENTION) for key in changed)
    unseeded = name in ("weight-selection", "transfer-attention", "impulse")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)) == unseeded


@pytest.mark.parametrize(("name", "kept"), [("qk-only", slice(96, 144)), ("ov-only", slice(0, 96))])
def test_the_other_circuit_is_bit_identical(name, kept):
    model, before = vit(), vit()
    init_(model, name)
    for now, then in zip(model.blocks, before.blocks, strict=True):
        assert torch.equal(now.attn.qkv.weight[kept], then.attn.qkv.weight[kept])
        assert torch.equal(now.attn.qkv.bias[kept], then.attn.qkv.bias[kept])


def test_ov_positive_turns_the_sign_of_the_diagonal_alone():
    negative = init_(vit(), "ov-only").products
    positive = init_(vit(), "ov-positive").products
    for one, other in zip(negative, positive, strict=True):
        assert one.beta == pytest.approx(-0.4, abs=0.06)
        assert other.beta - one.beta == pytest.approx(0.8, abs=1e-6)
        assert other.alpha == pytest.approx(one.alpha, rel=1e-6)


def test_norm_matched_has_the_singular_values_of_the_other_and_no_diagonal():
    mimetic, control = vit(embed_dim=96), vit(embed_dim=96)
    init_(mimetic, "mimetic", seed=1)
    report = init_(control, "norm-matched", seed=1, of="mimetic")
    for one, other in zip(heads_of(mimetic), heads_of(control), strict=True):
        for circuit in (qk_circuit, layer_ov):
            np.testing.assert_allclose(circuit(one).singular_values(), circuit(other).singular_values(), atol=2e-6)
        for name in ("W_Q", "W_K", "W_V", "W_O"):  # norms of every weight, and of every unit
            axis = 2 if name == "W_O" else 1
            np.testing.assert_allclose(
                np.linalg.norm(getattr(one, name), axis=axis),
                np.linalg.norm(getattr(other, name), axis=axis),
                rtol=1e-5,
            )
    assert max(abs(row.beta) for row in report.products) < 6 * 0.8 / 96


def test_identity_blocks_without_noise_are_blocks_of_the_identity():
    model = vit()
    init_(model, "identity", noise=0.0)
    heads = heads_of(model)[0]
    block = np.zeros((48, 48))
    block[np.arange(12, 24), np.arange(12, 24)] = 0.7
    np.testing.assert_allclose(qk_circuit(heads).dense()[1], block, atol=1e-6)
    np.testing.assert_allclose(layer_ov(heads).dense(), -0.4 * np.eye(48), atol=1e-6)


def test_conditioned_projections_have_equal_singular_values():
    model = vit()
    init_(model, "conditioned", gain=2.0)
    for heads in heads_of(model):
        for name in ("W_Q", "W_K", "W_V"):
            np.testing.assert_allclose(np.linalg.svd(getattr(heads, name), compute_uv=False), 2.0, rtol=1e-5)


def test_impulse_attends_to_the_neighbour_each_head_is_given():
    model = vit(embed_dim=96, num_heads=3, img_size=64, class_token=False, global_pool="avg")
    nn.init.normal_(model.pos_embed)
    init_(model, "impulse", margin=30.0)
    positions = model.pos_embed[0]
    positions = (positions - positions.mean(1, keepdim=True)) / positions.std(1, keepdim=True, correction=0)
    attn = model.blocks[0].attn
    with torch.no_grad():
        q, k, _ = attn.qkv(positions).reshape(64, 3, 3, 32).permute(1, 2, 0, 3)
        nearest = (q @ k.transpose(1, 2)).argmax(-1)
    steps = [0, -8, -1]  # the place itself, the row above, the column to the left: nearest first
    inner = [8 * row + col for row in range(1, 7) for col in range(1, 7)]
    for head, step in enumerate(steps):
        hits = sum(int(nearest[head, patch]) == patch + step for patch in inner)
        assert hits > 0.9 * len(inner), (head, hits)


def test_transfer_copies_the_product_through_layer_scale():
    teacher, student = vit(9, init_values=0.3), vit()
    for block in teacher.blocks:
        nn.init.uniform_(block.norm1.weight, 0.5, 1.5)
        nn.init.normal_(block.attn.proj.bias)
    init_(student, "transfer-attention", teacher=teacher)
    for theirs, mine in zip(heads_of(teacher), heads_of(student), strict=True):
        for circuit in (qk_circuit, layer_ov):
            np.testing.assert_allclose(circuit(mine).dense(), circuit(theirs, "effective").dense(), atol=1e-6)
        np.testing.assert_allclose(mine.b_O, theirs.b_O * theirs.layer_scale, rtol=1e-6)


def test_weight_selection_takes_whole_heads():
    teacher, student = vit(9, embed_dim=96, num_heads=8, depth=5), vit()
    init_(student, "weight-selection", teacher=teacher, fold="raw")
    for theirs, mine in zip(heads_of(teacher)[:3], heads_of(student), strict=True):
        np.testing.assert_array_equal(mine.W_Q, theirs.W_Q[::2, ::2, :])
        np.testing.assert_array_equal(mine.W_O, theirs.W_O[::2, :, ::2])
    with pytest.raises(UsageError, match="at least as large"):
        init_(vit(embed_dim=192), "weight-selection", teacher=teacher, fold="raw")


def test_default_has_the_statistics_of_timm():
    model = vit(embed_dim=96)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    init_(model, "default", seed=3)
    weight = model.blocks[1].attn.qkv.weight.detach()
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(weight.abs().max()) <= 2.0
    assert not model.blocks[1].attn.qkv.bias.any()
    assert (model.head.weight == 0.5).all()


def test_create_model_is_a_function_of_the_seed_and_differs_in_attention_only():
    made = {
        name: attnlens.create_model("vit_tiny_patch16_224", init=name, seed=7, **SMALL)
        for name in ("default", "mimetic")
    }
    torch.manual_seed(7)
    theirs = timm.create_model("vit_tiny_patch16_224", **SMALL).state_dict()
    for key, tensor in made["default"].state_dict().items():
        assert torch.equal(tensor, theirs[key])
        in_attention = any(part in key for part in ATTENTION) and key.endswith("weight")
        assert torch.equal(tensor, made["mimetic"].state_dict()[key]) != in_attention
    again = attnlens.create_model(
        "vit_tiny_patch16_224", init="mimetic", seed=7, init_options={"alpha_qk": 0.7}, **SMALL
    )
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), made["mimetic"].parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True, **SMALL}, "queries are normalised after their projection"),
        ("eva02_tiny_patch14_224", {"depth": 1, "img_size": 28}, "rotated by position"),
        ("swinv2_cr_tiny_224", {"depths": (1, 1, 1, 1)}, "only the directions of the QK product count"),
    ],
)
def test_the_report_says_what_the_product_still_means(name, kwargs, text):
    torch.manual_seed(0)
    report = init_(timm.create_model(name, **kwargs), "identity")
    assert any(text in note for note in report.notes), report.notes


def test_stages_of_different_width_each_meet_their_request():
    torch.manual_seed(0)
    model = MultiScaleVit(MultiScaleVitCfg(depths=(1, 1, 1, 1), embed_dim=24), num_classes=3)
    report = init_(model, "mimetic")
    widths = {heads.embed_dim for heads in heads_of(model)}
    assert len(widths) > 2
    assert report.worst_error < 1e-5
    assert all("not square" in item.reason for item in report.skipped)
    assert all(row.beta * row.requested_beta > 0 for row in report.products)


def test_a_silent_batch_norm_is_skipped_and_said():
    torch.manual_seed(0)
    report = init_(timm.create_model("levit_128s"), "identity")
    assert any("weight zero" in item.reason for item in report.skipped)
    assert {row.circuit for row in report.products} == {"qk"}


@pytest.mark.parametrize(
    ("name", "given", "error", "text"),
    [
        ("mimetik", {}, UsageError, "did you mean mimetic"),
        ("mimetic", {"alpha_qq": 1}, UsageError, "did you mean alpha_qk"),
        ("mimetic", {"alpha_qk": -1.0}, UsageError, "at least 0"),
        ("mimetic", {"beta_ov": float("nan")}, UsageError, "finite"),
        ("mimetic", {"columns": "random"}, UsageError, "'svd' or 'shuffled'"),
        ("mimetic", {"seed": -1}, UsageError, "at least 0"),
        ("fitted", {}, UsageError, "needs the option 'params'"),
        ("norm-matched", {"of": "norm-matched"}, UsageError, "itself"),
        ("impulse", {"position": "nowhere"}, UsageError, "position embedding"),
        ("impulse", {"kernel": 2}, UsageError, "odd"),
    ],
)
def test_errors_say_what_is_accepted(name, given, error, text):
    with pytest.raises(error, match=text):
        init_(vit(), name, **given)


def test_what_cannot_be_initialised_is_refused():
    model = vit(init_values=1.0)
    nn.init.zeros_(model.blocks[0].ls1.gamma)
    with pytest.raises(UnusableScaleError, match="LayerScale is zero"):
        init_(model, "mimetic", fold="effective")
    with torch.device("meta"), pytest.raises(UsageError, match="meta device"):
        init_(timm.create_model("vit_tiny_patch16_224", **SMALL), "mimetic")
    with pytest.raises(UnsupportedAttentionError, match="no diagonal"):
        init_(nn.MultiheadAttention(24, 3, kdim=16, vdim=16), "mimetic")
    small = vit(init_values=1e-5)
    assert any("1e-05" in note for note in init_(small, "mimetic", fold="effective").notes)
