"""Inspecting: live modules, names, files and folders give the same numbers; what does not fit is told by name."""

import json

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model

import attnlens
from attnlens.errors import CheckpointError, ModelNotFoundError, UnsupportedAttentionError, UsageError
from attnlens.models.open import EMBEDDED

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 39, "depth": 3, "num_heads": 3, "num_classes": 5}


def small_vit(seed=0, **more):
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **more})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def folder(tmp_path):
    """Return a timm model folder: config.json and weights."""
    model = small_vit(init_values=0.1)
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {**SMALL, "init_values": 0.1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_model(model, tmp_path / "model.safetensors")
    return tmp_path, model


def dense_sum(model, layer, effective):
    """Form a layer's W_V W_proj from timm's own parameters, LayerNorm gain and LayerScale folded in."""
    attn, d = model.blocks[layer].attn, 39
    value = attn.qkv.weight[2 * d :].detach().double().numpy().T
    product = value @ attn.proj.weight.detach().double().numpy().T
    if effective:
        gain, scale = model.blocks[layer].norm1.weight, model.blocks[layer].ls1.gamma
        product = gain.detach().double().numpy()[:, None] * product * scale.detach().double().numpy()
    return product


def test_a_live_module_gives_the_statistics_of_its_own_weights():
    model = small_vit(init_values=0.1)
    found = attnlens.inspect(model)
    for fold in ("raw", "effective"):
        betas = found.stats.select(circuit="ov", head="all", fold=fold).column("beta")
        expected = [np.trace(dense_sum(model, layer, fold == "effective")) / 39 for layer in range(3)]
        np.testing.assert_allclose(betas, expected, rtol=1e-9)


def test_a_live_module_is_left_as_it_was():
    model = small_vit()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attnlens.inspect(model)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.blocks[0].attn._forward_hooks


def test_folder_file_and_live_module_agree(folder):
    path, model = folder
    live = attnlens.inspect(model).stats
    for named in (path, f"local-dir:{path}", path / "model.safetensors"):
        np.testing.assert_array_equal(attnlens.inspect(named).stats.column("alpha"), live.column("alpha"))


def test_a_pickled_checkpoint_gives_the_same_numbers(folder):
    path, model = folder
    torch.save({"state_dict": model.state_dict()}, path / "weights.pth")
    found = attnlens.inspect(path, path / "weights.pth")
    np.testing.assert_array_equal(found.stats.column("beta"), attnlens.inspect(model).stats.column("beta"))


def test_circuits_are_those_of_the_network(folder):
    path, model = folder
    found = attnlens.inspect(path)
    for fold in ("raw", "effective"):
        whole = found.circuits(1, "all", circuit="ov", fold=fold).dense()
        np.testing.assert_allclose(whole, dense_sum(model, 1, fold == "effective"), atol=1e-12)
    q, k, _ = model.blocks[2].attn.qkv.weight.detach().double().numpy().reshape(3, 3, 13, 39)
    np.testing.assert_allclose(found.circuits(2, 1).dense(), q[1].T @ k[1], atol=1e-12)
    assert found.circuits(0).shape == (3, 39, 39)


def test_corners_are_cut_from_the_whole_products(folder):
    found = attnlens.inspect(folder[0])
    corners, shapes = found.corners("effective", 7).of("ov")
    np.testing.assert_allclose(corners[1]["all"], dense_sum(folder[1], 1, True)[:7, :7], atol=1e-12)
    assert list(corners[2]) == [0, 1, 2, "all"]
    assert shapes == dict.fromkeys(range(3), (39, 39))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: i.circuits(9), "layer 9 was not read: choose from \\[0, 1, 2\\]"),
        (lambda i: i.circuits(0, 3), "head 3 of layer 0 does not exist: choose 0 to 2"),
        (lambda i: i.circuits(0, "all"), "only OV products are summed"),
    ],
)
def test_a_circuit_that_does_not_exist_is_named(folder, call, message):
    with pytest.raises(UsageError, match=message):
        call(attnlens.inspect(folder[0]))


def test_only_the_layers_asked_for_are_read(folder):
    found = attnlens.inspect(folder[0], layers=[2])
    assert found.layers == (2,)
    with pytest.raises(UsageError, match=r"layer 3 of .* choose from \[0, 1, 2\]"):
        attnlens.inspect(folder[0], layers=[3])


def test_layer_spectra_fill_the_sums_eigenvalue_statistics(folder):
    lean = attnlens.inspect(folder[0]).stats.select(head="all")
    whole = attnlens.inspect(folder[0], layer_spectra=True).stats.select(head="all")
    assert np.isnan(lean.column("copying_score")).all()
    eigenvalues = np.linalg.eigvals(dense_sum(folder[1], 0, False))
    expected = eigenvalues.real.sum() / np.abs(eigenvalues).sum()
    assert whole.select(layer=0, fold="raw").column("copying_score") == pytest.approx([expected])


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ModelNotFoundError, match=r"'vit_bas_patch16_224': did you mean vit_base_patch16_224"):
        attnlens.inspect("vit_bas_patch16_224")


def test_an_unknown_tag_lists_the_known_ones():
    with pytest.raises(ModelNotFoundError, match=r"no pretrained tag 'nope': timm knows augreg"):
        attnlens.inspect("vit_base_patch16_224.nope")


def test_weights_of_another_architecture_are_named_by_their_first_mismatch(folder):
    message = r"not of vit_tiny_patch16_224: blocks\.0\.attn\.qkv\.weight is \(117, 39\)"
    with pytest.raises(CheckpointError, match=message):
        attnlens.inspect("vit_tiny_patch16_224", folder[0] / "model.safetensors")


def test_a_file_that_lacks_a_layer_names_the_missing_tensors(folder):
    path, model = folder
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.1.attn")}
    save_file(weights, path / "less.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.qkv\.weight is missing"):
        attnlens.inspect(path, path / "less.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_weights_name_their_tensor(folder, value):
    path, model = folder
    with torch.no_grad():
        model.blocks[1].attn.proj.weight[3, 4] = value
    save_model(model, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.proj\.weight holds 1 NaN or Inf"):
        attnlens.inspect(path)


def test_a_file_whose_card_describes_its_architecture_is_read_by_the_configuration_beside_it(tmp_path):
    shipped = EMBEDDED / "model.safetensors"
    with safe_open(shipped, "np") as file:
        assert " with " in file.metadata()["architecture"]  # a sentence, and no name of timm's
    for given in ((shipped,), (None, shipped)):
        seen = attnlens.inspect(*given)
        assert seen.opened.architecture.name == "vit_tiny_patch16_224"
        assert len(seen.layers) == 6
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(shipped.read_bytes())
    with pytest.raises(ModelNotFoundError, match="no architecture named 'vit_tiny_patch16_224 with"):
        attnlens.inspect(alone)


def test_a_file_that_names_no_architecture_says_how_to_name_it(tmp_path):
    save_model(small_vit(), tmp_path / "alone.safetensors")
    with pytest.raises((UsageError, CheckpointError), match=r"name it, as model with checkpoint="):
        attnlens.inspect(tmp_path / "alone.safetensors")


def test_channel_attention_is_refused_by_name_unless_asked_for():
    torch.manual_seed(0)
    model = timm.create_model("xcit_nano_12_p16_224", depth=1, cls_attn_layers=1)
    refused = attnlens.inspect(model).refused
    assert any("XCA (channel attention)" in refusal.reason for refusal in refused)
    asked = attnlens.inspect(model, include=["channel"])
    assert not asked.refused
    assert any("channel" in reason for reason in asked.left_out())


def test_a_model_without_attention_is_refused():
    with pytest.raises(UnsupportedAttentionError, match="holds no attention module"):
        attnlens.inspect(timm.create_model("resnet18"))


def test_zero_weights_give_a_zero_fit(folder):
    path, model = folder
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()
    save_model(model, path / "model.safetensors")
    row = next(attnlens.inspect(path).stats.select(layer=0, head="all", fold="raw").records())
    assert row["alpha"] == row["beta"] == row["spectral_norm"] == 0
