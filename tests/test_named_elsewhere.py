"""A model folder's config.json describes sizes: what it names besides is neither read nor fetched nor run."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import attnlens
from attnlens.errors import CheckpointError, ModelNotFoundError, UsageError
from attnlens.inits import file
from attnlens.models.weights import weights_in

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 8,
}
OPENED: list[str] = []


def _note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo") or (event == "open" and "SECRET" in str(arguments[0])):
        OPENED.append(f"{event} {arguments[:2]}")


sys.addaudithook(_note)


def described(folder, data):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    return str(folder)


transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")

NAMED = {
    "timm_wrapper": {
        "model_type": "llava",
        "text_config": LLAMA,
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": "vit_tiny_patch16_224",
            "model_args": {"checkpoint_path": "SECRET"},
        },
    },
    "timm_backbone": {"model_type": "detr", "backbone_config": {"model_type": "timm_backbone"}},
    "backbone": {"model_type": "detr", "use_timm_backbone": False, "backbone": "somebody/SECRET"},
    "use_pretrained_backbone": {"model_type": "dpt", "is_hybrid": True, "use_pretrained_backbone": True},
    "quantization_config": {**LLAMA, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
}


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("deep", [False, True])
def test_a_network_is_not_drawn_of_what_its_configuration_names_elsewhere(tmp_path, name, deep):
    data = {"model_type": "llava", "text_config": LLAMA, "more": [NAMED[name]]} if deep else NAMED[name]
    folder = described(tmp_path / "model", data)
    OPENED.clear()
    with pytest.raises(ModelNotFoundError, match=rf"config\.json (names|holds a) {name}"):
        file.build(folder, 0, {})
    assert not OPENED


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation", "auto_map"])
@pytest.mark.parametrize("deep", [False, True])
def test_how_a_network_is_computed_is_not_taken_from_its_configuration(tmp_path, key, deep):
    stated = {key: {"AutoConfig": "code.Config"} if key == "auto_map" else "somebody/SECRET"}
    inner = {**LLAMA, **stated}
    plain, data = ({"model_type": "llava", "text_config": one} if deep else one for one in (LLAMA, inner))
    OPENED.clear()
    drawn = file.build(described(tmp_path / "model", data), 3, {}).module
    assert not OPENED
    assert "SECRET" not in drawn.config.to_json_string()
    expected = file.build(described(tmp_path / "plain", plain), 3, {}).module.state_dict()
    assert all((value == expected[name]).all() for name, value in drawn.state_dict().items())


def test_a_class_of_another_configuration_is_not_built(tmp_path):
    drawn = file.build(described(tmp_path / "model", {**LLAMA, "architectures": ["TimmWrapperModel"]}), 0, {}).module
    assert type(drawn) is transformers.LlamaModel


@pytest.mark.parametrize("name", ["hf-hub:somebody/SECRET", "local-dir:/SECRET"])
def test_an_architecture_is_no_model_elsewhere(tmp_path, name):
    OPENED.clear()
    with pytest.raises(ModelNotFoundError, match=r"a model elsewhere: name an architecture$"):
        file.build(described(tmp_path / "model", {"architecture": name}), 0, {})
    assert not OPENED


def test_a_network_to_be_drawn_costs_no_more_than_one_that_is_read(tmp_path):
    folder = described(tmp_path / "model", {"architecture": "beit_base_patch16_224", "model_args": {"img_size": 65536}})
    with pytest.raises(ModelNotFoundError, match=r"cannot build|takes|is a model of"):
        file.build(folder, 0, {})


@pytest.mark.parametrize("data", [LLAMA, {"architecture": "vit_tiny_patch16_224"}])
def test_a_configuration_behind_a_link_that_leaves_its_folder_is_not_built(run, tmp_path, data):
    described(tmp_path / "outside", data)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to("../outside/config.json")
    for command in (("init", "model", "-o", "new/w.safetensors"), ("signal", "model", "-o", "new")):
        done = run(*command)
        assert done.code == 1
        assert "is a link that leaves" in done.err
    assert not (tmp_path / "new").exists()


def test_a_configuration_is_not_written_through_a_link_to_nothing(run, tmp_path):
    described(tmp_path / "model", LLAMA)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.json").symlink_to("../elsewhere/config.json")
    done = run("init", "model", "-o", "new/w.safetensors")
    assert done.code == 2
    assert "config.json is there and describes another model" in done.err
    assert not (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "new" / "w.safetensors").exists()


def test_a_configuration_that_names_its_weights_is_not_read_with_others(tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**LLAMA))
    model.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**data, "transformers_weights": "other.safetensors"}))
    with pytest.raises(CheckpointError, match=r"says that the weights are in other\.safetensors: give that file"):
        attnlens.inspect(str(tmp_path))
    told = attnlens.inspect(str(tmp_path), checkpoint=tmp_path / "model.safetensors")
    assert len(told.stats) > 0


def test_of_several_weights_of_a_folder_those_are_read_that_timm_takes(tmp_path):
    preferred = pytest.importorskip("timm.models._hub")._PREFERRED_FILES
    for name in reversed(preferred):
        (tmp_path / name).touch()
        assert weights_in(tmp_path).name == name


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**LLAMA))
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    first, *_, last = sorted(set(index.values()))
    assert first != last
    twice = next(name for name, shard in index.items() if shard == first and "q_proj" in name)
    whole = attnlens.inspect(str(tmp_path), fold="raw")
    held = load_file(tmp_path / last)
    save_file({**held, twice: np.zeros_like(load_file(tmp_path / first)[twice])}, tmp_path / last)
    with pytest.raises(CheckpointError, match=rf"{last} holds {twice}, which .* says is in {first}"):
        attnlens.inspect(str(tmp_path), fold="raw")
    save_file(held, tmp_path / last)
    again = attnlens.inspect(str(tmp_path), fold="raw")
    assert (again.stats.column("alpha") == whole.stats.column("alpha")).all()


def test_a_configuration_that_brings_its_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what transformers asks on a terminal
    described(tmp_path, {"model_type": "new", "auto_map": {"AutoConfig": "new.Config", "AutoModel": "new.Model"}})
    (tmp_path / "new.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    with pytest.raises(ModelNotFoundError, match=r"transformers cannot build what .* describes"):
        file.build(str(tmp_path), 0, {})
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "stated",
    [
        {"model_args": {"depth": "x"}},
        {"model_args": {"embed_dim": 65536, "num_heads": 4, "depth": 100}},
        {"pretrained_cfg": {"num_classes": 10**11, "input_size": [3, 224, 224]}},
        {"pretrained_cfg": {"num_classes": "x", "input_size": "y"}},
    ],
)
def test_a_network_that_cannot_be_drawn_is_told_in_a_line(tmp_path, stated):
    folder = described(tmp_path / "model", {"architecture": "vit_tiny_patch16_224", **stated})
    with pytest.raises(ModelNotFoundError, match=r"cannot build|more than|is a model of"):
        file.build(folder, 0, {})


@pytest.fixture
def written(tmp_path):
    """Write a small network, and return a function that writes it again with another record of itself."""
    file.init_file("vit_tiny_patch16_224", tmp_path / "own.safetensors", model_args={"depth": 1, "num_classes": 0})
    weights = load_file(tmp_path / "own.safetensors")
    about = {"architecture": "vit_tiny_patch16_224", "model_args": '{"depth": 1, "num_classes": 0}'}

    def write(record):
        text = record if isinstance(record, str) else json.dumps(record)
        save_file(weights, tmp_path / "w.safetensors", {**about, file.METADATA_KEY: text})
        return tmp_path / "w.safetensors"

    return write


RECORD = {"init": "mimetic", "seed": 0, "options": {}, "params": None}


@pytest.mark.parametrize(
    ("init", "options"),
    [
        ("transfer-attention", {"teacher": "somebody/SECRET"}),
        ("transfer-attention", {"teacher": "/SECRET.safetensors"}),
        ("transfer-filters", {"teacher": "embedded", "checkpoint": "/SECRET.safetensors"}),
        ("weight-selection", {"teacher": ["SECRET"]}),
        ("norm-matched", {"of": "transfer-attention", "teacher": "/SECRET.safetensors"}),
        ("fitted", {"params": "/SECRET.json"}),
        ("conv-covariance", {"params": "/SECRET.json"}),
    ],
)
def test_a_file_that_is_verified_has_nothing_read_that_it_names(written, init, options):
    path = written({**RECORD, "init": init, "options": options})
    OPENED.clear()
    with pytest.raises(UsageError, match=r"the file was made with .*: pass that option again$"):
        attnlens.verify_init(None, path)
    assert not OPENED


@pytest.mark.parametrize(
    "record",
    [
        "x",
        "[" * 100_000,
        "{}",
        [],
        {**RECORD, "options": []},
        {**RECORD, "init": 3},
        {**RECORD, "seed": "0"},
        {**RECORD, "params": {"sha256": 5}},
        {**RECORD, "params": []},
    ],
)
def test_a_record_that_init_does_not_write_is_refused(written, record):
    with pytest.raises(UsageError, match="is no record of attnlens"):
        attnlens.verify_init(None, written(record))


def test_a_number_beyond_float64_is_no_option(written):
    with pytest.raises(UsageError, match="pass a finite number"):
        attnlens.verify_init(None, written({**RECORD, "options": {"alpha_qk": 10**400}}))


def test_init_says_how_to_verify_what_was_made_of_other_files(run):
    assert run("init", "vit_tiny_patch16_224", "--model-arg", "depth=1", "-o", "teacher.safetensors").code == 0
    made = ("--init", "transfer-attention", "--option", "teacher=teacher.safetensors")
    done = run("init", "vit_tiny_patch16_224", "--model-arg", "depth=1", *made, "-o", "w.safetensors")
    assert done.code == 0, done.err
    told = done.err.partition("to check it: attnlens ")[2].split()
    assert told == ["verify-init", "--checkpoint", "w.safetensors", "--option", "teacher=teacher.safetensors"]
    assert run(*told).code == 0
    assert run(*told[:3]).code == 2
