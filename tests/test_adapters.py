"""Folders of PEFT: whose alpha a layer has, which base an adapter stands on."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import attnlens
from attnlens.checkpoints import open_checkpoint
from attnlens.checkpoints.adapter_config import AdapterConfig
from attnlens.checkpoints.adapters import with_adapter
from attnlens.errors import CheckpointError, ModelNotFoundError

LAYERS = [f"model.layers.{i}.self_attn.{name}" for i in (0, 1, 10) for name in ("q_proj", "k_proj")]

STATED = {"lora_alpha": 8, "r": 2, "target_modules": ["q_proj", "k_proj"]}


def merged(folder, **config):
    """Return, of a base of zeros and an adapter of ones of rank 2, what each layer's weight becomes: 2 alpha / 2."""
    (folder / "adapter").mkdir(exist_ok=True)
    save_file({f"{name}.weight": torch.zeros(3, 3) for name in LAYERS}, folder / "base.safetensors")
    ends = {"lora_A": (2, 3), "lora_B": (3, 2)}
    tensors = {f"base_model.model.{x}.{end}.weight": torch.ones(shape) for x in LAYERS for end, shape in ends.items()}
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({**STATED, **config}))
    found = with_adapter(open_checkpoint(folder / "base.safetensors"), AdapterConfig(folder / "adapter"))
    return [float(found[f"{name}.weight"][0, 0]) for name in LAYERS]


PATTERNS = [
    {"q_proj": 3},
    {"layers.0.self_attn.q_proj": 5, "q_proj": 3},
    {"q_proj": 3, "layers.0.self_attn.q_proj": 5},
    {"^model.layers.0.self_attn.q_proj": 5, "layers.0.self_attn.q_proj": 3},
    {"^layers.0.self_attn.q_proj": 5, "^q_proj": 3},
    {r"layers\.1\.self_attn\.k_proj$": 5, "k_proj$": 2, "k_proj": 3},
    {"roj": 3, "0.self_attn.q_proj": 5},
    {"model.layers.10.self_attn.k_proj": 5, "self_attn": 3},
]


@pytest.mark.parametrize("patterns", PATTERNS, ids=str)
def test_a_layer_has_the_alpha_that_peft_gives_it(tmp_path, patterns):
    pattern_key = pytest.importorskip("peft.utils.other", reason="peft says which: pip install it").get_pattern_key
    expected = [patterns.get(pattern_key(patterns, name), 8) for name in LAYERS]
    assert merged(tmp_path, alpha_pattern=patterns) == expected


def test_of_two_names_of_a_layer_the_first_gives_its_alpha(tmp_path):
    assert merged(tmp_path, alpha_pattern={"layers.0.self_attn.q_proj": 5, "q_proj": 3}) == [5, 8, 3, 8, 3, 8]
    assert merged(tmp_path, alpha_pattern={"q_proj": 3, "layers.0.self_attn.q_proj": 5}) == [3, 8, 3, 8, 3, 8]
    assert merged(tmp_path, alpha_pattern={"^layers.0.self_attn.q_proj": 5}) == [8] * 6


@pytest.mark.parametrize("pattern", [r"layers\.[01]\..*", ".*q_proj", "(a+)+$", "q|k", "", "^", "q_proj.", r"\w"])
def test_an_expression_for_layers_is_refused_by_name_and_not_run(tmp_path, pattern):
    with pytest.raises(CheckpointError, match=r"alpha of the modules .*are not run: merge the adapter"):
        merged(tmp_path, alpha_pattern={"q_proj": 3, pattern: 5})


def test_the_time_for_alphas_does_not_grow_with_layers_times_names(tmp_path, monkeypatch):
    lookups = 0

    class Counted(dict):
        def __contains__(self, key):
            nonlocal lookups
            lookups += 1
            return super().__contains__(key)

        def items(self):
            nonlocal lookups
            lookups += len(self)
            return super().items()

    names = Counted({f"other{i}": 1 for i in range(1000)})
    stated = {**STATED, "alpha_pattern": names}
    monkeypatch.setattr("attnlens.checkpoints.adapter_config.read_json", lambda _: stated)
    assert merged(tmp_path) == [8] * 6
    assert lookups < 1100


@pytest.mark.parametrize("alpha", [10**400, True, "8", None])
def test_an_alpha_that_is_no_number_states_no_scale(tmp_path, alpha):
    with pytest.raises(CheckpointError, match="scale alpha / r is not in the file"):
        merged(tmp_path, lora_alpha=alpha)


@pytest.mark.parametrize("way", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga", "new", [1]])
def test_an_adapter_that_changes_its_base_is_refused_by_name(tmp_path, way):
    with pytest.raises(CheckpointError, match=r"adapter was trained with init_lora_weights .*which changes the base"):
        merged(tmp_path, init_lora_weights=way)


@pytest.mark.parametrize("way", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_that_keeps_its_base_is_merged_into_it(tmp_path, way):
    assert merged(tmp_path, init_lora_weights=way) == [8] * 6


@pytest.mark.parametrize(
    ("way", "kept"), [("gaussian", True), ("orthogonal", True), ("pissa", False), ("olora", False)]
)
def test_peft_changes_the_base_where_it_is_said_to(way, kept):
    peft = pytest.importorskip("peft", reason="peft changes the base: pip install it")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    before = model[0].weight.detach().clone().numpy()
    config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=way)
    after = peft.inject_adapter_in_model(config, model)[0].base_layer.weight.detach().numpy()
    assert np.array_equal(before, after) == kept


METHODS = ["ADALORA", "LILY", "LN_TUNING", "OSF", "PEANUT", "VERA", "new", "lora", ["LORA"]]
VARIANTS = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"svd_rank": None},
    "layer_replication": [[1, 2], [0, 1]],
    "monteclora_config": {"num_samples": 8},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 1},
}


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_method_whose_formula_is_not_known_is_refused_by_name(tmp_path, method):
    with pytest.raises(CheckpointError, match=rf"is a PEFT adapter of {re.escape(str(method))}, which is not merged"):
        merged(tmp_path, peft_type=method)


@pytest.mark.parametrize("option", VARIANTS)
def test_a_lora_that_is_more_than_a_change_of_the_weights_is_refused_by_name(tmp_path, option):
    assert merged(tmp_path, peft_type="LORA", **{option: None}) == [8] * 6
    with pytest.raises(CheckpointError, match=f"is a PEFT adapter of LoRA with {option}, which is not merged"):
        merged(tmp_path, peft_type="LORA", **{option: VARIANTS[option]})


def test_every_variant_of_lora_that_peft_knows_is_merged_or_refused():
    peft = pytest.importorskip("peft", reason="peft says which there are: pip install it")
    known = {x.name for x in dataclasses.fields(peft.LoraConfig) if x.metadata.get("is_lora_variant")}
    assert known - {"use_dora"} <= VARIANTS.keys()


@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_adapter_whose_base_is_an_adapter_is_refused_in_one_line(tmp_path, length):
    for i in range(length):
        (tmp_path / f"{i}").mkdir()
        config = {"base_model_name_or_path": str(tmp_path / f"{(i + 1) % length}")}
        (tmp_path / f"{i}" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="which is an adapter itself: merge that one first"):
        attnlens.inspect(tmp_path / "0")


def test_an_adapter_whose_base_is_called_like_a_scheme_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "local-dir:a"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"base_model_name_or_path": "local-dir:a"}')
    with pytest.raises(ModelNotFoundError, match=r"local-dir:a has no config\.json"):
        attnlens.inspect("a")


@pytest.mark.parametrize(
    "base", ["a" * 300, "x/" * 3000, "x\0y", "", 7], ids=["long", "deep", "null", "empty", "number"]
)
def test_a_base_that_no_file_can_be_called_is_not_there(tmp_path, base):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    with pytest.raises(ModelNotFoundError, match="which is no folder or file here: merge it"):
        attnlens.inspect(tmp_path)
