"""Folders of PEFT against PEFT: its rule for names, what it reads of a file, and the numbers that it makes."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import attnlens
from attnlens.checkpoints import open_checkpoint
from attnlens.checkpoints.adapter_config import AdapterConfig
from attnlens.checkpoints.adapters import with_adapter
from attnlens.checkpoints.hub import refuse_adapter
from attnlens.checkpoints.open import open_stored
from attnlens.errors import CheckpointError
from attnlens.scans.plan import plan_scan

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]
FRONT = "base_model.model."
LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1) for name in ("q_proj", "k_proj")]
STATED = {"peft_type": "LORA", "lora_alpha": 8, "r": 2, "target_modules": ["q_proj", "k_proj"]}
Q = f"{FRONT}{LAYERS[0]}"


def written(folder, stated, tensors, kind="LORA"):
    """Write a base of ones and its adapter, and return the weights that both make."""
    (folder / "adapter").mkdir(exist_ok=True)
    base = {f"{name}.{end}": torch.ones(shape) for name in LAYERS for end, shape in (("weight", (3, 3)), ("bias", 3))}
    save_file({**base, "model.layers.0.self_attn.v_proj.weight": torch.ones(3, 3)}, folder / "base.safetensors")
    ends = {"lora_A.weight": (2, 3), "lora_B.weight": (3, 2)} if kind == "LORA" else {"ia3_l": (3, 1)}
    own = {f"{FRONT}{name}.{end}": torch.ones(shape) for name in LAYERS for end, shape in ends.items()}
    save_file({**own, **tensors}, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**STATED, **stated}))
    return with_adapter(open_checkpoint(folder / "base.safetensors"), AdapterConfig(folder / "adapter"))


LEFT_OUT = [
    {"target_modules": ["q_proj"]},
    {"target_modules": []},
    {"target_modules": None},
    {"target_modules": "q_proj"},
    {"target_modules": ["proj", "_proj"]},
    {"exclude_modules": ["k_proj"]},
    {"exclude_modules": "model.layers.0.self_attn.k_proj"},
    {"layers_to_transform": [0]},
    {"layers_to_transform": 1},
    {"layers_to_transform": [0, 1], "layers_pattern": ["blocks"]},
    {"modules_to_save": ["self_attn"]},
    {"peft_type": "IA3", "target_modules": ["q_proj"]},
]


@pytest.mark.parametrize("stated", LEFT_OUT, ids=str)
def test_tensors_of_modules_that_peft_does_not_adapt_are_refused(tmp_path, stated):
    with pytest.raises(
        CheckpointError, match=r"does not agree with its adapter_config\.json: PEFT does not read .*_proj"
    ):
        written(tmp_path, stated, {}, stated.get("peft_type", "LORA"))


KEPT = [
    {"target_modules": r".*\.(q|k)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": ["self_attn.q_proj", "k_proj"], "exclude_modules": ["layers.7", "other"]},
    {"exclude_modules": r"x.*"},
    {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"layers_to_transform": [7], "target_modules": LAYERS},
    {"target_modules": ["k_proj"], "target_parameters": ["q_proj.weight"]},
    {"rank_pattern": {".*q_proj": 5}},
    {"r": 5, "rank_pattern": {"q_proj": 2, "k_proj": 2}},
]


@pytest.mark.parametrize("stated", KEPT, ids=str)
def test_tensors_of_modules_that_peft_adapts_are_merged(tmp_path, stated):
    found = written(tmp_path, stated, {})
    assert [float(found[f"{name}.weight"][0, 0]) for name in LAYERS] == [9] * 4


UNREAD = {
    "magnitudes": ({}, {f"{Q}.lora_magnitude_vector": torch.ones(3)}, "has magnitudes, and use_dora is not set"),
    "no magnitudes": ({"use_dora": True}, {}, "use_dora is set, and .* has no magnitudes"),
    "alpha": ({}, {f"{Q}.alpha": torch.tensor(9.0)}, "reads no .*q_proj.alpha"),
    "lora_alpha": ({}, {f"{Q}.lora_alpha": torch.tensor(9.0)}, "reads no .*lora_alpha"),
    "scaling": ({}, {f"{Q}.scaling": torch.tensor(9.0)}, "reads no .*scaling"),
    "weight": ({}, {f"{Q}.weight": torch.zeros(3, 3)}, "does not read .*q_proj.weight beside"),
    "bias": ({}, {f"{Q}.bias": torch.zeros(3)}, "does not read .*q_proj.bias beside"),
    "scale": (
        {},
        {f"{FRONT}model.layers.0.self_attn.v_proj.weight_scale": torch.ones(1)},
        "which the base does not have",
    ),
    "wrapped": (
        {},
        {f"{FRONT}model.layers.0.self_attn.v_proj.base_layer.weight": torch.ones(3, 3)},
        "without an adapter",
    ),
    "front": ({}, {"model.layers.0.self_attn.v_proj.weight": torch.ones(3, 3)}, "does not begin with base_model"),
    "adapter": ({}, {f"{Q}.lora_A.other.weight": torch.ones(2, 3)}, "reads no .*lora_A.other.weight"),
    "loralib": ({}, {f"{FRONT}model.layers.0.self_attn.v_proj.lora_A": torch.ones(2, 3)}, "reads no .*lora_A"),
    "kohya": (
        {},
        {f"{FRONT}model.layers.0.self_attn.v_proj.lora_down.weight": torch.ones(2, 3)},
        "reads no .*lora_down",
    ),
    "saved": ({"modules_to_save": ["v_proj"]}, {}, "modules_to_save names the module of .*v_proj.weight"),
    "method": ({}, {f"{FRONT}model.layers.0.self_attn.v_proj.ia3_l": torch.ones(3, 1)}, "reads no .*ia3_l for LORA"),
}


@pytest.mark.parametrize("case", UNREAD)
def test_a_tensor_that_peft_does_not_read_or_would_miss_is_refused(tmp_path, case):
    stated, tensors, message = UNREAD[case]
    with pytest.raises(CheckpointError, match=f"does not agree with its adapter_config.json: .*{message}"):
        written(tmp_path, stated, tensors)


def test_a_vector_on_the_other_side_than_feedforward_modules_say_is_refused(tmp_path):
    stated = {"peft_type": "IA3", "feedforward_modules": []}
    assert written(tmp_path, stated, {}, "IA3")[f"{LAYERS[0]}.weight"].max() == 1
    with pytest.raises(CheckpointError, match="which feedforward_modules contradicts"):
        written(tmp_path, {**stated, "feedforward_modules": ["q_proj"]}, {}, "IA3")


def test_what_peft_reads_beside_an_adapter_is_read(tmp_path):
    v = "model.layers.0.self_attn.v_proj.weight"
    assert written(tmp_path, {}, {f"{FRONT}{v}": torch.zeros(3, 3)})[v].max() == 0
    found = written(tmp_path, {"bias": "all"}, {f"{Q}.base_layer.{end}": torch.zeros(3) for end in ("bias",)})
    assert found[f"{LAYERS[0]}.bias"].max() == 0
    found = written(tmp_path, {"modules_to_save": ["v_proj"]}, {f"{FRONT}{v}": torch.zeros(3, 3)})
    assert found[v].max() == 0


def test_a_rank_that_is_not_the_stated_one_is_refused(tmp_path):
    for stated in ({"r": 4}, {"rank_pattern": {"q_proj": 3}}):
        with pytest.raises(CheckpointError, match="of rank 2, where its configuration states another"):
            written(tmp_path, stated, {})[f"{LAYERS[0]}.weight"]


NAMES = [
    *(
        "model.layers.0.self_attn.q_proj",
        "model.layers.10.mlp.experts.1.up_proj",
        "h.0.attn.c_attn",
        "q_proj",
        "x_q_proj",
    ),
    *(
        "transformer.h.1.attn.c_proj",
        "transformer.h.1.mlp.c_proj",
        "encoder.layers.1.q_proj",
        "blocks.1.layers.2.q_proj",
    ),
]
RULES = [
    {"target_modules": ["q_proj", "attn.c_proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj", "c_proj"], "exclude_modules": ["mlp.c_proj"]},
    {"target_modules": ["q_proj", "up_proj", "c_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "up_proj", "c_attn", "c_proj"], "layers_to_transform": 0},
    {
        "target_modules": ["q_proj", "up_proj", "c_attn"],
        "layers_to_transform": [1, 2],
        "layers_pattern": ["layers", "h"],
    },
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0], "layers_pattern": "h"},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": "q_proj", "exclude_modules": "x_q_proj"},
    {"target_modules": ["q_proj", "c_proj"], "modules_to_save": ["self_attn", "mlp"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
]


@pytest.mark.parametrize("stated", RULES, ids=str)
def test_the_modules_adapted_are_those_of_peft(tmp_path, stated):
    peft = pytest.importorskip("peft", reason="peft says which: pip install it")
    from peft.tuners.tuners_utils import check_target_module_exists

    (tmp_path / "adapter_config.json").write_text(json.dumps(stated))
    config, ours = peft.LoraConfig(**stated), AdapterConfig(tmp_path)
    expected = {name: bool(check_target_module_exists(config, name)) for name in NAMES}
    assert {name: ours.adapts(name) for name in NAMES} == expected


def test_an_expression_is_not_run(tmp_path):
    for stated in ({"target_modules": "(a+)+$"}, {"exclude_modules": "(a+)+$"}, {"modules_to_save": ["(a+)+$"]}):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": ["a"], **stated}))
        assert AdapterConfig(tmp_path).adapts(f"{'a' * 60}!.a") is None


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Save a Llama and a GPT-2 whose projections are square, and return the folders and the classes."""
    transformers = pytest.importorskip("transformers", reason="it makes the folders: pip install it")
    pytest.importorskip("peft", reason="it makes the adapters: pip install it")
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = transformers.LlamaConfig(vocab_size=10, num_key_value_heads=4, attention_bias=True, **small)
    gpt2 = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=10, n_positions=8)
    for config, kind in ((llama, transformers.LlamaForCausalLM), (gpt2, transformers.GPT2LMHeadModel)):
        kind(config).save_pretrained(folder / config.model_type)
    return folder, transformers.AutoModelForCausalLM


def products(source, **options):
    found = attnlens.inspect(source, fold="raw", **options).stats.records()
    return np.array([[row["alpha"], row["beta"]] for row in found])


def saved(bases, base, config, path):
    """Save an adapter of random numbers as PEFT does."""
    import peft

    folder, kind = bases
    adapted = peft.get_peft_model(kind.from_pretrained(folder / base), config)
    torch.manual_seed(1)
    for name, tensor in adapted.named_parameters():
        if "lora_" in name or "ia3_" in name or name.endswith("bias"):
            tensor.data = torch.randn_like(tensor) / 3 + ("ia3_" in name or "magnitude" in name)
    adapted.save_pretrained(path)


def merged_by_peft(bases, base, adapter, path):
    import peft

    folder, kind = bases
    peft.PeftModel.from_pretrained(kind.from_pretrained(folder / base), adapter).merge_and_unload().save_pretrained(
        path
    )
    return products(path)


SQUARE = {"llama": ["q_proj", "o_proj"], "gpt2": ["attn.c_proj"], "packed": ["c_attn", "attn.c_proj"]}
METHODS = {
    "lora": ("LoraConfig", {"r": 4}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "bias": ("LoraConfig", {"r": 4, "bias": "all"}),
    "only": ("LoraConfig", {"r": 4, "bias": "lora_only"}),
    "layers": ("LoraConfig", {"r": 4, "layers_to_transform": [1]}),
    "ia3": ("IA3Config", {"feedforward_modules": []}),
    "feedforward": ("IA3Config", {"feedforward_modules": "all"}),
}


@pytest.mark.parametrize("turned", [None, True, False], ids=["as saved", "fan_in_fan_out", "not fan_in_fan_out"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", SQUARE)
def test_an_adapter_has_the_numbers_that_peft_merges(bases, tmp_path, base, method, turned):
    import peft

    kind, options = METHODS[method]
    modules, name = SQUARE[base], "llama" if base == "llama" else "gpt2"
    options = {key: modules if value == "all" and key != "bias" else value for key, value in options.items()}
    saved(bases, name, getattr(peft, kind)(target_modules=modules, **options), tmp_path / "adapter")
    if turned is not None:
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "fan_in_fan_out": turned}))
    expected, own = merged_by_peft(bases, name, tmp_path / "adapter", tmp_path / "merged"), products(bases[0] / name)
    np.testing.assert_allclose(products(tmp_path / "adapter"), expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected - own).max() > 100 * np.abs(products(tmp_path / "adapter") - expected).max()


@pytest.fixture
def adapter(bases, tmp_path):
    import peft

    saved(bases, "llama", peft.LoraConfig(r=4, target_modules=["q_proj"]), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_with_a_model_and_an_adapter_is_refused(bases, adapter):
    for file in (bases[0] / "llama").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    for options in ({}, {"num_heads": 4}):
        with pytest.raises(CheckpointError, match=r"holds an adapter_config\.json: .* or merge the two"):
            products(adapter, **options)
    (adapter / "adapter_config.json").unlink()
    products(adapter)


def test_a_repository_with_a_model_and_an_adapter_is_refused(hub):
    files = {"config.json": b"{}", "model.safetensors": b"x"}
    hub.put("owner/plain", files)
    hub.put("owner/both", {**files, "adapter_config.json": b"{}"})
    refuse_adapter("owner/plain", None, offline=False)
    for offline in (False, True):
        with pytest.raises(CheckpointError, match="owner/both holds an adapter_config"):
            refuse_adapter("owner/both", None, offline=offline)
    refuse_adapter("owner/unknown", None, offline=True)


def test_a_configuration_that_changes_while_it_is_read_is_refused_and_its_sha256_is_told(adapter, monkeypatch):
    path = adapter / "adapter_config.json"
    provenance = attnlens.inspect(adapter, fold="raw").provenance
    assert provenance["adapter_config"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr("attnlens.checkpoints.adapters.open_stored", lambda file: _changing(path, file))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json was replaced, cut or changed while it was read"):
        attnlens.inspect(adapter, fold="raw")


def _changing(path: Path, file: Path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 80}))
    return open_stored(file)


def test_a_folder_of_an_adapter_among_other_files_is_one_model_of_a_scan(adapter):
    save_file(load_file(adapter / "adapter_model.safetensors"), adapter / "optimizer.safetensors")
    assert [Path(job.name) for job in plan_scan([str(adapter)]).jobs] == [adapter]
