"""`attnlens init` of a folder of transformers: `from_pretrained` reads what it wrote."""

import json

import pytest
import torch

import attnlens
from attnlens.errors import ModelNotFoundError

transformers = pytest.importorskip("transformers", reason="the package transformers is not installed")

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def settings(kind):
    if kind == "vit":
        return transformers.ViTConfig(
            **SIZES, image_size=8, patch_size=4, num_channels=1, num_labels=10,
            architectures=["ViTForImageClassification"],
        )  # fmt: skip
    if kind == "bert":
        return transformers.BertConfig(**SIZES, vocab_size=31, architectures=["BertForMaskedLM"])
    return transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=1)


@pytest.mark.parametrize(
    ("kind", "cls"), [("vit", "ViTForImageClassification"), ("bert", "BertForMaskedLM"), ("bare", "ViTModel")]
)
def test_from_pretrained_reads_what_init_wrote(run, tmp_path, kind, cls):
    settings(kind).save_pretrained(tmp_path / "model")
    output = tmp_path / "start" / "model.safetensors"
    done = run("init", tmp_path / "model", "--init", "mimetic", "--seed", "3", "-o", output)
    assert done.code == 0, done.err
    assert f"from_pretrained('{tmp_path / 'start'}')" in done.err
    model, told = getattr(transformers, cls).from_pretrained(tmp_path / "start", output_loading_info=True)
    assert not any(told.values())
    torch.manual_seed(3)
    expected = getattr(transformers, cls)(settings(kind))
    attnlens.init_(expected, "mimetic", seed=3)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in expected.state_dict().items())
    betas = attnlens.inspect(model, fold="raw").stats.select(circuit="ov", head="all").column("beta")
    assert betas == pytest.approx([-0.4, -0.4], abs=0.08)


def test_outside_attention_the_weights_are_what_transformers_draws_under_the_seed(run, tmp_path):
    settings("vit").save_pretrained(tmp_path / "model")
    run("init", tmp_path / "model", "--seed", "5", "-o", tmp_path / "start" / "model.safetensors")
    found = transformers.ViTForImageClassification.from_pretrained(tmp_path / "start").state_dict()
    torch.manual_seed(5)
    expected = transformers.ViTForImageClassification(settings("vit")).state_dict()
    assert found.keys() == expected.keys()
    changed = {name for name in found if not torch.equal(found[name], expected[name])}
    assert changed
    assert all("attention" in name for name in changed)
    assert torch.equal(found["classifier.weight"], expected["classifier.weight"])


def test_another_models_configuration_is_not_written_over(run, tmp_path):
    settings("vit").save_pretrained(tmp_path / "model")
    other = tmp_path / "start" / "config.json"
    other.parent.mkdir()
    other.write_text('{"model_type": "bert"}')
    done = run("init", tmp_path / "model", "-o", tmp_path / "start" / "model.safetensors")
    assert done.code == 2
    assert "describes another model: name a file in another folder with --output" in done.err
    assert json.loads(other.read_text()) == {"model_type": "bert"}
    assert not (tmp_path / "start" / "model.safetensors").exists()


def test_a_configuration_that_transformers_does_not_know_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    done = run("init", tmp_path, "-o", tmp_path / "out.safetensors")
    assert done.code == 1
    assert "transformers cannot build what" in done.err
    assert len(done.err.splitlines()) == 1
    with pytest.raises(ModelNotFoundError):
        attnlens.inits.init_file(str(tmp_path), tmp_path / "out.safetensors")


def test_the_configuration_of_the_folder_is_not_replaced(run, tmp_path):
    settings("vit").save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    kept = config.read_text()
    (tmp_path / "out.safetensors").symlink_to(config)
    done = run("init", tmp_path / "model", "-o", tmp_path / "out.safetensors", "--force")
    assert done.code == 2
    assert "is what this command reads" in done.err
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").hardlink_to(config)
    for folder in ("model", "start"):
        assert run("init", tmp_path / "model", "-o", tmp_path / folder / "new.safetensors").code == 0
        assert run("init", tmp_path / "model", "-o", tmp_path / folder / "new.safetensors").code == 0
        assert (tmp_path / folder / "config.json").read_text() == kept
    assert config.samefile(tmp_path / "start" / "config.json")


@pytest.mark.parametrize(
    "stated",
    [
        {"hidden_size": "x"},
        {"hidden_size": 25},
        {"hidden_size": 0},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 10**9},
        {"hidden_act": "unheard_of"},
        {"vocab_size": 99_999_999_999},
        {"vocab_size": 10**30},
        {"architectures": [3]},
    ],
)
def test_a_configuration_that_no_network_can_be_built_from_is_refused_in_one_line(run, tmp_path, stated):
    config = {"model_type": "bert", **SIZES, "vocab_size": 31, "architectures": ["BertForMaskedLM"], **stated}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("init", tmp_path, "-o", tmp_path / "out.safetensors", "-q")
    assert (done.code, len(done.err.splitlines())) == (1, 1), done.err
    assert "config.json" in done.err
    assert "internal error" not in done.err
    assert not (tmp_path / "out.safetensors").exists()
