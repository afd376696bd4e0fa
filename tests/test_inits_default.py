"""`default` draws attention anew as the network itself would: by its own hook, or by that of each layer."""

import math

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

from attnlens.circuits import WholeProduct
from attnlens.inits import init_
from attnlens.inits.verify.mistakes import diagonal_spread, spread_limits

D, HEADS = 24, 3


def encoder():
    torch.manual_seed(1)
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, HEADS, 31, batch_first=True, norm_first=True), 2, enable_nested_tensor=False
    )


def spoilt(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    return model


def test_torchs_attention_gets_what_its_own_reset_gives_weights_and_biases():
    model = spoilt(encoder())
    init_(model, "default", seed=3)
    bound = math.sqrt(6 / (D + 3 * D))  # xavier_uniform_ of the packed projection
    for layer in model.layers:
        packed = layer.self_attn.in_proj_weight
        assert float(packed.detach().abs().max()) <= bound
        assert float(packed.detach().abs().max()) > 0.98 * bound
        assert float(packed.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert torch.equal(layer.self_attn.in_proj_bias, torch.zeros(3 * D))
        assert torch.equal(layer.self_attn.out_proj.bias, torch.zeros(D))
        assert float(layer.self_attn.out_proj.weight.detach().abs().max()) <= 1 / math.sqrt(D)
        assert torch.equal(layer.linear1.weight, torch.full((31, D), 7.0))  # no attention
    first, second = (layer.self_attn.in_proj_weight for layer in model.layers)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_a_timm_network_gets_its_own_weights_and_biases(qkv_bias):
    how = {"img_size": 16, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "qkv_bias": qkv_bias}
    model = spoilt(timm.create_model("vit_tiny_patch16_224", **how))
    init_(model, "default", seed=3)
    for block in model.blocks:
        weight = block.attn.qkv.weight.detach()
        assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
        assert (block.attn.qkv.bias is not None) == qkv_bias
        for bias in filter(lambda each: each is not None, (block.attn.qkv.bias, block.attn.proj.bias)):
            assert torch.equal(bias, torch.zeros(len(bias)))
        assert torch.equal(block.mlp.fc1.bias, torch.full_like(block.mlp.fc1.bias, 7.0))


@pytest.mark.parametrize("width", [37, 79])
def test_the_limits_of_the_diagonals_spread_hold_both_kinds_of_noise_and_not_twice_that(width):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(400, width, width, generator=generator, dtype=torch.float64).numpy()
    symmetric = noise + noise.transpose(0, 2, 1)
    low, high = spread_limits(width)
    assert 0 <= low < 1 < math.sqrt(2) < high
    for draws in (noise, symmetric):
        spread = diagonal_spread(WholeProduct.of(draws, width))
        assert low <= spread.min()
        assert spread.max() <= high
    assert spread_limits(10**8) == pytest.approx((1, math.sqrt(2)), abs=1e-3)


def test_biases_that_a_layers_own_reset_draws_are_drawn():
    model = spoilt(nn.Sequential(Attention(D, HEADS, qkv_bias=True)))
    init_(model, "default", seed=3)
    for bias in (model[0].qkv.bias, model[0].proj.bias):
        assert 0.5 / math.sqrt(D) < float(bias.detach().abs().max()) <= 1 / math.sqrt(D)
