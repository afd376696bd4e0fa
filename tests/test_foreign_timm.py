"""Files of timm architectures that timm did not write: converted by timm's own functions, to the heads of its model."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import attnlens
from attnlens.checkpoints import open_checkpoint
from attnlens.checkpoints.memory import StateDict
from attnlens.errors import CheckpointError
from attnlens.layouts import read_heads
from attnlens.models.open import open_model

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 3, "num_heads": 3, "num_classes": 5}
D, HEADS = 36, 3


class Model:
    """A small random timm model, and a folder that says how to build it."""

    def __init__(self, folder, architecture, **more):
        torch.manual_seed(0)
        args = {**SMALL, **more}
        self.folder, self.live = folder, timm.create_model(architecture, **args)
        for parameter in self.live.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        (folder / "config.json").write_text(json.dumps({"architecture": architecture, "model_args": args}))

    def state(self):
        return {name: value.clone() for name, value in self.live.state_dict().items()}

    def opened(self, path):
        return open_model(self.folder, path)

    def check(self, path):
        """Hold every array read from ``path`` against the live model's own, and return the provenance."""
        opened, expected = self.opened(path), open_model(self.live, None)
        assert len(opened.architecture.specs) == len(expected.architecture.specs) > 0
        for found, wanted in zip(layers(opened), layers(expected), strict=True):
            assert found.arrays().keys() == wanted.arrays().keys()
            for name, array in wanted.arrays().items():
                np.testing.assert_array_equal(found.arrays()[name], array, err_msg=name)
        return opened.provenance()


def layers(opened):
    return [read_heads(spec, opened.checkpoint, layer) for layer, spec in opened.architecture.indexed()]


def renamed(state, *pairs):
    """Rename tensors by regular expressions, one after another."""
    found = {}
    for name, value in state.items():
        for old, new in pairs:
            name = re.sub(old, new, name)  # noqa: PLW2901  # a chain of renames
        found[name] = value.contiguous()
    return found


def to_openai_clip(state, prefix="visual."):
    """Name a timm CLIP tower's tensors as OpenAI's and OpenCLIP's own towers do, beside a text tower."""
    for name in ("head.weight", "head.bias", "patch_embed.proj.bias"):
        state.pop(name, None)
    state["class_embedding"] = state.pop("cls_token")[0, 0]
    state["positional_embedding"] = state.pop("pos_embed")[0]
    found = renamed(
        state,
        (r"^patch_embed\.proj", "conv1"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"^blocks\.", "transformer.resblocks."),
        (r"\.norm([12])", r".ln_\1"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
        (r"^", prefix),
    )
    text = {f"transformer.resblocks.0.attn.{name}": torch.zeros(9, 3) for name in ("in_proj_weight", "out_proj.weight")}
    return {**found, **text, "token_embedding.weight": torch.zeros(7, 3)}


def to_jax(model, prefix=""):
    """Write a ViT's weights as the JAX/Flax original keeps them: [in, head, unit] kernels, one per role."""
    state = {name: value.numpy() for name, value in model.state().items()}
    k, root = D // HEADS, f"{prefix}Transformer/"
    found = {
        f"{prefix}embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        f"{prefix}embedding/bias": state["patch_embed.proj.bias"],
        f"{prefix}cls": state["cls_token"],
        f"{root}posembed_input/pos_embedding": state["pos_embed"],
        f"{root}encoder_norm/scale": state["norm.weight"],
        f"{root}encoder_norm/bias": state["norm.bias"],
    }
    for layer in range(3):
        block, timm_block = f"{root}encoderblock_{layer}/", f"blocks.{layer}."
        mha = f"{block}MultiHeadDotProductAttention_1/"
        weights = np.split(state[f"{timm_block}attn.qkv.weight"], 3)
        biases = np.split(state[f"{timm_block}attn.qkv.bias"], 3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            found[f"{mha}{name}/kernel"] = weight.T.reshape(D, HEADS, k)
            found[f"{mha}{name}/bias"] = bias.reshape(HEADS, k)
        found[f"{mha}out/kernel"] = state[f"{timm_block}attn.proj.weight"].T.reshape(HEADS, k, D)
        found[f"{mha}out/bias"] = state[f"{timm_block}attn.proj.bias"]
        for own, name in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            found[f"{block}{own}/scale"] = state[f"{timm_block}{name}.weight"]
            found[f"{block}{own}/bias"] = state[f"{timm_block}{name}.bias"]
        for number in (0, 1):
            dense, linear = f"{block}MlpBlock_3/Dense_{number}/", f"{timm_block}mlp.fc{number + 1}."
            found[f"{dense}kernel"] = state[f"{linear}weight"].T
            found[f"{dense}bias"] = state[f"{linear}bias"]
    return found


@pytest.mark.parametrize("prefix", ["visual.", "module.visual."])
def test_openclips_own_tower_becomes_timms(tmp_path, prefix):
    model = Model(tmp_path, "vit_base_patch16_clip_224")
    save_file(to_openai_clip(model.state(), prefix), tmp_path / "open_clip.safetensors")
    assert model.check(tmp_path / "open_clip.safetensors")["converted"] == "timm checkpoint_filter_fn"


def test_openclip_with_a_timm_trunk_becomes_timms(tmp_path):
    model = Model(tmp_path, "vit_base_patch16_clip_224")
    save_file(renamed(model.state(), ("^", "visual.trunk.")), tmp_path / "a.safetensors")
    assert model.check(tmp_path / "a.safetensors")["converted"] == "timm checkpoint_filter_fn"


def test_deit_iii_finds_its_layer_scale(tmp_path):
    model = Model(tmp_path, "deit3_small_patch16_224")
    torch.save({"model": renamed(model.state(), (r"ls([12])\.gamma", r"gamma_\1"))}, tmp_path / "deit.pth")
    assert model.check(tmp_path / "deit.pth")["converted"] == "timm checkpoint_filter_fn"


def test_the_original_dinov3_becomes_timms_and_prints_nothing(tmp_path, capfd):
    model = Model(tmp_path, "vit_small_patch16_dinov3", num_heads=HEADS, init_values=1.0)
    foreign = renamed(model.state(), (r"gamma_([12])", r"ls\1.gamma"), ("^reg_token", "storage_tokens"))
    foreign["blocks.0.attn.qkv.bias"] = torch.zeros(3 * D)
    torch.save(foreign, tmp_path / "dinov3.pth")
    assert model.check(tmp_path / "dinov3.pth")["converted"] == "timm checkpoint_filter_fn"
    assert capfd.readouterr().out == ""


def test_meta_perception_encoders_become_timms_eva(tmp_path):
    model = Model(tmp_path, "vit_pe_core_tiny_patch16_384", embed_dim=72)
    foreign = renamed(
        model.state(),
        (r"^blocks\.", "transformer.resblocks."),
        (r"^patch_embed\.proj", "conv1"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"\.norm([12])", r".ln_\1"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
    )
    attention_pool = {name for name in foreign if name.startswith(("attn_pool", "head", "cls_token"))}
    foreign = {name: value for name, value in foreign.items() if name not in attention_pool}
    foreign["positional_embedding"] = foreign.pop("pos_embed")[0]
    pool = model.state()
    foreign["attn_pool.attn.in_proj_weight"] = torch.cat([pool["attn_pool.q.weight"], pool["attn_pool.kv.weight"]])
    foreign["attn_pool.attn.in_proj_bias"] = torch.cat([pool["attn_pool.q.bias"], pool["attn_pool.kv.bias"]])
    for leaf in ("weight", "bias"):
        foreign[f"attn_pool.attn.out_proj.{leaf}"] = pool[f"attn_pool.proj.{leaf}"]
        foreign[f"attn_pool.layernorm.{leaf}"] = pool[f"attn_pool.norm.{leaf}"]
    save_file(foreign, tmp_path / "pe.safetensors")
    assert model.check(tmp_path / "pe.safetensors")["converted"] == "timm checkpoint_filter_fn"


@pytest.mark.parametrize(
    ("nest", "prefix"),
    [
        ("model", ""),
        ("teacher", "backbone."),
        ("encoder", "module."),
        (None, "image_encoder.vit."),
        ("state_dict", "model."),
    ],
    ids=["MAE", "DINO", "I-JEPA", "a part of another model", "Lightning"],
)
def test_wrappers_and_prefixes_of_training_scripts_are_taken_off(tmp_path, nest, prefix):
    model = Model(tmp_path, "vit_tiny_patch16_224")
    foreign = renamed(model.state(), ("^", prefix)) | {f"{prefix}mask_tokens": torch.zeros(3)}
    foreign |= {"head.mlp.0.weight": torch.zeros(3, 3)} if prefix == "backbone." else {}
    torch.save({nest: foreign, "epoch": 3} if nest else foreign, tmp_path / "a.pth")
    converted = model.check(tmp_path / "a.pth").get("converted")
    bare = prefix in ("", "module.")
    assert converted == (None if bare else f"prefix {prefix!r} taken off")


def test_of_two_copies_below_two_prefixes_the_first_is_read_and_named(tmp_path):
    model = Model(tmp_path, "vit_tiny_patch16_224")
    save_file(renamed(model.state(), ("^", "a.")) | renamed(model.state(), ("^", "b.")), tmp_path / "a.safetensors")
    opened = model.opened(tmp_path / "a.safetensors")
    assert opened.name.endswith(" [a]")
    assert opened.provenance()["networks"] == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_survives_the_conversion(tmp_path, dtype):
    model = Model(tmp_path, "vit_base_patch16_clip_224")
    model.live.to(dtype).float()
    foreign = {name: value.to(dtype) for name, value in to_openai_clip(model.state()).items()}
    save_file(foreign, tmp_path / "a.safetensors")
    model.check(tmp_path / "a.safetensors")


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_a_jax_archive_becomes_timms_vit(tmp_path, prefix):
    model = Model(tmp_path, "vit_tiny_patch16_224")
    np.savez(tmp_path / "Ti_16.npz", **to_jax(model, prefix))
    found = model.check(tmp_path / "Ti_16.npz")
    assert found["converted"] == "timm load_pretrained (npz)"
    assert found["file"] == "Ti_16.npz"


def test_a_jax_archive_of_another_input_size_still_gives_the_heads(tmp_path):
    model = Model(tmp_path, "vit_tiny_patch16_224")
    archive = to_jax(model)
    archive["Transformer/posembed_input/pos_embedding"] = np.zeros((1, 10, D), np.float32)
    np.savez(tmp_path / "a.npz", **archive)
    model.check(tmp_path / "a.npz")


def test_what_a_jax_archive_leaves_unfilled_is_missing_not_random(tmp_path):
    model = Model(tmp_path, "vit_tiny_patch16_224", init_values=0.1)
    np.savez(tmp_path / "a.npz", **to_jax(model))
    with pytest.raises(CheckpointError, match="the weights are not of vit_tiny_patch16_224"):
        model.opened(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("beit_base_patch16_224", "timm has no reader of those"),
        ("vit_tiny_patch16_224", "cannot read this file either"),
    ],
)
def test_a_jax_archive_timm_cannot_read_is_told_in_one_line(tmp_path, architecture, why):
    model = Model(tmp_path, architecture)
    np.savez(tmp_path / "a.npz", **{"Transformer/encoderblock_0/kernel": np.zeros(3)})
    with pytest.raises(CheckpointError, match=why) as caught:
        model.opened(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


def test_an_archive_of_native_names_is_read_as_it_is(tmp_path):
    model = Model(tmp_path, "vit_tiny_patch16_224")
    np.savez(tmp_path / "a.npz", **{name: value.numpy() for name, value in model.state().items()})
    assert "converted" not in model.check(tmp_path / "a.npz")


def test_an_archive_of_pickled_objects_is_refused_and_does_not_run(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{"x": 1}], dtype=object), b=np.zeros(3))
    checkpoint = open_checkpoint(tmp_path / "a.npz")
    assert checkpoint.shape("b") == (3,)
    with pytest.raises(CheckpointError, match="not plain data"):
        checkpoint["a"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04broken", b"\x93NUMPY\x01\x00junk", b"\x80\x04."])
def test_junk_named_npz_is_told_in_one_line(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "a.npz")
    assert "\n" not in str(caught.value)


def test_a_bfloat16_archive_widens_to_its_values(tmp_path):
    values = torch.randn(5, 7).bfloat16()
    np.savez(tmp_path / "a.npz", w=values.view(torch.int16).numpy().view("V2"))
    np.testing.assert_array_equal(open_checkpoint(tmp_path / "a.npz")["w"].astype(np.float32), values.float().numpy())


def test_weights_of_another_architecture_are_refused_by_their_native_names(tmp_path):
    model = Model(tmp_path, "vit_tiny_patch16_224")
    save_file({"conv.weight": torch.zeros(3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"not of vit_tiny_patch16_224: blocks\.0\.attn\.qkv\.weight") as caught:
        model.opened(tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)


def test_timms_loader_is_itself_again_after_a_conversion(tmp_path):
    from timm.models import _builder

    before = _builder.load_pretrained
    model = Model(tmp_path, "vit_base_patch16_clip_224")
    save_file(to_openai_clip(model.state()), tmp_path / "a.safetensors")
    model.check(tmp_path / "a.safetensors")
    assert _builder.load_pretrained is before


def test_the_conversion_shows_in_the_provenance_of_an_inspection(tmp_path):
    model = Model(tmp_path, "vit_base_patch16_clip_224")
    save_file(to_openai_clip(model.state()), tmp_path / "a.safetensors")
    found = attnlens.inspect(tmp_path, tmp_path / "a.safetensors")
    assert found.provenance["converted"] == "timm checkpoint_filter_fn"
    assert len(found.layers) == 3


@pytest.mark.parametrize(
    "kind", ["float8_e5m2", "float8_e4m3fn", "bfloat16", "float16", "int64", "bool", ">f4", ">i8", ">f8", "longdouble"]
)
def test_numbers_of_every_type_reach_the_conversion(kind):
    import ml_dtypes

    from attnlens.checkpoints.converted import _torch_state

    values = np.array([[0.0, 1.0, -2.0, 0.5]]).astype(getattr(ml_dtypes, kind, kind))
    found = _torch_state({"weight": values})["weight"]
    assert found.double().tolist() == values.astype(np.float64).tolist()


@pytest.mark.parametrize(("kind", "read"), [(">f4", True), (">f2", True), ("f16", True), ("U8", False)])
def test_numbers_that_torch_does_not_hold_are_converted_or_refused_in_one_line(tmp_path, kind, read):
    state = timm.create_model("vit_tiny_patch16_224", depth=1).state_dict()
    arrays = {f"visual.trunk.{name}": value.numpy().astype(kind) for name, value in state.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    if not read:
        with pytest.raises(attnlens.AttnlensError):
            attnlens.inspect("vit_tiny_patch16_224", tmp_path / "a.npz", model_args={"depth": 1})
        return
    found = attnlens.inspect("vit_tiny_patch16_224", tmp_path / "a.npz", model_args={"depth": 1})
    stored = arrays["visual.trunk.blocks.0.attn.qkv.weight"].astype(np.float64)
    np.testing.assert_array_equal(np.concatenate(list(found.heads(0).W_Q.swapaxes(1, 2))), stored[:192])


@pytest.mark.parametrize("kind", [">f4", "longdouble"])
def test_arrays_of_types_that_torch_has_not_got_are_converted(kind, tmp_path):
    model = Model(tmp_path, "vit_tiny_patch16_224")
    arrays = {f"visual.trunk.{name}": value.numpy().astype(kind) for name, value in model.state().items()}
    np.savez(tmp_path / "a.npz", **arrays)
    assert model.check(tmp_path / "a.npz")["converted"] == "timm checkpoint_filter_fn"
    assert model.check({name.removeprefix("visual.trunk."): value for name, value in arrays.items()})["state_dict"]


def test_what_no_tensor_can_be_made_of_is_told_in_one_line():
    from attnlens.checkpoints.converted import convert

    text = StateDict({"visual.trunk.x": np.array(["text"])})
    with pytest.raises(CheckpointError, match=r"checkpoint_filter_fn .* cannot read this file either \(TypeError"):
        convert("vit_tiny_patch16_224", SMALL, text, lambda _: None)
