"""The small causal transformer: causality, the masked forward pass, reading and initialising its attention."""

import math

import numpy as np
import pytest
import torch
from torch.func import functional_call, stack_module_state, vmap

import attnlens
from attnlens.errors import ModelNotFoundError, UsageError
from attnlens.gpt import GPT, create_gpt

SIZES = {"context": 11, "embed_dim": 15, "depth": 2, "num_heads": 3, "vocab_size": 19}


def ids(*shape, seed=0, vocab=19):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def noisy(**changes):
    """Return a GPT in float64 whose every parameter, biases and gains among them, is random."""
    model = create_gpt(**{**SIZES, **changes}).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


def test_a_logit_depends_on_the_bytes_up_to_its_own_and_on_all_of_them():
    model, x = noisy(), ids(1, 11)
    before = model(x)
    for place in range(11):
        changed = x.clone()
        changed[0, place] = (x[0, place] + 1) % 19
        moved = (model(changed) - before).abs().amax(-1)[0] > 1e-12
        assert moved.tolist() == [token >= place for token in range(11)]


def test_the_forward_pass_is_the_written_formula():
    model, x = noisy(), ids(2, 7)
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}

    def normed(value, name):
        centred = value - value.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(value, name):
        return value @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    y = weights["embed.weight"][x.numpy()] + weights["pos_embed"][0, :7]
    for block in ("blocks.0", "blocks.1"):
        q, k, v = np.split(linear(normed(y, f"{block}.norm1"), f"{block}.attn.qkv"), 3, -1)
        heads = []
        for head in range(3):
            own = slice(5 * head, 5 * head + 5)
            scores = q[..., own] @ k[..., own].swapaxes(1, 2) / math.sqrt(5)
            scores = np.exp(np.where(np.tril(np.ones((7, 7))), scores, -np.inf))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[..., own])
        y = y + linear(np.concatenate(heads, -1), f"{block}.attn.proj")
        hidden = linear(normed(y, f"{block}.norm2"), f"{block}.mlp.fc1")
        gelu = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
        y = y + linear(gelu, f"{block}.mlp.fc2")
    logits = normed(y, "norm") @ weights["head.weight"].T
    np.testing.assert_allclose(model(x).detach().numpy(), logits, rtol=1e-9, atol=1e-9)


def test_forming_scores_gives_what_the_fused_attention_gives_and_vmap_maps_it():
    models = [noisy(fused=False), noisy(fused=False)]
    with torch.no_grad():
        models[1].blocks[0].attn.qkv.weight.mul_(2)
    parameters, buffers = stack_module_state(models)
    x = ids(2, 3, 9)
    stacked = vmap(lambda p, b, x: functional_call(models[0], (p, b), (x,)))(parameters, buffers, x)
    fused = noisy()
    torch.testing.assert_close(stacked[0], fused(x[0]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(stacked[1], models[1](x[1]), rtol=1e-10, atol=1e-10)


def test_the_state_holds_weights_alone_under_timms_names():
    names = {name for name in create_gpt().state_dict() if name.startswith("blocks.0.")}
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    assert names == {f"blocks.0.{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}


def test_its_attention_is_read_with_its_norms_initialised_and_verified():
    model = create_gpt(**SIZES)
    found = attnlens.inspect(model)
    assert found.layers == (0, 1)
    assert "effective" in found.folds
    assert not found.refused
    own = model.blocks[1].attn
    by_hand = own.qkv.weight[5:10].T @ own.qkv.weight[20:25]  # W_Q W_K^T of head 1, row vectors
    read = found.circuits(1, head=1, circuit="qk", fold="raw").dense()
    np.testing.assert_allclose(read, by_hand.detach().numpy(), atol=1e-7)
    attnlens.init_(model, "mimetic", seed=3)
    assert attnlens.verify_init(model, init="mimetic", seed=3).passed


def test_a_seed_gives_the_network_and_the_global_generator_stays():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, again, other = create_gpt(seed=1, **SIZES), create_gpt(seed=1, **SIZES), create_gpt(seed=2, **SIZES)
    assert torch.equal(torch.rand(3), expected)
    states = [model.state_dict() for model in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["head.weight"], states[2]["head.weight"])


def test_the_start_is_gpt_2s():
    model = create_gpt(depth=3, embed_dim=96)
    for name, value in model.state_dict().items():
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" not in name:
            expected = 0.02 / math.sqrt(6) if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) else 0.02
            assert abs(float(value.std()) / expected - 1) < 5 / math.sqrt(2 * value.numel()), name


def test_fixed_positions_are_sines_and_cosines_that_are_not_trained():
    model = create_gpt(**{**SIZES, "embed_dim": 6}, positions="sincos")
    assert not model.pos_embed.requires_grad
    wave = 10_000 ** (-1 / 3)
    found = model.pos_embed[0, 4]
    torch.testing.assert_close(found[[1, 4]], torch.tensor([math.sin(4 * wave), math.cos(4 * wave)]))
    assert create_gpt(**SIZES).pos_embed.requires_grad


def test_it_learns_a_repeating_text():
    model = create_gpt(context=16, embed_dim=24, depth=1, num_heads=2)
    text = torch.tensor(list(b"abcdefgh" * 2), dtype=torch.uint8)[None]
    steps = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        steps.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(text)[0, :-1], text[0, 1:].long())
        loss.backward()
        steps.step()
    assert float(loss.detach()) < 0.1


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"depth": 0}, "size 0"),
        ({"num_heads": 7}, "embed_dim = 96 is no multiple of num_heads = 7"),
        ({"positions": "rope"}, "positions = 'rope' is not accepted: pass 'learned' or 'sincos'"),
        ({"positions": "sincos", "embed_dim": 33}, "needs an even embed_dim, not 33"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, text):
    with pytest.raises(UsageError, match=text):
        GPT(**sizes)


def test_an_unknown_name_is_answered_with_those_there_are():
    with pytest.raises(ModelNotFoundError, match="choose from gpt-tiny"):
        create_gpt("gpt-huge")
