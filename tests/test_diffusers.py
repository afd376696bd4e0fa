"""Networks of diffusers: every attention module's output, from what goes into it, by the heads that are read."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attnlens.errors import CheckpointError, ModelNotFoundError, UnsupportedAttentionError
from attnlens.layouts import read_heads
from attnlens.models.open import open_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

SIZES = {"sample_size": 8, "norm_num_groups": 1}
DOWN, UP = ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2
UNET = {**SIZES, "block_out_channels": (20, 36), "down_block_types": DOWN, "up_block_types": UP, "layers_per_block": 1}
UNET |= {"cross_attention_dim": 13, "attention_head_dim": (2, 3), "norm_num_groups": 4}
PLAIN = {**SIZES, "block_out_channels": (12, 24), "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
PLAIN |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8, "layers_per_block": 1}
DIT = {**SIZES, "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2}
PIXART = {**DIT, "cross_attention_dim": 24, "caption_channels": 12}


def image(channels):
    return torch.randn(1, channels, 8, 8, dtype=torch.float64)


NETWORKS = {
    "UNet2DConditionModel": (
        UNET,
        lambda: (image(4), torch.tensor(3), torch.randn(1, 5, 13, dtype=torch.float64)),
        {"cross"},
    ),
    "UNet2DModel": (PLAIN, lambda: (image(3), torch.tensor(3)), {"qk_bias"}),
    "AutoencoderKL": ({"block_out_channels": (12,), "norm_num_groups": 4}, lambda: (image(3),), {"qk_bias"}),
    "DiTTransformer2DModel": (
        DIT,
        lambda: (image(4), torch.tensor([3]), torch.tensor([1])),
        {"modulated", "qk_bias"},
    ),
    "PixArtTransformer2DModel": (
        PIXART,
        lambda: (image(4), torch.randn(1, 5, 12, dtype=torch.float64), torch.tensor([3])),
        {"modulated", "cross", "qk_bias"},
    ),
}


def build(name):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is the oracle of these tests: pip install it")
    sizes, inputs, flags = NETWORKS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, name)(**sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.double().eval(), inputs, flags


def forward(model, inputs):
    """Run one forward pass; return, by path, what q and k read, what o gave, and the norms' outputs."""
    seen, norms = {}, []
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        role = {"to_q": "q", "to_k": "k", "0": "o"}.get(leaf) if parent.endswith(("to_out",)) or leaf != "0" else None
        if role and "to_" in path:
            place = path.split(".to_")[0]
            module.register_forward_hook(
                lambda _m, args, out, place=place, role=role: seen.setdefault(place, {}).update({role: (args[0], out)})
            )
        elif "Norm" in type(module).__name__ and getattr(module, "weight", None) is not None:
            module.register_forward_hook(lambda m, args, out: norms.append((m, args[0], out)))
    with torch.no_grad():
        model(*inputs())
    return seen, norms


def heads_out(heads, x, source):
    q, k, v = (
        np.einsum("ti,hik->htk", given, weight) + (0.0 if bias is None else bias[:, None])
        for given, weight, bias in (
            (x, heads.W_Q, heads.b_Q),
            (source, heads.W_K, heads.b_K),
            (source, heads.W_V, heads.b_V),
        )
    )
    weights = torch.from_numpy(heads.scale * np.einsum("hsk,htk->hst", q, k)).softmax(-1).numpy()
    return np.einsum("hst,htk,hko->so", weights, v, heads.W_O) + (0.0 if heads.b_O is None else heads.b_O)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_attention_is_what_the_forward_pass_applies_live_and_saved(name, tmp_path):
    model, inputs, flags = build(name)
    seen, norms = forward(model, inputs)
    live = open_model(model, None)
    assert {spec.path for spec in live.architecture.specs} == set(seen)
    found = set()
    for layer, spec in live.architecture.indexed():
        heads = read_heads(spec, live.checkpoint, layer)
        (x, _), (source, _), (_, out) = (seen[spec.path][role] for role in "qko")
        expected = heads_out(heads, x[0].numpy(), source[0].numpy())
        np.testing.assert_allclose(out[0].numpy(), expected, rtol=1e-8, atol=1e-8)
        normed = [module for module, _, output in norms if output.shape == x.shape and torch.equal(output, x)]
        groups = [m for m, _, output in norms if output.ndim == 3 and torch.equal(output.transpose(1, 2), x)]
        gain = heads.input_norm("q").gain
        if normed or groups:
            np.testing.assert_array_equal(gain, (normed or groups)[0].weight.detach())
        else:
            assert gain is None
        found |= set(spec.leaves_out)
    assert found == flags
    model.save_pretrained(tmp_path)
    saved = open_model(tmp_path, None)
    assert [spec.path for spec in saved.architecture.specs] == [spec.path for spec in live.architecture.specs]
    for spec, other in zip(saved.architecture.specs, live.architecture.specs, strict=True):
        expected = read_heads(other, live.checkpoint).arrays()
        for key, array in read_heads(spec, saved.checkpoint).arrays().items():
            np.testing.assert_array_equal(array, expected[key], err_msg=key)


def test_an_unknown_class_and_a_pipeline_say_what_to_do(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelNotFoundError, match="is a pipeline of diffusers: give one of its parts"):
        open_model(tmp_path, None)
    torch.save({"a.to_q.weight": torch.zeros(3, 3)}, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Nobody"}))
    with pytest.raises(
        ModelNotFoundError, match=r"class 'Nobody', which is not known: give .*num_heads.*Known are Auto"
    ):
        open_model(tmp_path, None)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(
        UnsupportedAttentionError, match=r"a \(diffusers.AutoencoderKL\) has no to_k: its layout is not known"
    ):
        open_model(tmp_path, None)


def test_both_sides_of_an_autoencoder_are_read_where_their_names_are_alike(tmp_path):
    sides = [f"{side}.mid_block.attentions.0" for side in ("encoder", "decoder")]
    tensors = {
        f"{side}.{name}.weight": torch.randn(8, 8) for side in sides for name in ("to_q", "to_k", "to_v", "to_out.0")
    }
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "AutoencoderKL", "block_out_channels": [4, 8]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = open_model(tmp_path, None)
    assert [spec.path for spec in opened.architecture.specs] == sides
    for spec in opened.architecture.specs:
        heads = read_heads(spec, opened.checkpoint)
        np.testing.assert_array_equal(heads.W_V[0].T, tensors[f"{spec.path}.to_v.weight"])


def write_block(folder, config, shapes=None, path="down_blocks.0.attn1"):
    """Write a folder of one attention module, 8 wide, some of its weights of other shapes."""
    shapes = dict.fromkeys(("to_q", "to_k", "to_v", "to_out.0"), (8, 8)) | (shapes or {})
    tensors = {f"{path}.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **config}))


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "UNet2DModel"])
@pytest.mark.parametrize("size", [5.0, 0, "", [], [5.0], {}, True, "8", -1, 10**4000, [[8]]])
def test_numbers_of_heads_that_are_none_are_refused(name, size, tmp_path):
    write_block(tmp_path, {"_class_name": name, "attention_head_dim": size})
    with pytest.raises(ModelNotFoundError, match=r"gives .* as the heads of down_blocks\.0\.attn1, which is 8 wide"):
        open_model(tmp_path, None)


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({}, 8),
        ({"attention_head_dim": None}, 8),
        ({"num_attention_heads": None, "attention_head_dim": 2}, 2),
        ({"num_attention_heads": 4, "attention_head_dim": 0}, 4),
        ({"_class_name": "UNet2DModel"}, 1),
        ({"_class_name": "UNet2DModel", "attention_head_dim": None}, 1),
        ({"_class_name": "UNet2DModel", "attention_head_dim": 2}, 4),
    ],
)
def test_numbers_of_heads_that_are_left_out_are_those_of_diffusers(config, heads, tmp_path):
    write_block(tmp_path, config)
    (spec,) = open_model(tmp_path, None).architecture.specs
    assert spec.q.heads == heads


@pytest.mark.parametrize("only", [True, [True, False], [False, True]])
def test_blocks_that_attend_to_their_condition_alone_are_refused(only, tmp_path):
    write_block(tmp_path, {"only_cross_attention": only})
    with pytest.raises(UnsupportedAttentionError, match="attends to two streams at once"):
        open_model(tmp_path, None)
    write_block(tmp_path, {"only_cross_attention": [False, False]})
    assert len(open_model(tmp_path, None).architecture.specs) == 1


@pytest.mark.parametrize("name", ["to_q", "to_k", "to_v", "to_out.0"])
@pytest.mark.parametrize("shape", [(), (8,), (0, 8), (8, 0), (8, 8, 2)])
def test_weights_that_are_no_matrices_are_refused_by_name(name, shape, tmp_path):
    write_block(tmp_path, {}, {name: shape})
    with pytest.raises(CheckpointError, match=rf"^down_blocks\.0\.attn1\.{name}\.weight has shape .*; a matrix"):
        open_model(tmp_path, None)


@pytest.mark.parametrize("part", ["²", "٣", "²2"])
def test_parts_of_a_path_may_be_digits_of_any_script(part, tmp_path):
    write_block(tmp_path, {}, path=f"a.{part}.blocks.3")
    assert [spec.path for spec in open_model(tmp_path, None).architecture.specs] == [f"a.{part}.blocks.3"]
