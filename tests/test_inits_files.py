"""What `attnlens init` writes: the weights, how they were made, and nothing where it fails."""

import hashlib
import json
import sys

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from attnlens.errors import CheckpointError, ModelNotFoundError, OutputError, ParamsError, UsageError
from attnlens.fit.fit_params import fit_params
from attnlens.inits import create_model, file, init_file
from attnlens.inits.pretrained_folder import build_pretrained, save_pretrained
from attnlens.models.open import EMBEDDED
from attnlens.provenance import run_provenance
from tests.drawn_cases import SIZES, vit

NAME = "vit_tiny_patch16_224"
RECORD = {"init", "seed", "options", "params", "worst_error", "skipped", "versions", "time", "command"}


def written(path):
    """Return the tensors and the metadata of a file."""
    with safe_open(path, "pt") as opened:
        return load_file(path), opened.metadata()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def folder_of(path, **config):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_a_file_holds_the_weights_of_create_model_and_how_to_make_them_again(tmp_path):
    path = tmp_path / "deep" / "w.safetensors"
    report = init_file(
        f"timm/{NAME}.augreg_in21k", path, seed=3, model_args=SIZES, command="attnlens init", beta_qk=0.5
    )
    tensors, metadata = written(path)
    assert same(tensors, create_model(NAME, seed=3, init_options={"beta_qk": 0.5}, **SIZES).state_dict())
    assert metadata.keys() == {"format", "architecture", "model_args", "attnlens"}
    assert (metadata["format"], metadata["architecture"]) == ("pt", NAME)
    assert json.loads(metadata["model_args"]) == SIZES
    record = json.loads(metadata["attnlens"])
    assert record.keys() == RECORD
    assert record["versions"] == run_provenance()["versions"]
    assert {name: record[name] for name in RECORD - {"versions", "time"}} == {
        "init": "mimetic",
        "seed": 3,
        "options": {"beta_qk": 0.5},
        "params": None,
        "worst_error": report.worst_error,
        "skipped": [],
        "command": "attnlens init",
    }
    again = timm.create_model(metadata["architecture"], **json.loads(metadata["model_args"]), checkpoint_path=str(path))
    assert same(again.state_dict(), tensors)


def test_a_file_of_the_networks_own_initialisation_has_no_report(tmp_path):
    path = tmp_path / "w.safetensors"
    assert init_file(NAME, path, init="default", seed=3, model_args=SIZES) is None
    tensors, metadata = written(path)
    assert same(tensors, create_model(NAME, init="default", seed=3, **SIZES).state_dict())
    record = json.loads(metadata["attnlens"])
    assert {name: record[name] for name in ("init", "options", "worst_error", "skipped", "command")} == {
        "init": "default",
        "options": {},
        "worst_error": None,
        "skipped": [],
        "command": None,
    }
    with pytest.raises(UsageError, match=r"^initialiser 'default' has no options$"):
        init_file(NAME, path, init="default", model_args=SIZES, alpha=1)
    assert written(path)[1] == metadata


def test_a_file_names_its_parameters_with_their_hash_and_the_options_that_it_cannot_hold(tmp_path):
    params = tmp_path / "p.json"
    fit_params(vit(9)).save(params)
    record = _record(tmp_path, "fitted", params=params, gains="none")
    assert record["params"] == {"file": "p.json", "sha256": hashlib.sha256(params.read_bytes()).hexdigest()}
    assert record["options"] == {"params": str(params), "gains": "none"}
    record = _record(tmp_path, "transfer-attention", teacher=vit(9))
    assert record["params"] is None
    assert record["options"] == {"teacher": "<VisionTransformer>"}
    record = _record(tmp_path, "impulse", grid=(2, 8))
    assert record["options"] == {"grid": [2, 8]}


def _record(tmp_path, init, **options):
    path = tmp_path / "w.safetensors"
    init_file(NAME, path, init=init, seed=3, model_args={**SIZES, "init_values": 0.3}, **options)
    return json.loads(written(path)[1]["attnlens"])


def test_what_was_left_as_it_was_is_named_in_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    init_file("davit_tiny", path, seed=3, model_args={"depths": (1,), "embed_dims": (24,), "num_heads": (2,)})
    (skipped,) = json.loads(written(path)[1]["attnlens"])["skipped"]
    assert skipped.startswith("stages.0.blocks.0.1.attn ")
    assert skipped.endswith(": is ChannelAttention (channel attention): its product never acts between tokens")


def test_parameters_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    params = tmp_path / "p.json"
    fit_params(vit(9)).save(params)
    draw = file.init_

    def change_and_draw(*given, **more):
        params.write_text(params.read_text() + "\n")
        return draw(*given, **more)

    monkeypatch.setattr(file, "init_", change_and_draw)
    path = tmp_path / "w.safetensors"
    with pytest.raises(ParamsError, match=r"p\.json changed while it was read: run again when nothing writes it$"):
        init_file(NAME, path, init="fitted", model_args=SIZES, params=params)
    assert not path.exists()


def test_parameters_that_are_not_there_are_named(tmp_path):
    with pytest.raises(ParamsError, match=r"^cannot read .*absent\.json: .*No such file"):
        init_file(NAME, tmp_path / "w.safetensors", init="fitted", model_args=SIZES, params=tmp_path / "absent.json")
    assert file.params_record("absent.safetensors") is None
    assert file.params_record(None) is None
    assert file.params_record(7) is None


def test_a_file_of_others_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="was not written by attnlens"):
        init_file(NAME, path, model_args=SIZES)
    assert path.read_bytes() == b"mine"
    init_file(NAME, path, model_args=SIZES, force=True)
    init_file(NAME, path, model_args=SIZES, seed=1)  # its own it writes over
    assert json.loads(written(path)[1]["attnlens"])["seed"] == 1
    for given, reason in ((tmp_path, "is a folder"), (tmp_path / "w.pth", r"ends in \.safetensors")):
        with pytest.raises(UsageError, match=reason):
            init_file(NAME, given, model_args=SIZES)
    teacher = tmp_path / "teacher.json"
    fit_params(vit(9)).save(teacher)
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        init_file(NAME, teacher, init="fitted", model_args=SIZES, params=teacher, force=True)


# What a folder describes.


def test_a_timm_folder_gives_its_architecture_arguments_and_classes(tmp_path):
    arguments = {name: value for name, value in SIZES.items() if name != "num_classes"}
    config = {"architecture": NAME, "num_classes": 3, "model_args": arguments}
    folder = folder_of(tmp_path / "net", **config)
    expected = create_model(NAME, init="default", seed=4, **SIZES).state_dict()
    for given in (str(folder), f"local-dir:{folder}"):
        built = file.build(given, 4, {})
        assert (built.architecture, built.model_args) == (NAME, SIZES)
        assert same(built.module.state_dict(), expected)
    built = file.build(str(folder), 4, {"num_classes": 7, "depth": 1})
    assert built.model_args == {**SIZES, "num_classes": 7, "depth": 1}
    assert built.module.head.out_features == 7
    assert len(built.module.blocks) == 1
    folder_of(folder, architecture=NAME, model_args=arguments)
    assert file.build(str(folder), 4, {}).model_args == arguments
    own = {"num_classes": 5, "input_size": [3, 16, 16]}
    folder_of(folder, architecture=NAME, model_args=arguments, pretrained_cfg=own)  # as timm writes it
    built = file.build(str(folder), 4, {})
    assert (built.architecture, built.model_args) == (NAME, arguments)
    assert built.module.pretrained_cfg["num_classes"] == 5
    config = json.loads((EMBEDDED / "config.json").read_text())
    shipped = file.build(None, 4, {"depth": 2})
    assert shipped.architecture == config["architecture"]
    assert shipped.model_args == {"num_classes": 10, **config["model_args"], "depth": 2}


def test_a_folder_that_describes_nothing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"^cannot read .*config\.json: "):
        file.build(str(tmp_path), 0, {})
    config = tmp_path / "config.json"
    for text, reason in (
        ("{", r"config\.json holds broken JSON \("),
        ("[1]", r"config\.json holds a JSON list where an object is expected$"),
        ("{}", r"config\.json names no architecture$"),
        ('{"architecture": "x", "model_args": 3}', r"model_args of .*config\.json is not an object"),
    ):
        config.write_text(text)
        with pytest.raises((CheckpointError, ModelNotFoundError), match=reason):
            file.build(str(tmp_path), 0, {})


@pytest.mark.parametrize(
    ("text", "whose"),
    [
        ('{"model_type": "vit"}', True),
        ('{"model_type": "vit", "architecture": "vit_tiny_patch16_224"}', False),
        ('{"model_type": 3}', False),
        ("{}", False),
        ('["model_type"]', False),
        ("{", False),
        (None, False),
    ],
)
def test_a_configuration_of_transformers_names_a_type_of_model_and_no_architecture(tmp_path, text, whose):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert file.of_transformers(tmp_path) is whose


# Models of transformers.


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the package transformers is not installed")


TINY = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 11}


@pytest.mark.parametrize(
    ("named", "cls"),
    [(["BertForMaskedLM", "BertModel"], "BertForMaskedLM"), (None, "BertModel"), (["BertTokenizer"], "BertModel"),
     (["no_class_of_it"], "BertModel"), (["AutoModel"], "BertModel")],
)  # fmt: skip
def test_the_class_is_the_first_that_is_named_or_the_bare_model(tmp_path, transformers, named, cls):
    folder = folder_of(tmp_path / "net", model_type="bert", architectures=named, **TINY)
    state = torch.get_rng_state()
    model = build_pretrained(folder, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model) is getattr(transformers, cls)
    torch.manual_seed(5)
    assert same(model.state_dict(), getattr(transformers, cls)(transformers.BertConfig(**TINY)).state_dict())
    assert file.build(str(folder), 5, {})[1:] == ("", {})
    with pytest.raises(UsageError, match=r"goes to timm, and .*net is a model of transformers: edit its"):
        file.build(str(folder), 5, {"depth": 3})


def test_transformers_that_is_missing_is_named(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "net", model_type="bert", **TINY)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelNotFoundError, match=r"net is a model of transformers: pip install transformers$"):
        build_pretrained(folder, 0)


@pytest.mark.usefixtures("transformers")
def test_what_transformers_cannot_build_is_one_line(tmp_path):
    folder = folder_of(tmp_path / "net", **{**TINY, "model_type": "bert", "num_attention_heads": 5})
    with pytest.raises(ModelNotFoundError) as told:
        build_pretrained(folder, 0)
    assert str(told.value).startswith(f"transformers cannot build what {folder}/config.json describes (")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.usefixtures("transformers")
def test_weights_and_configuration_are_written_as_one_set(tmp_path):
    model = build_pretrained(folder_of(tmp_path / "net", model_type="bert", **TINY), 5)
    path = tmp_path / "out" / "model.safetensors"
    save_pretrained(model, path, {"format": "pt", "attnlens": "{}"})
    tensors, metadata = written(path)
    assert metadata == {"format": "pt", "attnlens": "{}"}
    assert same(tensors, dict(model.state_dict()))
    beside = path.parent / "config.json"
    assert json.loads(beside.read_text())["architectures"] == ["BertModel"]
    assert sorted(each.name for each in path.parent.iterdir()) == ["config.json", "model.safetensors"]
    same_config = json.dumps(json.loads(beside.read_text()))  # in another form: it may be what was read
    beside.write_text(same_config)
    save_pretrained(model, path, {"format": "pt"})
    assert written(path)[1] == {"format": "pt"}
    assert beside.read_text() == same_config
    for other in ("{", '{"model_type": "vit"}'):
        beside.write_text(other)
        with pytest.raises(UsageError, match=r"config\.json is there and describes another model: name a file"):
            save_pretrained(model, path, {"format": "np"})
        assert beside.read_text() == other
        assert written(path)[1] == {"format": "pt"}


@pytest.mark.usefixtures("transformers")
def test_where_the_configuration_cannot_be_written_the_old_weights_stay(tmp_path):
    model = build_pretrained(folder_of(tmp_path / "net", model_type="bert", **TINY), 5)
    path = tmp_path / "out" / "model.safetensors"
    save_pretrained(model, path, {"format": "pt"})
    before = path.read_bytes()
    (path.parent / "config.json").unlink()
    (path.parent / "config.json").symlink_to(tmp_path)  # a folder
    with pytest.raises((OutputError, UsageError)):
        save_pretrained(model, path, {"format": "np"})
    assert path.read_bytes() == before
