"""transformers folders without transformers: prefixes, shards, omitted fields, and refusals in one line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import attnlens
from attnlens.errors import CheckpointError, ModelNotFoundError
from attnlens.layouts import read_heads
from attnlens.layouts.flags import FLAGS
from attnlens.models.open import open_model
from attnlens.models.transformers.describe import families

FILE = "model.safetensors"
BERT = {"model_type": "bert", "hidden_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 6, "n_layer": 2, "n_head": 2}


def bert(prefix="", gain="weight"):
    """Make the tensors of a two-layer BERT; norms hold their place in the network as their value."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{prefix}embeddings.LayerNorm.{gain}": torch.full((6,), 10.0)}
    for layer in range(2):
        head = f"{prefix}encoder.layer.{layer}."
        for name in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"):
            tensors[f"{head}{name}.weight"] = torch.randn(6, 6, generator=generator)
            tensors[f"{head}{name}.bias"] = torch.randn(6, generator=generator)
        tensors[f"{head}output.LayerNorm.{gain}"] = torch.full((6,), 11.0 + layer)
        tensors[f"{head}attention.output.LayerNorm.{gain}"] = torch.full((6,), 99.0)
    return tensors


def gpt2(prefix=""):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "attn.c_attn.weight": (6, 18),
        "attn.c_attn.bias": (18,),
        "attn.c_proj.weight": (6, 6),
        "ln_1.weight": (6,),
    }
    return {
        f"{prefix}h.{layer}.{name}": torch.randn(shape, generator=generator)
        for layer in range(2)
        for name, shape in shapes.items()
    }


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_shards(folder, config, tensors, names=None):
    """Write one shard a tensor, and an index that names them ``names`` (by default what they are called)."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    places = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        places[name] = f"model-{number:05}.safetensors"
        save_file({name: tensor}, folder / places[name])
    index = {"metadata": {}, "weight_map": {**places, **(names or {})}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder):
    opened = open_model(folder, None)
    return [read_heads(spec, opened.checkpoint, layer) for layer, spec in opened.architecture.indexed()]


def one_line(folder, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        open_model(folder, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "bert.", "model.encoder_q.bert."])
@pytest.mark.parametrize("gain", ["weight", "gamma"])
def test_bert_is_found_below_any_prefix_and_with_either_name_of_a_gain(tmp_path, prefix, gain):
    first, second = read(write(tmp_path, BERT, bert(prefix, gain)))
    plain = read(write(tmp_path / "plain", BERT, bert()))
    np.testing.assert_array_equal(second.W_K, plain[1].W_K)
    assert first.name == f"{prefix}encoder.layer.0.attention"
    assert [set(heads.norm_gain) for heads in (first, second)] == [{10.0}, {11.0}]
    assert first.norm_centres


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_is_found_below_any_prefix(tmp_path, prefix):
    heads = read(write(tmp_path, GPT2, gpt2(prefix)))[1]
    stored = gpt2()["h.1.attn.c_attn.weight"].double().numpy()
    np.testing.assert_array_equal(heads.W_V[1], stored[:, 15:])


def test_a_model_stored_twice_is_refused_with_both_places(tmp_path):
    message = one_line(write(tmp_path, BERT, bert("question.") | bert("context.")))
    assert "'context.' and 'question.'" in message


def test_fields_a_configuration_leaves_out_stand_for_the_defaults_of_its_class(tmp_path):
    """SigLIP's own configurations name neither width nor heads; CLIP's text tower is the narrower one."""
    tensors = {}
    for tower, width in (("vision", 768), ("text", 512)):
        head = f"{tower}_model.encoder.layers.0."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors[f"{head}self_attn.{name}.weight"] = torch.zeros(width, width, dtype=torch.float8_e4m3fn)
        tensors[f"{head}layer_norm1.weight"] = torch.ones(width)
    sections = {"vision_config": {"num_hidden_layers": 1}, "text_config": {"num_hidden_layers": 1, "head_dim": None}}
    vision, text = open_model(write(tmp_path, {"model_type": "clip", **sections}, tensors), None).architecture.specs
    assert (vision.path, text.path) == (
        "vision_model.encoder.layers.0.self_attn",
        "text_model.encoder.layers.0.self_attn",
    )
    assert [(spec.q.heads, spec.q.width) for spec in (vision, text)] == [(12, 64), (8, 64)]
    assert ["causal" in spec.leaves_out for spec in (vision, text)] == [False, True]


def test_a_layer_the_configuration_counts_and_the_file_lacks_is_named(tmp_path):
    message = one_line(write(tmp_path, {**BERT, "num_hidden_layers": 3}, bert()))
    assert "encoder.layer.2.attention.self.query.weight is missing" in message


def test_a_layer_beyond_the_configurations_count_is_listed_as_not_read(tmp_path):
    opened = open_model(write(tmp_path, {**BERT, "num_hidden_layers": 1}, bert()), None)
    assert [refusal.path for refusal in opened.architecture.refused] == ["encoder.layer.1.attention"]


def test_attention_beside_the_described_stack_is_listed_as_not_read(tmp_path):
    cross = {
        name.replace("attention.", "crossattention."): value
        for name, value in bert().items()
        if ".0.attention." in name
    }
    opened = open_model(write(tmp_path, BERT, bert() | cross), None)
    (refusal,) = opened.architecture.refused
    assert refusal.path == "encoder.layer.0.crossattention"
    assert "not covered by the description of bert" in refusal.reason
    assert len(opened.architecture.specs) == 2


def test_a_missing_tensor_is_named(tmp_path):
    tensors = bert()
    del tensors["encoder.layer.1.attention.self.key.bias"]
    assert "encoder.layer.1.attention.self.key.bias is missing" in one_line(write(tmp_path, BERT, tensors))


def test_weights_of_another_family_are_refused_by_the_name_that_is_missing(tmp_path):
    message = one_line(write(tmp_path, BERT, gpt2()))
    assert "not of a bert" in message
    assert "encoder.layer.0.attention.self.query.weight is missing" in message


def test_a_configuration_of_another_width_is_told_by_the_shapes(tmp_path):
    message = one_line(write(tmp_path, {**BERT, "hidden_size": 8}, bert()))
    assert "encoder.layer.0.attention.self.query.weight is (6, 6), not (8, 8)" in message


def test_an_unknown_model_type_lists_the_known_ones(tmp_path):
    message = one_line(write(tmp_path, {**BERT, "model_type": "funnel"}, bert()), ModelNotFoundError)
    assert "model_type 'funnel', which is not known: give the weight file and num_heads" in message
    assert ". Known are audio-spectrogram-transformer, bart, beit, bert, " in message


@pytest.mark.parametrize("value", [None, 0, "12", True])
def test_a_configuration_without_a_usable_head_count_is_refused(tmp_path, value):
    message = one_line(write(tmp_path, {**BERT, "num_attention_heads": value}, bert()), ModelNotFoundError)
    assert "num_attention_heads in" in message


def test_quantised_weights_are_refused(tmp_path):
    config = {**BERT, "quantization_config": {"quant_method": "fp8"}}
    assert "the weights are quantised" in one_line(write(tmp_path, config, bert()))


def test_a_config_of_neither_library_says_what_to_pass(tmp_path):
    assert "no architecture of timm and no model_type" in one_line(
        write(tmp_path, {"a": 1}, bert()), ModelNotFoundError
    )


def test_num_heads_reads_a_folder_of_an_unknown_model_type_by_names(tmp_path):
    opened = open_model(write(tmp_path, {"model_type": "funnel"}, bert()), None, 2)
    assert {spec.family for spec in opened.architecture.specs} == {"guessed"}


def test_shards_are_one_checkpoint(tmp_path):
    whole, shards = read(write(tmp_path / "one", BERT, bert())), read(write_shards(tmp_path / "many", BERT, bert()))
    for found, expected in zip(shards, whole, strict=True):
        for name, array in expected.arrays().items():
            np.testing.assert_array_equal(found.arrays()[name], array)


def test_an_index_is_opened_by_its_own_name(tmp_path):
    folder = write_shards(tmp_path, BERT, bert())
    assert open_model(folder / "model.safetensors.index.json", None).architecture.name == "bert"


NAME = "encoder.layer.0.attention.self.query.weight"


OUTSIDE = (
    "../evil.safetensors",
    "/evil.safetensors",
    "a/../../evil.safetensors",
    "..\\evil.safetensors",
    "C:\\evil.bin",
)


@pytest.mark.parametrize("shard", [*OUTSIDE, "model.safetensors.index.json", "evil.pickle"])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, shard):
    folder = write_shards(tmp_path / "model", BERT, bert(), {NAME: shard})
    save_file({NAME: torch.zeros(6, 6)}, tmp_path / "evil.safetensors")
    message = one_line(folder)
    assert "as a shard: refused" in message


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = write_shards(tmp_path / "model", BERT, bert(), {NAME: "linked.safetensors"})
    save_file({NAME: torch.zeros(6, 6)}, tmp_path / "evil.safetensors")
    (folder / "linked.safetensors").symlink_to(tmp_path / "evil.safetensors")
    assert "is a link that leaves" in one_line(folder)


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    write_shards(snapshot, BERT, bert())
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for path in [*snapshot.glob("*.safetensors"), snapshot / "model.safetensors.index.json"]:
        path.rename(blobs / path.name)
        path.symlink_to(os.path.relpath(blobs / path.name, snapshot))
    assert len(read(snapshot)) == 2


def test_an_absent_shard_is_told_in_one_line(tmp_path):
    folder = write_shards(tmp_path, BERT, bert())
    (folder / "model-00003.safetensors").unlink()
    assert "model-00003.safetensors is not beside it: download the missing shards" in one_line(folder)


def test_a_shard_that_lacks_what_the_index_says_is_told(tmp_path):
    folder = write_shards(tmp_path, BERT, bert(), {NAME: "model-00003.safetensors"})
    assert f"says that model-00003.safetensors holds {NAME}, and it does not" in one_line(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}', "\udcff"])
def test_a_broken_index_is_told_in_one_line(tmp_path, text):
    folder = write_shards(tmp_path, BERT, bert())
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert "index" in one_line(folder)


def test_reading_a_transformers_folder_imports_neither_torch_nor_transformers(tmp_path):
    write(tmp_path, BERT, bert())
    code = (
        "import sys, attnlens; found = attnlens.inspect(sys.argv[1]); print(len(found.layers), "
        "[name for name in ('torch', 'timm', 'transformers') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "2 []"


def test_post_norm_is_said_in_words(tmp_path):
    found = attnlens.inspect(write(tmp_path, BERT, bert()))
    assert any(text.startswith("post-norm: the gain folded in") for text in found.left_out())


def test_every_family_names_only_known_flags():
    for family in families().values():
        for stack in family.stacks:
            named = {*stack.flags, *stack.flags_set.values(), *stack.flags_unset.values(), *stack.flags_stored.values()}
            assert named <= set(FLAGS), family.name


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "num_hidden_layers", "head_dim"])
@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "gemma2", "vit", "clip"])
def test_numbers_beyond_all_sizes_are_refused_by_their_field(model_type, name, tmp_path):
    stack = families()[model_type].stacks[0]
    prefix, head = f"{stack.within}", {"layer": 0, "before": 0, "last": 0}
    save_file(
        {prefix + one.format(**head): torch.ones(6, 6) for one in {*stack.projections().values()}}, tmp_path / FILE
    )
    depth = stack.depth if isinstance(stack.depth, str) else stack.depth[0]
    given = {stack.width: 6, stack.heads: 2, depth: 1}
    field = {"hidden_size": stack.width, "num_attention_heads": stack.heads, "num_hidden_layers": depth}.get(name, name)
    sizes = {**given, field: 10**4299}
    config = {"model_type": model_type, **({stack.section: sizes} if stack.section else sizes)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelNotFoundError, match=rf"{field} in .* is 1000.* where a number from 1 to 2147483647 is"):
        attnlens.inspect(tmp_path)
