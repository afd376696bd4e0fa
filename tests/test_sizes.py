"""A named architecture at other sizes, under timm's old names, or with torchvision's: what the shapes show is read."""

import numpy as np
import pytest
import timm
import torch

import attnlens
from attnlens.errors import CheckpointError, ModelNotFoundError, UsageError
from attnlens.layouts import read_heads
from attnlens.models.open import open_model
from attnlens.models.opened import Access
from attnlens.models.renamed import as_timm_names

NAME = "vit_tiny_patch16_224"


def network(name=NAME, seed=0, **sizes):
    torch.manual_seed(seed)
    model = timm.create_model(name, **sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def layers(model, checkpoint=None, **how):
    opened = open_model(model, checkpoint, **how)
    return [read_heads(spec, opened.checkpoint, layer) for layer, spec in opened.architecture.indexed()]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.name == other.name
        assert one.arrays().keys() == other.arrays().keys()
        for name, array in other.arrays().items():
            np.testing.assert_array_equal(one.arrays()[name], array, err_msg=name)


SHOWN = {
    "CIFAR": {"depth": 6, "img_size": 32, "patch_size": 4, "num_classes": 10},
    "deeper": {"depth": 13},
    "registers": {"depth": 3, "reg_tokens": 5, "in_chans": 1, "img_size": 48},
    "no bias": {"depth": 2, "qkv_bias": False, "init_values": 1e-5},
    "no class token": {"depth": 3, "class_token": False, "global_pool": "avg", "img_size": 64},
    "q and k normed": {"depth": 2, "qk_norm": True},
}


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_sizes_that_the_shapes_show_are_not_asked_for(name, prefix):
    model = network(**SHOWN[name])
    state = {prefix + key: value for key, value in model.state_dict().items()}
    same(layers(NAME, state), layers(model))
    sizes = open_model(NAME, state).provenance().get("sizes", "")
    assert all(f"{key}={value}" in sizes for key, value in SHOWN[name].items() if key not in ("num_classes",))


def test_sizes_that_are_given_are_not_looked_for():
    model = network(depth=4, embed_dim=60, num_heads=5)
    with pytest.raises(CheckpointError, match=r"is 60 wide, vit_tiny_patch16_224 192, .*model_args=\{'num_heads': N\}"):
        open_model(NAME, model.state_dict())
    same(layers(NAME, model.state_dict(), model_args={"num_heads": 5}), layers(model))
    given = {"depth": 4, "embed_dim": 60, "num_heads": 5}
    same(layers(NAME, model.state_dict(), model_args=given), layers(model))
    assert "sizes" not in open_model(NAME, model.state_dict(), model_args=given).provenance()


def test_stages_windows_and_heads_of_a_swin_are_shown():
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 1, 2), "embed_dim": 24}
    model = network("swin_tiny_patch4_window7_224", num_heads=(2, 3, 8), **sizes)
    same(layers("swin_tiny_patch4_window7_224", model.state_dict()), layers(model))


def test_fitting_and_verifying_take_the_same_sizes():
    model = network(depth=3, img_size=32, patch_size=4)
    attnlens.init_(model, seed=5)
    state = model.state_dict()
    assert attnlens.fit_params(NAME, checkpoint=state).sources[0].num_layers == 3
    assert attnlens.verify_init(NAME, state, init="mimetic", seed=5).passed
    assert attnlens.compose(NAME, state, model_args={"depth": 3}).heads


def test_a_file_of_another_architecture_is_not_resized_to_fit():
    beit = network("beit_base_patch16_224", depth=2).state_dict()  # biases q_bias and v_bias, and tables
    with pytest.raises(CheckpointError, match="the weights are not of vit_base_patch16_224"):
        open_model("vit_base_patch16_224", beit)
    more = network(depth=3).state_dict()
    more["blocks.1.attn.gate.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match="the weights are not of vit_tiny_patch16_224"):
        open_model(NAME, more)


def test_layers_a_named_architecture_does_not_have_are_never_left_out_in_silence():
    model = network(depth=14)
    state = model.state_dict()
    assert len(layers(NAME, state)) == 14
    with pytest.raises(CheckpointError, match=r"blocks.13.attn.qkv.weight is of a layer it does not have"):
        open_model(NAME, state, model_args={"depth": 13})


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"depht": 3}, ModelNotFoundError, "cannot build vit_tiny_patch16_224 with model_args"),
        ({"depth": 10**9}, ModelNotFoundError, "at most 65536 is read"),
        ({"pretrained": True}, ModelNotFoundError, "names pretrained, which is no size"),
    ],
)
def test_arguments_that_build_nothing_are_refused_in_one_line(given, error, text):
    with pytest.raises(error, match=text) as caught:
        open_model(NAME, network(depth=1).state_dict(), model_args=given)
    assert "\n" not in str(caught.value)


def test_arguments_for_what_is_not_timms_are_refused():
    with pytest.raises(UsageError, match="model_args is for architectures of timm"):
        open_model(network(depth=1), None, model_args={"depth": 1})


RENAMED = {
    "vit_base_patch16_224_dino": "vit_base_patch16_224.dino",
    "vit_base_patch16_224_in21k": "vit_base_patch16_224.augreg_in21k",
    "swin_base_patch4_window7_224_in22k": "swin_base_patch4_window7_224.ms_in22k",
}


@pytest.mark.parametrize("old", RENAMED)
def test_a_name_timm_changed_stands_for_the_weights_it_meant(old):
    with pytest.raises(ModelNotFoundError, match=RENAMED[old]):  # the hub is not asked in tests
        open_model(old, None, access=Access(offline=True))


def test_a_changed_name_names_the_architecture_of_a_file():
    model = network("swin_tiny_patch4_window7_224")
    same(layers("swin_tiny_patch4_window7_224", model.state_dict()), layers(model))


def test_torchvisions_vit_under_timms_name_is_the_network_timm_would_run():
    torchvision = pytest.importorskip("torchvision", reason="torchvision's files are read here: pip install it")
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 3, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    theirs = filled(torchvision.models.VisionTransformer(**sizes, num_classes=7))
    state = theirs.state_dict()
    opened = open_model(NAME, state)
    assert opened.provenance()["converted"] == "from torchvision's names to timm's"
    ours = timm.create_model(NAME, depth=3, img_size=32, patch_size=8, num_classes=7).eval()
    ours.load_state_dict({name: opened.checkpoint[name] for name in opened.checkpoint})
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
    same(layers(NAME, state), layers(ours))


@pytest.mark.parametrize(
    ("builder", "name"), [("swin_t", "swin_tiny_patch4_window7_224"), ("swin_v2_t", "swinv2_tiny_window8_256")]
)
def test_torchvisions_swin_under_timms_name_is_the_network_timm_would_run(builder, name):
    torchvision = pytest.importorskip("torchvision", reason="torchvision's files are read here: pip install it")
    theirs = filled(getattr(torchvision.models, builder)(num_classes=7))
    opened = open_model(name, theirs.state_dict())
    ours = timm.create_model(name, num_classes=7).eval()
    renamed = as_timm_names(opened.checkpoint) or opened.checkpoint
    held = {key: renamed[key] for key in renamed if "relative_" not in key or key.endswith("bias_table")}
    missing, _ = ours.load_state_dict(held, strict=False)
    assert not [key for key in missing if "relative_" not in key and "k_bias" not in key]
    x = torch.randn(1, 3, 256 if "v2" in builder else 224, 256 if "v2" in builder else 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
    same(layers(name, theirs.state_dict()), layers(ours))


def filled(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def test_every_command_that_takes_a_model_takes_its_arguments(run, tmp_path):
    file = tmp_path / "own.pth"
    torch.save(network(depth=2, embed_dim=60, num_heads=5, img_size=32, patch_size=4).state_dict(), file)
    given = [NAME, "--checkpoint", str(file)]
    code, _, said = run("inspect", *given)
    assert code == 1
    assert "add --model-arg num_heads=N" in said
    commands = {
        "inspect": ("-o", str(tmp_path / "figures")),
        "fit-params": ("-o", str(tmp_path / "params.json"), "--figures", str(tmp_path / "figures")),
        "compose": ("-o", str(tmp_path / "figures")),
        "report": ("-o", str(tmp_path / "report.html")),
    }
    for command, output in commands.items():
        code, _, said = run(command, *given, "--model-arg", "num_heads=5", *output)
        assert code == 0, said
        if command == "inspect":
            assert "sizes shown by the shapes: depth=2, embed_dim=60, patch_size=4, img_size=32" in said
    code, out, said = run("verify-init", *given, "--model-arg", "num_heads=5", "--init", "mimetic")
    assert (code, "FAILED: 0 of" in out + said) == (1, True)  # read, and no mimetic network
    code, _, said = run("inspect", *given, "--model-arg", "num_heads")
    assert code == 2
    assert "give name=value" in said
