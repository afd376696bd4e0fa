"""Weights that a file stores as something else, with the right values: codes, adapters, parametrizations."""

import re
import time

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.utils import parametrizations, prune

import attnlens
from attnlens.checkpoints import open_checkpoint
from attnlens.checkpoints.adapter_config import AdapterConfig
from attnlens.checkpoints.adapters import with_adapter
from attnlens.checkpoints.applied import unread_beside
from attnlens.errors import CheckpointError, ModelNotFoundError
from tests.checkpoint_files import TINY, alphas, projections, saved, state, vit

# Codes


def bitsandbytes(weight):
    scale = weight.abs().amax(1)
    codes = (weight * 127 / scale[:, None]).round().to(torch.int8)
    return codes, {"SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}, codes * scale[:, None] / 127


def rowwise(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes, {"weight_scale": scale}, codes.float() * scale


def whole(weight):
    scale = weight.abs().max() / 448
    codes = (weight / scale).to(torch.float8_e4m3fn)
    return codes, {"scale_weight": scale}, codes.float() * scale


def blocks(weight):
    high, wide = weight.shape[0] // 3, weight.shape[1] // 2
    grid = weight.reshape(3, high, 2, wide).abs().amax((1, 3)) / 448
    spread = grid.repeat_interleave(high, 0).repeat_interleave(wide, 1)
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return codes, {"weight_scale_inv": grid}, codes.float() * spread


def asymmetric(weight):
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (high - low) / 255
    zero = (-128 - low / scale).round()
    codes = (weight / scale + zero).round().clamp(-128, 127).to(torch.int8)
    return codes, {"weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}, (codes.float() - zero) * scale


@pytest.mark.parametrize("quantise", [bitsandbytes, rowwise, whole, blocks, asymmetric])
def test_codes_with_scales_give_the_weights_they_stand_for(tmp_path, quantise):
    stored, meant = dict(state()), dict(state())
    for name in projections(stored):
        codes, scales, meant[name] = quantise(stored[name])
        stored |= {name: codes, **{name.replace("weight", key): value for key, value in scales.items()}}
    found, expected = saved(tmp_path, stored), saved(tmp_path, meant, "meant.pth")
    np.testing.assert_allclose(alphas(found), alphas(expected), rtol=1e-5)
    np.testing.assert_allclose(alphas(TINY, checkpoint=found), alphas(expected), rtol=1e-5)


def test_blocks_of_128_that_are_cut_at_the_edge_are_spread_as_deepseek_stores_them(tmp_path):
    weight = torch.randn(192, 320, generator=torch.Generator().manual_seed(0))
    grid = torch.rand(2, 3, generator=torch.Generator().manual_seed(1)) + 0.5
    codes = weight.to(torch.float8_e4m3fn)
    found = open_checkpoint(saved(tmp_path, {"m.weight": codes, "m.weight_scale_inv": grid}))["m.weight"]
    expected = codes.double() * grid.repeat_interleave(128, 0).repeat_interleave(128, 1)[:192, :320]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("named", [True, False])
def test_codes_without_scales_are_refused_by_name(tmp_path, dtype, named):
    stored = {name: value.to(dtype) if name.endswith("qkv.weight") else value for name, value in state().items()}
    options = {"checkpoint": saved(tmp_path, stored)} if named else {"num_heads": 3}
    with pytest.raises(CheckpointError, match=r"qkv\.weight is stored as \w+: codes and no weights"):
        attnlens.inspect(TINY if named else saved(tmp_path, stored), **options)


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"SCB": ()}, "without the weight_format 0"),
        ({"weight_scale": (7, 11)}, "of which no rule is known"),
        ({"weight.absmax": (9,), "weight.quant_map": (16,)}, "4-bit codes"),
    ],
)
def test_scales_of_which_no_rule_is_known_are_refused_by_name(tmp_path, beside, told):
    stored = state()
    for name in projections(stored):
        module = name.removesuffix("weight")
        stored |= {name: stored[name].to(torch.int8)} | {module + k: torch.ones(s) for k, s in beside.items()}
    with pytest.raises(CheckpointError, match=told):
        alphas(saved(tmp_path, stored))


@pytest.mark.parametrize("packed", ["qweight", "weight_packed", "codebooks"])
def test_packed_codes_are_refused_by_name(tmp_path, packed):
    stored = {
        n.replace("qkv.weight", f"qkv.{packed}") if n.endswith("qkv.weight") else n: v for n, v in state().items()
    }
    with pytest.raises(CheckpointError, match=r"qkv\.weight is stored as .*codes"):
        alphas(saved(tmp_path, stored))


def test_a_folder_that_says_it_is_quantised_is_read_by_names_only_with_scales(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}')
    stored = {n: v.to(torch.float8_e4m3fn) if n in projections(state()) else v for n, v in state().items()}
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"says that the weights are quantised, and .* has no scales"):
        alphas(tmp_path)
    scales = {n.replace("weight", "weight_scale"): torch.tensor(3.0) for n in projections(stored)}
    save_file(stored | scales, tmp_path / "model.safetensors")
    assert len(alphas(tmp_path)) == 14


# What changes a projection


def test_adapters_whose_scale_no_file_states_are_refused_by_name(tmp_path):
    stored = state()
    for name in projections(stored):
        module, (rows, columns) = name.removesuffix("weight"), stored[name].shape
        stored |= {f"{module}lora_A": torch.ones(2, columns), f"{module}lora_B": torch.ones(rows, 2)}
    with pytest.raises(CheckpointError, match=r"attn\.\w+\.lora_A.*scale alpha / r is not in the file"):
        alphas(saved(tmp_path, stored))
    with pytest.raises(CheckpointError, match="scale alpha / r is not in the file"):
        attnlens.inspect(TINY, saved(tmp_path, stored))


@pytest.mark.parametrize("magnitude", [False, True])
def test_an_adapter_with_its_scale_is_merged(tmp_path, magnitude):
    stored, merged = state(), state()
    draw = torch.Generator().manual_seed(3)
    for name in projections(stored):
        module, (rows, columns) = name.removesuffix("weight"), stored[name].shape
        a, b = torch.randn(4, columns, generator=draw), torch.randn(rows, 4, generator=draw)
        weight = stored.pop(name)
        stored |= {f"{module}base_layer.weight": weight, f"{module}lora_A.default.weight": a}
        stored |= {f"{module}lora_B.default.weight": b, f"{module}alpha": torch.tensor(2.0)}
        stored |= {f"{module}base_layer.bias": stored.pop(f"{module}bias")}
        merged[name] = weight.double() + 2.0 / 4 * (b.double() @ a.double())
        if magnitude:
            lengths = torch.rand(rows, generator=draw)
            stored[f"{module}lora_magnitude_vector.default.weight"] = lengths
            merged[name] = merged[name] / merged[name].norm(dim=1, keepdim=True) * lengths[:, None].double()
    np.testing.assert_allclose(alphas(saved(tmp_path, stored)), alphas(saved(tmp_path, merged, "m.pth")), rtol=1e-9)


@pytest.mark.parametrize("kind", ["weight_norm", "weight_norm old", "spectral_norm", "spectral_norm old", "pruned"])
def test_reparametrised_weights_are_those_the_network_applies(tmp_path, kind):
    model = vit().eval()
    for block in model.blocks:
        for layer in (block.attn.qkv, block.attn.proj):
            if kind == "weight_norm":
                parametrizations.weight_norm(layer)
                layer.parametrizations.weight.original0.data.mul_(1.7)
            elif kind == "weight_norm old":
                name = "weight"
                weight = layer._parameters.pop(name)
                layer.register_parameter("weight_g", torch.nn.Parameter(1.7 * weight.norm(dim=1, keepdim=True)))
                layer.register_parameter("weight_v", torch.nn.Parameter(weight))
                layer.weight = 1.7 * weight
            elif kind == "spectral_norm":
                parametrizations.spectral_norm(layer).eval()
            elif kind == "spectral_norm old":
                torch.nn.utils.spectral_norm(layer).eval()
                layer(torch.zeros(1, 192))
            else:
                prune.random_unstructured(layer, "weight", amount=0.3)
    applied = {
        f"blocks.{i}.attn.{part}.weight": getattr(block.attn, part).weight.detach().double()
        for i, block in enumerate(model.blocks)
        for part in ("qkv", "proj")
    }
    found = open_checkpoint(saved(tmp_path, model.state_dict()))
    for name, weight in applied.items():
        np.testing.assert_allclose(found[name], weight, rtol=2e-6, atol=1e-9)
    assert len(alphas(saved(tmp_path, model.state_dict()))) == 14


def test_ia3_scales_rows_and_their_bias(tmp_path):
    stored = {"m.weight": torch.randn(6, 4), "m.bias": torch.randn(6), "m.ia3_l.default": torch.rand(6, 1)}
    found = open_checkpoint(saved(tmp_path, stored))
    np.testing.assert_allclose(found["m.weight"], (stored["m.weight"] * stored["m.ia3_l.default"]).double(), rtol=1e-6)
    np.testing.assert_allclose(
        found["m.bias"], (stored["m.bias"] * stored["m.ia3_l.default"][:, 0]).double(), rtol=1e-6
    )


@pytest.mark.parametrize("name", ["qkv.weight_orig", "qkv.parametrizations.weight.original"])
def test_a_parametrization_that_is_no_formula_of_the_file_is_refused_by_name(tmp_path, name):
    stored = {re.sub(r"qkv\.weight$", name, key): value for key, value in state().items()}
    with pytest.raises(CheckpointError, match=r"qkv\.weight is"):
        alphas(saved(tmp_path, stored))


TWICE = [
    ("m.base_layer.weight",),
    ("m.weight_g", "m.weight_v"),
    ("m.weight_orig", "m.weight_mask"),
    ("m.parametrizations.weight.original0", "m.parametrizations.weight.original1"),
]


@pytest.mark.parametrize("parts", TWICE, ids=str)
def test_a_weight_that_is_stored_beside_what_it_is_made_of_is_refused_by_name(tmp_path, parts):
    stored = {name: torch.ones(4, 4) for name in parts}
    assert open_checkpoint(saved(tmp_path, stored))["m.weight"].shape == (4, 4)
    twice = open_checkpoint(saved(tmp_path, stored | {"m.weight": torch.zeros(4, 4)}, "twice.pth"))
    with pytest.raises(CheckpointError, match=rf"^m\.weight is stored beside {re.escape(parts[0])}, and which"):
        twice["m.weight"]


@pytest.mark.parametrize("leaf", ["oft_r", "hada_w1_a", "scale", "lora_C.weight", "lily_A.weight", "a.b.weight"])
@pytest.mark.parametrize("named", [True, False])
def test_what_stands_inside_a_projection_and_is_not_known_is_refused_by_name(tmp_path, leaf, named):
    tensors = timm.create_model(TINY).state_dict() if named else state()
    path = saved(tmp_path, tensors | {f"blocks.1.attn.qkv.{leaf}": torch.ones(3)})
    with pytest.raises(CheckpointError, match=rf"blocks\.1\.attn\.qkv\.{re.escape(leaf)} stands beside"):
        attnlens.inspect(TINY, path) if named else alphas(path)


LLAMA = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "num_hidden_layers": 2}
ADAPTERS = [{}, {"use_dora": True}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 3}}]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("options", ADAPTERS, ids=str)
def test_a_folder_of_peft_is_read_merged_with_its_base_at_hand(tmp_path, options):
    peft = pytest.importorskip("peft", reason="peft writes the folder: pip install it")
    transformers = pytest.importorskip("transformers", reason="transformers writes the folder: pip install it")
    config = transformers.LlamaConfig(**LLAMA, intermediate_size=12, vocab_size=11)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(target_modules=["q_proj", "o_proj"], r=4, lora_alpha=7, init_lora_weights=False, **options),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    raw = [
        np.array([row["alpha"] for row in attnlens.inspect(tmp_path / name, fold="raw").stats.records()])
        for name in ("adapter", "merged", "base")
    ]
    np.testing.assert_allclose(raw[0], raw[1], rtol=1e-5)
    assert np.abs(raw[0] / raw[2] - 1).min() > 1e-3


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path):
    save_file({"layers.0.attn.q.weight": torch.ones(3, 3)}, tmp_path / "base.safetensors")
    (tmp_path / "adapter").mkdir()
    save_file(
        {"base_model.model.other.q.lora_A.weight": torch.ones(4, 3)}, tmp_path / "adapter/adapter_model.safetensors"
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 4}')
    base = open_checkpoint(tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match=r"adapts other\.q\.lora_A\.weight, which its base does not have"):
        with_adapter(base, AdapterConfig(tmp_path / "adapter"))


def test_a_folder_of_peft_without_its_base_says_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name", "lora_alpha": 8, "r": 4}')
    save_file({"base_model.model.q.lora_A.weight": torch.ones(4, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"PEFT adapter of owner/name.*merge_and_unload"):
        attnlens.inspect(tmp_path)


def test_the_time_for_names_of_adapters_does_not_grow_with_their_number_times_the_layers():
    projections = [f"blocks.{layer}.attn.{part}.weight" for layer in range(4000) for part in ("qkv", "proj")]
    stored = dict.fromkeys([*projections, *(f"lora_{i}" for i in range(8000))])
    start = time.process_time()
    assert unread_beside(stored, projections, projections) is None
    assert time.process_time() - start < 1
    assert unread_beside(stored | {"blocks.3.attn.a.lora_b": 0}, projections, projections).startswith("blocks.3.attn.a")
