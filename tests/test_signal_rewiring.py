"""Rewired networks: their forward pass, their kernels against theory, what is changed, what is refused."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

import attnlens
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.gpt import create_gpt
from attnlens.inits.truncation import haar
from attnlens.signal import VARIANTS, NegativeAttentionError, rewire_
from attnlens.signal import variants as mixing
from attnlens.signal.activation import TailoredLeakyReLU, scaled_orthogonal, similarity, tailored_slope
from attnlens.signal.attention import MixedAttention
from attnlens.signal.kernels import mean_cosine
from attnlens.signal.rewire import rewire_with_theory_
from attnlens.signal.variants import Mix


def vit(**changes):
    sizes = {"img_size": 20, "patch_size": 4, "embed_dim": 36, "depth": 4, "num_heads": 3, "num_classes": 5}
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return timm.create_model("vit_tiny_patch16_224", **{**sizes, **changes})


def gpt(**changes):
    return create_gpt(**{"context": 25, "embed_dim": 36, "depth": 4, "num_heads": 3, **changes})


NETWORKS = {"class token": vit, "average": lambda: vit(class_token=False, global_pool="avg"), "causal": gpt}


def orthogonal_tokens(count, width):
    """Return ``[1, count, width]`` whose kernel is the identity."""
    return haar(width, count, torch.Generator().manual_seed(3)).mT[None] * math.sqrt(width)


def kernels(module, x):
    """Return X X^T / width behind every block."""
    found = []
    with torch.no_grad():
        for block in module.blocks:
            x = block(x)
            found.append((x[0] @ x[0].mT / x.shape[-1]).numpy())
    return found


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("attention", ["e-spa", "u-spa"])
def test_tokens_follow_the_kernels_through_the_network(network, attention):
    module = NETWORKS[network]().double()
    done = rewire_with_theory_(module, attention, skips=False, norms=False, mlp="none", seed=2)
    found = kernels(module, orthogonal_tokens(done.report.tokens, 36))
    for kernel, target in zip(found, done.mixes.kernels[1:], strict=True):
        np.testing.assert_allclose(kernel, target, atol=1e-12)


def test_a_network_of_column_sums_is_found_out(monkeypatch):
    monkeypatch.setattr(mixing, "split_rows", lambda A: (A.sum(0), A / A.sum(0)[None, :]))
    module = gpt().double()
    done = rewire_with_theory_(module, "e-spa", skips=False, norms=False, mlp="none")
    found = kernels(module, orthogonal_tokens(25, 36))
    assert np.abs(found[-1] - done.mixes.kernels[-1]).max() > 0.01


@pytest.mark.parametrize("attention", ["value-skipinit", "shaped"])
@pytest.mark.parametrize("network", NETWORKS)
def test_attention_that_starts_as_the_identity_keeps_every_token_apart(attention, network):
    module = NETWORKS[network]().double()
    report = rewire_(module, attention, skips=False, norms=False, mlp="none")
    x = torch.randn(2, report.tokens, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    block = module.blocks[0]
    with torch.no_grad():
        W_V, W_O = block.attn.qkv.weight[72:].mT, block.attn.proj.weight.mT
        torch.testing.assert_close(block(x), x @ W_V @ W_O, rtol=1e-12, atol=1e-12)


def test_softmax_without_skips_makes_one_token_of_all_in_one_block():
    module = vit().double()
    rewire_(module, "softmax", skips=False, norms=False, mlp="none")
    x = torch.randn(1, 26, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = module.blocks[0](x)
    assert float((y - y[:, :1]).abs().max()) < 1e-14


@pytest.mark.parametrize("attention", ["softmax", "shaped", "e-spa", "u-spa"])
@pytest.mark.parametrize(("network", "norms"), [("average", True), ("causal", False)])
def test_a_wide_network_with_skips_and_tailored_mlps_follows_theory(attention, norms, network):
    """Mean cosine and log of the mean square: 4 standard errors over 6 seeds, and theory's own 2 / width."""
    differences = []
    for seed in range(6):
        sizes = {"embed_dim": 96, "depth": 3}
        average = {"class_token": False, "global_pool": "avg", "img_size": 16}
        module = (gpt(context=16, **sizes) if network == "causal" else vit(**average, **sizes)).double()
        done = rewire_with_theory_(module, attention, skips=True, norms=norms, mlp="tailored", seed=seed)
        theory = done.predicted()[-1]
        found = kernels(module, orthogonal_tokens(16, 96))[-1]
        alike = mean_cosine(found) - mean_cosine(theory)
        differences.append([alike, math.log(np.trace(found) / np.trace(theory))])
    spread = np.std(differences, axis=0, ddof=1) / math.sqrt(6)
    assert (np.abs(np.mean(differences, axis=0)) < 4 * spread + 2 / 96).all()


def test_mixed_attention_is_the_written_formula():
    """Every term at once, with queries that are not zero, by head, in numpy."""
    rng = np.random.default_rng(4)
    count, heads, width = 7, 3, 5
    P = np.tril(rng.random((count, count)) + 0.1)
    P /= P.sum(1, keepdims=True)
    D = rng.random(count) + 0.5
    base = timm.layers.Attention(15, num_heads=heads, qkv_bias=True).double()
    for parameter in base.parameters():
        parameter.data = torch.from_numpy(rng.normal(size=tuple(parameter.shape)))
    module = MixedAttention(base, Mix(P, D, a=0.3, b=0.7, c=0.2), causal=True)
    gains = {name: rng.normal(size=heads) for name in "abc"}
    for name, values in gains.items():
        assert getattr(module, name).shape == (heads, 1, 1)
        getattr(module, name).data = torch.from_numpy(values)[:, None, None]
    x = rng.normal(size=(2, count, 15))
    q, k, v = np.split(x @ base.qkv.weight.detach().numpy().T + base.qkv.bias.detach().numpy(), 3, -1)
    parts = []
    for head in range(heads):
        own = slice(width * head, width * head + width)
        scores = q[..., own] @ k[..., own].swapaxes(1, 2) / math.sqrt(width)
        weights = P * np.exp(scores)
        weights /= weights.sum(-1, keepdims=True)
        matrix = gains["a"][head] * np.eye(count) + gains["b"][head] * D[:, None] * weights - gains["c"][head] * P
        parts.append(matrix @ v[..., own])
    expected = np.concatenate(parts, -1) @ base.proj.weight.detach().numpy().T + base.proj.bias.detach().numpy()
    for fused in (True, False):
        module.fused_attn = fused
        with torch.no_grad():
            found = module(torch.from_numpy(x)).numpy()
            shorter = module(torch.from_numpy(x[:, :4])).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(shorter, expected[:, :4], rtol=1e-10, atol=1e-12)


def test_attention_between_all_tokens_refuses_another_number_of_them():
    module = vit()
    rewire_(module, "e-spa")
    with pytest.raises(UsageError, match="made for 26 tokens without a mask"):
        module.blocks[0](torch.zeros(1, 25, 36))


@pytest.mark.parametrize("attention", [*VARIANTS, "keep"])
@pytest.mark.parametrize("network", NETWORKS)
def test_every_weight_gets_a_finite_gradient_and_what_should_move_moves(attention, network):
    for skips in (True, False):
        for norms in (True, False):
            module = NETWORKS[network]()
            rewire_(module, attention, skips=skips, norms=norms)
            generator = torch.Generator().manual_seed(0)
            causal = network == "causal"
            images = torch.randn(3, 3, 20, 20, generator=generator)
            x = torch.randint(0, 256, (3, 25), generator=generator) if causal else images
            module(x).square().sum().backward()
            gradients = {name: p.grad for name, p in module.named_parameters()}
            assert all(value is not None and torch.isfinite(value).all() for value in gradients.values())
            if attention in ("softmax", "e-spa", "u-spa"):
                assert gradients["blocks.0.attn.qkv.weight"][:36].any()  # W_Q leaves zero
            for name in {"value-skipinit": "ab", "shaped": "abc"}.get(attention, ""):
                assert gradients[f"blocks.1.attn.{name}"].all()


@pytest.mark.parametrize("attention", VARIANTS)
def test_stacks_of_rewired_networks_run_as_one(attention):
    models = []
    for seed in (0, 1):
        model = gpt(fused=False, seed=seed)
        rewire_(model, attention, skips=False, norms=False, seed=seed)
        models.append(model)
    parameters, _ = stack_module_state(models)
    x = torch.randint(0, 256, (2, 3, 25), generator=torch.Generator().manual_seed(0))

    def loss(weights, ids):
        return functional_call(models[0], weights, (ids,)).square().mean()

    stacked = vmap(loss)(parameters, x)
    torch.testing.assert_close(
        stacked, torch.stack([m(y).square().mean() for m, y in zip(models, x, strict=True)]), rtol=1e-4, atol=0
    )
    assert all(torch.isfinite(value).all() for value in vmap(grad(loss))(parameters, x).values())


def test_the_start_is_zero_queries_and_orthogonal_values_and_the_rest_stays():
    before, module = vit(), vit()
    report = rewire_(module, "e-spa", seed=1)
    for old, new in zip(before.blocks, module.blocks, strict=True):
        weight = new.attn.qkv.weight.detach().double()
        assert not weight[:36].any()
        assert torch.equal(new.attn.qkv.weight[36:72], old.attn.qkv.weight[36:72])
        assert not new.attn.qkv.bias[:36].any()
        assert not new.attn.qkv.bias[72:].any()
        for square in (weight[72:], new.attn.proj.weight.detach().double()):
            torch.testing.assert_close(square @ square.mT, torch.eye(36, dtype=torch.float64), atol=1e-6, rtol=0)
        for name in ("norm1.weight", "mlp.fc1.weight", "mlp.fc2.bias"):
            assert torch.equal(new.get_parameter(name), old.get_parameter(name))
    assert (report.skips, report.norms, report.mlp, report.slope, report.tokens) == (True, True, "keep", None, 26)
    assert report.product_error < 1e-12


def test_names_of_weights_stay_and_buffers_are_not_in_the_state():
    before, module = set(vit().state_dict()), vit()
    rewire_(module, "shaped")
    assert set(module.state_dict()) == before | {f"blocks.{layer}.attn.{name}" for layer in range(4) for name in "abc"}
    module = vit()
    rewire_(module, "u-spa", skips=False, norms=False)
    assert set(module.state_dict()) == {name for name in before if "norm1" not in name and "norm2" not in name}


def test_a_seed_gives_the_weights_and_the_global_generator_stays():
    torch.manual_seed(7)
    expected = torch.rand(3)
    states = []
    for seed in (0, 0, 1):
        module = vit()
        torch.manual_seed(7)
        rewire_(module, "e-spa", skips=False, seed=seed)
        assert torch.equal(torch.rand(3), expected)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["blocks.0.attn.proj.weight"], states[2]["blocks.0.attn.proj.weight"])
    assert not torch.equal(states[0]["blocks.0.mlp.fc1.weight"], states[2]["blocks.0.mlp.fc1.weight"])
    drawn = [states[0][f"blocks.{layer}.attn.proj.weight"] for layer in range(4)]
    assert len({float(weight[0, 0]) for weight in drawn}) == 4


def test_what_is_taken_out_is_gone():
    module = vit(init_values=1e-5, drop_path_rate=0.2)
    report = rewire_(module, "keep", skips=False, norms=False)
    kinds = {type(part).__name__ for part in module.blocks.modules()}
    assert not kinds & {"LayerNorm", "LayerScale", "DropPath", "GELU"}
    assert {"RewiredBlock", "TailoredLeakyReLU", "Attention"} <= kinds
    x = module.norm_pre(torch.randn(1, 26, 36) * 40 + 3)
    torch.testing.assert_close(x.square().mean(-1), torch.ones(1, 26), atol=1e-3, rtol=0)
    assert type(module.norm).__name__ == "LayerNorm"
    assert "the norm behind the last one stays" in str(report)
    kept = vit(init_values=1e-5)
    rewire_(kept, "softmax", norms=False)
    assert "LayerScale" in {type(part).__name__ for part in kept.blocks.modules()}


def test_without_mlps_a_block_is_its_attention():
    module = gpt()
    rewire_(module, "e-spa", mlp="none")
    assert not [name for name in module.state_dict() if "mlp" in name or "norm2" in name]
    block, x = module.blocks[0], torch.randn(1, 25, 36)
    torch.testing.assert_close(block(x), x + block.attn(block.norm1(x)))


def test_a_rewired_network_is_inspected_initialised_and_told_apart():
    module = vit()
    rewire_(module, "e-spa")
    found = attnlens.inspect(module)
    assert "a term of relative position is added to the score" in found.left_out()
    assert found.stats.select(circuit="qk", fold="raw").column("alpha").max() == 0
    attnlens.init_(module, "mimetic", seed=0)
    assert attnlens.verify_init(module, init="mimetic", seed=0).passed
    plain = vit()
    rewire_(plain, "shaped")
    assert "a term of relative position is added to the score" not in attnlens.inspect(plain).left_out()


def test_a_report_is_json_and_says_what_was_done():
    module = gpt()
    report = rewire_(module, "u-spa", skips=False, norms=False, rho=0.5, seed=3)
    data = json.loads(json.dumps(report.to_json()))
    assert (data["attention"], data["options"], data["causal"], data["tokens"]) == ("u-spa", {"rho": 0.5}, True, 25)
    assert data["slope"] == tailored_slope(0.2, 4)
    assert data["row_sums"][0][0] == pytest.approx(1)  # the first token attends to itself
    lines = str(report).splitlines()
    assert lines[0] == "u-spa, seed 3: 4 blocks without skips and without norms, 25 tokens, causal"
    assert "from its kernel" in lines[1]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8])
def test_the_map_of_cosines_and_the_mean_square_are_those_of_quadrature(alpha):
    """The midpoint rule on a grid of step 1/32 over two standard normals: its error at the kinks is about 1e-4."""
    nodes = torch.arange(-8, 8, 1 / 32, dtype=torch.float64) + 1 / 64
    weights = torch.exp(-(nodes**2) / 2)
    weights /= weights.sum()
    phi = TailoredLeakyReLU(alpha)
    assert abs(float(weights @ phi(nodes) ** 2) - 1) < 1e-3
    for cosine in (-0.7, 0.0, 0.4, 0.95):
        other = phi(cosine * nodes[:, None] + math.sqrt(1 - cosine**2) * nodes)
        found = float((weights * phi(nodes)) @ other @ weights)
        assert abs(found - similarity(alpha, cosine)) < 1e-3
    assert similarity(alpha, 1.0) == 1
    assert similarity(1.0, 0.3) == 0.3


def test_the_slope_brings_orthogonal_tokens_to_eta():
    for depth, eta in ((1, 0.2), (6, 0.5), (48, 0.9)):
        cosine, slope = np.zeros(()), tailored_slope(eta, depth)
        for _ in range(depth):
            cosine = similarity(slope, cosine)
        assert float(cosine) == pytest.approx(eta, abs=1e-10)
    with pytest.raises(UsageError, match=r"eta = 0.9 is not accepted: 6 layers allow numbers above 0 and up to 0.777"):
        tailored_slope(0.9, 6)


@pytest.mark.parametrize(("rows", "cols"), [(5, 13), (13, 5), (7, 7)])
def test_scaled_orthogonal_matrices_keep_the_mean_square(rows, cols):
    W = scaled_orthogonal(rows, cols, torch.Generator().manual_seed(0))
    assert W.shape == (rows, cols)
    gram = W @ W.mT if cols >= rows else W.mT @ W
    torch.testing.assert_close(gram, torch.eye(min(rows, cols), dtype=torch.float64) * max(1, cols / rows))


def swiglu():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, mlp_layer=timm.layers.SwiGLU
    )


@pytest.mark.parametrize(
    ("build", "options", "text"),
    [
        (lambda: timm.create_model("resnet10t"), {}, "ResNet cannot be rewired: pass a timm VisionTransformer"),
        (lambda: vit(qk_norm=True), {}, "blocks.0.attn has q_norm"),
        (lambda: vit(dynamic_img_size=True), {}, "sees a number of tokens that changes"),
        (lambda: vit(patch_drop_rate=0.5), {}, "sees a number of tokens that changes"),
        (swiglu, {"skips": False}, "blocks.0.mlp is a SwiGLU that cannot be tailored: pass mlp='keep'"),
    ],
)
def test_networks_that_theory_does_not_know_are_refused(build, options, text):
    with pytest.raises(UnsupportedAttentionError, match=text):
        rewire_(build(), "e-spa", **options)


def test_a_network_is_rewired_once():
    for options in ({}, {"skips": False}):
        module = vit()
        rewire_(module, "e-spa", **options)
        with pytest.raises(UnsupportedAttentionError, match="only once; build the network again"):
            rewire_(module, "e-spa")


@pytest.mark.parametrize(
    ("attention", "options", "error", "text"),
    [
        ("e-spa", {"mlp": "relu"}, UsageError, "mlp = 'relu' is not accepted"),
        ("e-spa", {"seed": -1}, UsageError, "seed = -1"),
        ("e-spa", {"skips": False, "eta": 1.0}, UsageError, "eta = 1.0 is not accepted"),
        ("e-spa", {"distance": "grid"}, NegativeAttentionError, "build the network without them"),
        ("espa", {}, UsageError, "did you mean e-spa"),
    ],
)
def test_nothing_is_changed_before_everything_is_checked(attention, options, error, text):
    module = vit()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(error, match=text):
        rewire_(module, attention, **options)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert {type(block).__name__ for block in module.blocks} == {"Block"}
