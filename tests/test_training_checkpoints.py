"""What training leaves behind, with its right values: several networks, codes, adapters, wrappers, formats."""

import argparse
import collections
import json
import pathlib
import re
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn.utils import parametrizations, prune

import attnlens
from attnlens.checkpoints import open_checkpoint
from attnlens.checkpoints.adapters import with_adapter
from attnlens.cli import main
from attnlens.errors import AttnlensError, CheckpointError, ModelNotFoundError, UnsupportedAttentionError, UsageError
from attnlens.training.networks.vit import ARCHITECTURE
from tests.training_setup import SHAPE

TINY = "vit_tiny_patch16_224"
SMALL = {"depth": 2, "img_size": 32, "num_classes": 5}


def vit(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(TINY, **SMALL)


def state(seed=0):
    return vit(seed).state_dict()


def prefixed(tensors, prefix):
    return {prefix + name: value for name, value in tensors.items()}


def saved(folder, content, name="x.pth"):
    torch.save(content, folder / name)
    return folder / name


def alphas(source, **options):
    """Return every alpha, read by names unless something else is asked for."""
    options = options or {"num_heads": 3}
    return [row["alpha"] for row in attnlens.inspect(source, fold="raw", **options).stats.records()]


@pytest.fixture
def plain(tmp_path):
    """Return what files of the two networks alone give."""
    return [alphas(saved(tmp_path, state(seed), f"plain{seed}.pth")) for seed in (0, 1)]


# Codes


def projections(tensors):
    return [name for name in tensors if name.endswith(("qkv.weight", "attn.proj.weight"))]


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


# Several networks


MOCO = ("module.base_encoder.", "module.momentum_encoder.")


@pytest.mark.parametrize(
    "prefixes", [MOCO, ("question_encoder.", "ctx_encoder."), ("generator.net.", "discriminator.net.")]
)
def test_two_networks_in_the_names_of_one_file_are_not_read_as_one(tmp_path, plain, prefixes):
    path = saved(tmp_path, {"state_dict": prefixed(state(0), prefixes[0]) | prefixed(state(1), prefixes[1])})
    names = [prefix.removeprefix("module.").rstrip(".") for prefix in prefixes]
    assert alphas(path) == plain[0]
    found = attnlens.inspect(path, num_heads=3)
    assert found.provenance["networks"] == names
    assert found.model == f"x [{names[0]}]"
    for number, name in enumerate(names):
        assert alphas(path, num_heads=3, weights=name) == plain[number]
        assert alphas(TINY, checkpoint=path, weights=name) == plain[number]


@pytest.mark.parametrize(
    ("keys", "default"),
    [
        (("state_dict", "state_dict_ema"), 1),
        (("model", "model_ema"), 1),
        (("model", "ema"), 1),
        (("state_dict", "ema_state_dict"), 1),
        (("encoder", "target_encoder"), 0),
        (("student", "teacher"), 1),
        (("teacher", "student"), 0),
        (("params", "params_ema"), 1),
        (("online", "averaged"), 1),
    ],
)
def test_of_several_sets_an_average_is_the_default_and_each_can_be_chosen(tmp_path, plain, keys, default):
    path = saved(tmp_path, {"epoch": 3, **dict(zip(keys, (state(0), state(1)), strict=True))})
    assert alphas(path) == plain[default]
    found = attnlens.inspect(path, num_heads=3)
    assert found.provenance["weights"] == keys[default]
    assert found.provenance["networks"] == list(keys)
    for number, key in enumerate(keys):
        assert alphas(path, num_heads=3, weights=key) == plain[number]
        assert alphas(TINY, checkpoint=path, weights=key) == plain[number]


def test_the_chosen_network_stands_in_table_figures_json_and_parameters(tmp_path):
    path = saved(tmp_path, {"student": state(0), "teacher": state(1)})
    found = attnlens.inspect(path, num_heads=3)
    assert found.to_json()["model"] == "x [teacher]"
    titles = [text.get_text() for figure in found.figures().values() for text in figure.findobj(match=_is_text)]
    assert any("x [teacher]" in title for title in titles)
    params = attnlens.fit_params(path, num_heads=3, weights="student", fold="raw")
    assert params.sources[0].model == "x [student]"
    assert params.sources[0].provenance["weights"] == "student"


def _is_text(artist):
    return hasattr(artist, "get_text")


def test_a_network_that_is_not_there_is_refused_with_those_that_are(tmp_path):
    path = saved(tmp_path, {"student": state(0), "teacher": state(1)})
    with pytest.raises(UsageError, match="no weights 'ema': it holds student, teacher"):
        alphas(path, num_heads=3, weights="ema")


def test_an_encoder_and_a_decoder_of_one_network_stay_one(tmp_path):
    tensors = {}
    for side, modules in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "encoder_attn"])):
        for module in modules:
            for role in ("q", "k", "v", "out"):
                tensors[f"{side}.layers.0.{module}.{role}_proj.weight"] = torch.randn(6, 6)
    assert len(attnlens.inspect(saved(tmp_path, tensors), num_heads=3).specs) == 3


def test_a_backbone_and_its_head_below_two_keys_are_one_network(tmp_path, plain):
    path = saved(tmp_path, {"backbone": state(), "head": {"weight": torch.zeros(5, 24)}})
    assert alphas(path) == plain[0]


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
        with_adapter(base, tmp_path / "adapter")


def test_a_folder_of_peft_without_its_base_says_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name", "lora_alpha": 8, "r": 4}')
    save_file({"base_model.model.q.lora_A.weight": torch.ones(4, 3)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"PEFT adapter of owner/name.*merge_and_unload"):
        attnlens.inspect(tmp_path)


# The order of packed rows


ORDERS = ("qkv,head,dim", "head,qkv,dim", "head,dim,qkv", "4,qvk,head,dim")


def trained(order, heads=8, width=96, depth=3):
    """Return packed projections of that order whose rows of V and columns of O are tied as weight decay ties them."""
    draw = np.random.default_rng(0)
    stored, meant = {}, {}
    for layer in range(depth):
        size = np.exp(draw.normal(scale=0.4, size=width))
        q, k, v = (draw.normal(size=(width, width)) for _ in "qkv")
        v, o = v * size[:, None], draw.normal(size=(width, width)) * size
        meant |= {f"blocks.{layer}.attn.qkv.weight": np.concatenate([q, k, v]), f"blocks.{layer}.attn.proj.weight": o}
        dim = width // heads
        by_head = {role: w.reshape(heads, dim, width) for role, w in (("q", q), ("k", k), ("v", v))}
        rows = {
            "qkv,head,dim": np.stack([by_head[r] for r in "qkv"]),
            "head,qkv,dim": np.stack([by_head[r] for r in "qkv"], 1),
            "head,dim,qkv": np.stack([by_head[r] for r in "qkv"], 2),
            "4,qvk,head,dim": np.stack([by_head[r].reshape(4, heads // 4, dim, width) for r in "qvk"], 1),
        }[order]
        stored |= {
            f"blocks.{layer}.attn.qkv.weight": rows.reshape(3 * width, width),
            f"blocks.{layer}.attn.proj.weight": o,
        }
    return [
        {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in one.items()} for one in (stored, meant)
    ]


@pytest.mark.parametrize("order", ORDERS)
def test_the_weights_tell_another_order_of_rows_and_the_option_reads_it(tmp_path, order):
    stored, meant = trained(order)
    path, expected = saved(tmp_path, stored), alphas(saved(tmp_path, meant, "meant.pth"), num_heads=8)
    if order == "qkv,head,dim":
        (label,) = {spec.label for _, spec in attnlens.inspect(path, num_heads=8).specs}
        assert "rows ordered qkv,head,dim, which the weights bear out (correlation 0.9" in label
        assert alphas(path, num_heads=8) == expected
        return
    with pytest.raises(UsageError, match=f"Add row_order='{order}'"):
        alphas(path, num_heads=8)
    assert alphas(path, num_heads=8, row_order=order) == expected
    params = attnlens.fit_params(path, num_heads=8, row_order=order, fold="raw")
    assert params.sources[0].provenance["row_order"] == order


def test_a_config_beside_the_file_outranks_the_guess_of_an_order(tmp_path):
    stored, meant = trained("4,qvk,head,dim")
    (tmp_path / "folder").mkdir()
    save_file(stored, tmp_path / "folder" / "model.safetensors")
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "codegen"}')
    assert alphas(tmp_path / "folder", num_heads=8) == alphas(saved(tmp_path, meant, "meant.pth"), num_heads=8)


def test_a_config_beside_the_file_that_describes_it_outranks_names_and_contradicts_another_head_count(tmp_path, plain):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(state(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": TINY, "model_args": SMALL}))
    for path in (folder, folder / "model.safetensors"):
        found = attnlens.inspect(path, num_heads=3)
        assert found.provenance["architecture"] == TINY
        assert not any("guessed" in why for why in found.left_out())
        with pytest.raises(UsageError, match=r"by its config.json, stores 3 heads in each layer, not 6: leave out"):
            attnlens.inspect(path, num_heads=6)
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224", "model_args": SMALL}))
    assert alphas(folder, num_heads=3) == plain[0]
    (said,) = attnlens.inspect(folder, num_heads=3).left_out()
    assert said.endswith("; the config.json beside it does not describe these weights")


def test_the_order_of_rows_is_said_wherever_the_numbers_go(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stored, _ = trained("head,dim,qkv")
    path, words = str(saved(tmp_path, stored)), "rows ordered head,dim,qkv, as asked (correlation 0.9"
    given = {"num_heads": 8, "row_order": "head,dim,qkv", "fold": "raw"}
    params = attnlens.fit_params(path, **given)
    assert any(words in why for why in params.sources[0].left_out)
    assert words in params.to_json()
    assert words in attnlens.report(path, output=tmp_path / "page.html", **given)
    composed = attnlens.compose(path, **given)
    assert all(words in layer["label"] for layer in composed.to_json()["layers"])
    compared = attnlens.compare(path, path, **given)
    assert all(any(words in why for why in said) for said in compared.left_out.values())
    scanned = attnlens.scan(path, tmp_path / "scan", **given, workers=1)
    assert words in (tmp_path / "scan" / "scan.csv").read_text()
    assert attnlens.scan(path, tmp_path / "scan", **given, workers=1).measured == 0
    assert attnlens.scan(path, tmp_path / "scan", **given | {"row_order": "head,qkv,dim"}, workers=1).measured == 1
    assert words in scanned.rows()[0]["labels"]

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["attnlens", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code in (None, 0)

    options = ["--num-heads", "8", "--row-order", "head,dim,qkv", "--fold", "raw"]
    for command in (["inspect", path], ["fit-params", path], ["compose", path], ["compare", path, path]):
        run(*command, *options)
        assert words in capfd.readouterr().err.replace("\n", " ")
    run("scan", path, "-o", "scan", *options)
    assert words in capfd.readouterr().err.replace("\n", " ")


class Packed(torch.nn.Module):
    def __init__(self, tensors):
        super().__init__()
        self.blocks = torch.nn.ModuleList()
        for layer in range(3):
            block = torch.nn.Module()
            block.attn = torch.nn.Module()
            for name in ("qkv", "proj"):
                weight = tensors[f"blocks.{layer}.attn.{name}.weight"].float()
                setattr(block.attn, name, torch.nn.Linear(*weight.T.shape, bias=False))
                getattr(block.attn, name).weight.data = weight
            self.blocks.append(block)


def test_a_live_network_is_read_in_the_order_of_rows_that_is_asked_for():
    (stored, meant), given = trained("head,dim,qkv"), {"num_heads": 8, "fold": "raw"}
    module, expected = Packed(stored), attnlens.inspect(Packed(meant), **given).stats
    with pytest.raises(UsageError, match="Add row_order='head,dim,qkv'"):
        attnlens.inspect(module, **given)
    found = attnlens.inspect(module, row_order="head,dim,qkv", **given)
    assert found.stats.json_rows() == expected.json_rows()
    assert found.provenance["row_order"] == "head,dim,qkv"
    both = attnlens.inspect(Packed(meant), checkpoint=module.state_dict(), row_order="head,dim,qkv", **given)
    assert both.stats.json_rows() == expected.json_rows()


def test_an_order_of_rows_without_a_head_count_is_refused_and_not_ignored():
    with pytest.raises(UsageError, match="row_order goes with num_heads"):
        attnlens.inspect(vit(), row_order="head,dim,qkv")


@pytest.mark.parametrize("order", ["rows", "head,qkv", "head,qkv,dim,dim", "0,qkv,head,dim", "qkv,4,head,dim"])
def test_what_is_no_order_of_rows_is_refused(tmp_path, order):
    with pytest.raises(UsageError, match="is no order of rows"):
        alphas(saved(tmp_path, state()), num_heads=3, row_order=order)


def test_packed_rows_of_unequal_thirds_are_refused_where_names_do_not_tell_why(tmp_path):
    tensors = {"b.attn.qkv.weight": torch.randn(48, 8), "b.attn.proj.weight": torch.randn(8, 32)}
    with pytest.raises(UnsupportedAttentionError, match="keys of another width than values"):
        alphas(saved(tmp_path, tensors), num_heads=4)


def test_attention_over_channels_is_read_only_on_request(tmp_path):
    model = timm.create_model("xcit_nano_12_p16_224", depth=1, num_classes=0)
    path = saved(tmp_path, model.state_dict())
    found = attnlens.inspect(path, num_heads=4)
    assert "blocks.0.attn" not in [spec.path for _, spec in found.specs]
    assert ["--include-channel" in refusal.reason for refusal in found.refused if refusal.path == "blocks.0.attn"] == [
        True
    ]
    asked = attnlens.inspect(path, num_heads=4, include=["channel"])
    assert "blocks.0.attn" in [spec.path for _, spec in asked.specs]


@pytest.mark.parametrize("place", ["lightglue", "svtr"])
def test_projections_in_no_layer_that_is_read_are_named(tmp_path, place):
    names = {"lightglue": "cross.0.to_q.weight", "svtr": "mixer.qk.weight"}
    tensors = state() | {names[place]: torch.randn(24, 24)}
    found = attnlens.inspect(saved(tmp_path, tensors), num_heads=3)
    assert [refusal.path for refusal in found.refused] == [names[place].rpartition(".")[0].rpartition(".")[0]]


def test_a_shared_query_and_key_projection_is_cross_attention(tmp_path):
    draw = torch.Generator().manual_seed(0)
    roles = {role: torch.randn(6, 6, generator=draw) for role in ("to_qk", "to_v", "to_out")}
    found = attnlens.inspect(saved(tmp_path, {f"cross_attn.0.{k}.weight": w for k, w in roles.items()}), num_heads=3)
    heads = found.heads(0)
    np.testing.assert_array_equal(heads.W_Q, heads.W_K)
    np.testing.assert_array_equal(np.concatenate(heads.W_Q.swapaxes(1, 2)), roles["to_qk"])
    assert "cross" in heads.leaves_out


@pytest.mark.parametrize("kv", [("to_q", "to_kv", "to_out.0"), ("q", "kv", "proj")])
def test_keys_and_values_in_one_tensor_are_parted(tmp_path, kv):
    draw = torch.Generator().manual_seed(0)
    q, packed, o = (torch.randn(n, 6, generator=draw) for n in (6, 12, 6))
    names = [f"b.attn.{name}.weight" for name in kv]
    heads = attnlens.inspect(saved(tmp_path, dict(zip(names, (q, packed, o), strict=True))), num_heads=3).heads(0)
    for found, expected in ((heads.W_Q, q), (heads.W_K, packed[:6]), (heads.W_V, packed[6:])):
        np.testing.assert_array_equal(np.concatenate(found.swapaxes(1, 2)), expected)


def test_one_shard_of_several_says_so(tmp_path):
    save_file(state(), tmp_path / "model-00002-of-00003.safetensors")
    found = attnlens.inspect(tmp_path / "model-00002-of-00003.safetensors", num_heads=3)
    assert all("shard 2 of 3" in spec.label for _, spec in found.specs)
    later = {name.replace("blocks.0", "blocks.7").replace("blocks.1", "blocks.8"): v for name, v in state().items()}
    found = attnlens.inspect(saved(tmp_path, later), num_heads=3)
    assert all("blocks.0 to blocks.6 are not in this file" in spec.label for _, spec in found.specs)


# Training checkpoints


class Strange:
    """A class of a training script, of which nothing is looked up."""

    def __init__(self):
        self.lr = 1


@pytest.mark.parametrize(
    "extra",
    [
        argparse.Namespace(lr=1, nested=argparse.Namespace(a=[1])),
        np.float64(70.1),
        np.random.default_rng(0).normal(size=3),
        pathlib.PurePosixPath("runs/1"),
        collections.defaultdict(list, a=[1]),
        collections.Counter("abc"),
        torch.float16,
        {1, 2},
        Strange(),
        {"a": {"b": Strange()}},
    ],
    ids=lambda extra: type(extra).__name__,
)
@pytest.mark.parametrize("legacy", [False, True])
def test_objects_beside_the_weights_are_inert(tmp_path, plain, extra, legacy):
    content = {"model": state(), "extra": extra, "epoch": 3}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    assert alphas(tmp_path / "x.pth") == plain[0]


def test_timms_own_checkpoints_name_their_architecture(tmp_path, plain):
    from timm.utils import CheckpointSaver

    model = vit()
    saver = CheckpointSaver(
        model,
        torch.optim.AdamW(model.parameters()),
        argparse.Namespace(model=TINY),
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, 70.0)
    assert alphas(tmp_path / "last.pth.tar", layers=None) == plain[0]
    assert attnlens.inspect(tmp_path / "last.pth.tar").provenance["architecture"] == TINY


class DictConfig:
    """As OmegaConf's, which Lightning stores: values in nodes, below ``_content``."""

    def __init__(self, **content):
        self.__dict__ = {"_metadata": Strange(), "_parent": None, "_content": content}


class AnyNode:
    def __init__(self, value):
        self.__dict__ = {"_metadata": Strange(), "_parent": None, "_val": value}


def test_a_checkpoint_of_lightning_names_its_architecture_in_a_configuration_of_omegaconf(tmp_path, plain):
    kwargs = DictConfig(depth=AnyNode(2), img_size=AnyNode(32))
    settings = DictConfig(lr=AnyNode(0.1), model=AnyNode(TINY), model_kwargs=kwargs)
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": prefixed(state(), "net."),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "hparams_name": "cfg",
        "hyper_parameters": settings,
    }
    path = saved(tmp_path, content, "last.ckpt")
    assert alphas(path, layers=None) == alphas(path) == plain[0]
    assert attnlens.inspect(path).provenance["architecture"] == TINY


def test_a_checkpoint_of_a_network_of_train_compare_goes_from_timms_saver_to_figures_parameters_and_page(tmp_path):
    from timm.utils import CheckpointSaver, ModelEmaV2

    module, averaged = SHAPE.build(3), ModelEmaV2(SHAPE.build(4))
    args = argparse.Namespace(model=ARCHITECTURE, model_kwargs=SHAPE.model_args() | {"act_layer": torch.nn.GELU})
    saver = CheckpointSaver(
        module,
        torch.optim.AdamW(module.parameters()),
        args,
        model_ema=averaged,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, 70.0)
    file, title = tmp_path / "last.pth.tar", f"{tmp_path.name}-last"
    for network, weights, name in (
        (averaged.module, None, "state_dict_ema"),
        (averaged.module, "ema", "state_dict_ema"),
        (module, "state_dict", "state_dict"),
    ):
        found = attnlens.inspect(file, weights=weights)
        assert found.stats.json_rows() == attnlens.inspect(network).stats.json_rows()
        assert set(found.stats.column("num_heads")) == {SHAPE.num_heads}
        assert found.model == f"{title} [{name}]"
    params, expected = attnlens.fit_params(file, weights="ema"), attnlens.fit_params(averaged.module)
    assert params.entries == expected.entries
    assert params.sources[0].model == f"{title} [state_dict_ema]"
    assert f"{title} [state_dict_ema]" in attnlens.report(file, weights="ema", output=tmp_path / "page.html")


def test_a_pickled_network_gives_its_weights_and_runs_nothing(tmp_path, plain):
    torch.save({"model": vit()}, tmp_path / "whole.pth")
    assert alphas(tmp_path / "whole.pth") == plain[0]


def test_the_state_of_an_optimiser_is_no_network(tmp_path, plain):
    moments = {"exp_avg": state(1), "state": {0: {"exp_avg": torch.ones(3)}}}
    assert alphas(saved(tmp_path, {"model": state(), "optimizer": moments, "optim": state(1)})) == plain[0]


@pytest.mark.parametrize("key", ["net", "params_ema", "weights", "checkpoint.model", "a.b.c.d"])
def test_a_state_dict_is_found_behind_keys_of_any_depth(tmp_path, plain, key):
    content = state()
    for part in reversed(key.split(".")):
        content = {part: content, "acc": 91.2}
    path = saved(tmp_path, content)
    assert alphas(path) == plain[0]
    assert next(iter(open_checkpoint(path))) == "cls_token"


WRAPPED = {
    "compiled blocks": lambda name: re.sub(r"^(blocks\.\d+)", r"\1._orig_mod", name),
    "activation checkpoints": lambda name: re.sub(r"^(blocks\.\d+)", r"\1._checkpoint_wrapped_module", name),
    "FSDP": lambda name: "_fsdp_wrapped_module." + re.sub(r"^(blocks\.\d+)", r"\1._fsdp_wrapped_module", name),
    "all of it": lambda name: f"module._orig_mod.{name}",
    "chunks": lambda name: re.sub(r"^blocks\.(\d+)", r"blocks.\1.\1", name),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_what_wrappers_put_into_names_is_taken_off(tmp_path, plain, wrapper):
    path = saved(tmp_path, {WRAPPED[wrapper](name): value for name, value in state().items()})
    assert alphas(path) == plain[0]
    assert alphas(TINY, checkpoint=path) == plain[0]


# Formats


def test_a_torchscript_archive_is_read_without_running_it(tmp_path, plain):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to replace TorchScript; people's files stay
        scripted = torch.jit.trace(vit().eval(), torch.zeros(1, 3, 32, 32))
    scripted.save(tmp_path / "scripted.pt")
    assert alphas(tmp_path / "scripted.pt") == plain[0]


@pytest.mark.parametrize("name", ["s.bin", "s.pth", "s.ckpt", "s.weights"])
def test_safetensors_are_read_under_any_name(tmp_path, plain, name):
    save_file(state(), tmp_path / name)
    assert list(open_checkpoint(tmp_path / name)) == sorted(state(), key=list(open_checkpoint(tmp_path / name)).index)
    if name != "s.weights":
        assert alphas(tmp_path / name) == plain[0]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git lfs pull"),
        ("a.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n", "git lfs pull"),
        ("a.pth", b"<!DOCTYPE html><html>", "HTML page"),
        ("a.gguf", b"GGUF\x03", "GGUF"),
        ("a.bin", b"GGUF\x03", "GGUF"),
        ("a.onnx", b"0", "ONNX"),
        ("a.h5", b"0", "HDF5"),
        ("a.msgpack", b"0", "Flax msgpack"),
        ("a.distcp", b"0", "dcp_to_torch"),
    ],
)
def test_other_formats_are_named_with_what_to_do(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    for options in ({}, {"num_heads": 3}):
        with pytest.raises(AttnlensError, match=told) as caught:
            attnlens.inspect(tmp_path / name, **options)
        assert "corrupt" not in str(caught.value)


@pytest.mark.parametrize(
    ("inside", "told"), [("__0_0.distcp", "dcp_to_torch"), ("zero_to_fp32.py", "zero_to_fp32.py FOLDER FILE")]
)
def test_folders_of_training_libraries_say_what_converts_them(tmp_path, inside, told):
    (tmp_path / inside).write_bytes(b"0")
    with pytest.raises(CheckpointError, match=told):
        attnlens.inspect(tmp_path)


def test_a_refusal_says_what_the_file_holds(tmp_path):
    path = saved(tmp_path, {"student": state(0), "teacher": state(1)})
    with pytest.raises(UsageError, match=r"the networks student, teacher, and \d+ tensors, cls_token, "):
        attnlens.inspect(path)
    with pytest.raises(CheckpointError, match=r"holds the keys epoch, args, and holds no tensors"):
        open_checkpoint(saved(tmp_path, {"epoch": 3, "args": {"lr": 1}}))
