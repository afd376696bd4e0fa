"""What training leaves behind, with its right values: several networks, wrappers, formats, folders."""

import argparse
import collections
import pathlib
import re
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import attnlens
from attnlens.checkpoints import open_checkpoint
from attnlens.errors import AttnlensError, CheckpointError, UsageError
from attnlens.training.networks.vit import ARCHITECTURE
from tests.checkpoint_files import TINY, alphas, plain_alphas, prefixed, saved, state, vit
from tests.training_setup import SHAPE


@pytest.fixture
def plain(tmp_path):
    """Return what files of the two networks alone give."""
    return plain_alphas(tmp_path)


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
