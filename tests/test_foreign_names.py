"""Bare files: tensors are told by their names, heads by --num-heads; what names do not say is flagged, not guessed."""

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import attnlens
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.layouts import read_heads
from attnlens.models.open import open_model

HEADS, WIDTH = 3, 33


def random_(module, seed=0):
    """Fill every parameter with noise, norms and biases included."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return module.double().eval()


def opened_file(module, folder, num_heads=HEADS):
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, folder / "bare.safetensors")
    return open_model(folder / "bare.safetensors", None, num_heads)


def layers(opened):
    return [read_heads(spec, opened.checkpoint, layer) for layer, spec in opened.architecture.indexed()]


def same(found, expected):
    assert found.arrays().keys() == expected.arrays().keys()
    for name, array in expected.arrays().items():
        np.testing.assert_array_equal(found.arrays()[name], array, err_msg=name)


def attend(heads, x):
    """Return the layer's output for its input x ``[token, embed_dim]``, by the heads alone."""
    q, k, v = (
        np.einsum("ti,hik->htk", x, weight) + (0.0 if bias is None else bias[:, None])
        for weight, bias in ((heads.W_Q, heads.b_Q), (heads.W_K, heads.b_K), (heads.W_V, heads.b_V))
    )
    groups = heads.num_heads // heads.num_kv_heads
    scores = heads.scale * np.einsum("hsk,htk->hst", q, np.repeat(k, groups, 0))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hst,htk->hsk", weights / weights.sum(-1, keepdims=True), np.repeat(v, groups, 0))
    return np.einsum("htk,hko->to", mixed, heads.W_O) + (0.0 if heads.b_O is None else heads.b_O)


def tokens():
    return torch.randn(1, 7, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["", "layers.0.self_attention"])
def test_multihead_attention_is_read_from_its_names(tmp_path, bias, name):
    attention = random_(torch.nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True))
    model = attention
    if name:
        model = torch.nn.ModuleDict(
            {"layers": torch.nn.ModuleList([torch.nn.ModuleDict({"self_attention": attention})])}
        )
    (heads,) = layers(opened_file(model, tmp_path))
    x = tokens()
    np.testing.assert_allclose(attend(heads, x[0].numpy()), attention(x, x, x)[0][0].detach(), rtol=1e-9, atol=1e-9)


def test_multihead_attention_with_a_key_width_of_its_own_keeps_three_weights_and_one_bias(tmp_path):
    attention = random_(torch.nn.MultiheadAttention(WIDTH, HEADS, kdim=WIDTH - 4, vdim=WIDTH - 2, batch_first=True))
    (heads,) = layers(opened_file(attention, tmp_path))
    state, d = attention.state_dict(), WIDTH
    np.testing.assert_array_equal(np.concatenate(heads.W_K.swapaxes(1, 2)), state["k_proj_weight"])
    np.testing.assert_array_equal(heads.b_V.reshape(-1), state["in_proj_bias"][2 * d :])


@pytest.mark.parametrize(
    "more", [{"depth": 11}, {"depth": 2, "qkv_bias": False, "init_values": 1.0}], ids=["biases", "LayerScale"]
)
def test_a_timm_vit_is_the_same_by_names_as_by_its_architecture(tmp_path, more):
    sizes = {"img_size": 32, "embed_dim": WIDTH, "num_heads": HEADS, "num_classes": 2}
    model = random_(timm.create_model("vit_tiny_patch16_224", **sizes, **more)).float()
    opened = opened_file(model, tmp_path)
    known = open_model(model, None)
    assert [spec.path for spec in opened.architecture.specs] == [spec.path for spec in known.architecture.specs]
    for found, expected in zip(layers(opened), layers(known), strict=True):
        same(found, expected)
        assert found.norm_centres == expected.norm_centres
    assert all(spec.label.startswith("layout guessed") for spec in opened.architecture.specs)
    assert {spec.family for spec in opened.architecture.specs} == {"guessed"}


def test_torchvisions_vit_is_read_with_its_heads_and_its_norm(tmp_path):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is the oracle of this test: pip install it")
    model = random_(
        torchvision.models.VisionTransformer(
            image_size=8, patch_size=4, num_layers=2, num_heads=HEADS, hidden_dim=WIDTH, mlp_dim=17, num_classes=2
        )
    )
    inputs, outputs = [], []
    for block in model.encoder.layers:
        block.ln_1.register_forward_hook(lambda _module, args, output: inputs.append((args[0], output)))
        block.dropout.register_forward_hook(lambda _module, args, _output: outputs.append(args[0]))
    with torch.no_grad():
        model(torch.randn(1, 3, 8, 8, dtype=torch.float64))
    found = layers(opened_file(model, tmp_path))
    assert [heads.name for heads in found] == [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    for heads, (stream, x), expected, block in zip(found, inputs, outputs, model.encoder.layers, strict=True):
        np.testing.assert_allclose(attend(heads, x[0].numpy()), expected[0], rtol=1e-9, atol=1e-9)
        n = torch.nn.functional.layer_norm(stream, (WIDTH,), eps=block.ln_1.eps).numpy()
        np.testing.assert_allclose(n * heads.norm_gain + block.ln_1.bias.detach().numpy(), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vit_b_16", "seqformer"])
def test_without_num_heads_one_line_asks_for_model_or_num_heads(tmp_path, name):
    save_file({"encoder.self_attention.in_proj_weight": torch.zeros(9, 3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(
        UsageError, match=r"does not say which architecture.*model with checkpoint='.*num_heads"
    ) as caught:
        attnlens.inspect(tmp_path / f"{name}.safetensors")
    assert "\n" not in str(caught.value)


def named(**shapes):
    generator = torch.Generator().manual_seed(0)
    return {name.replace("/", "."): torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder, tensors):
    save_file(tensors, folder / "bare.safetensors")
    return folder / "bare.safetensors"


def test_every_set_of_names_is_told_apart_from_its_transpose(tmp_path):
    rows, d = 12, 10  # four heads of width 3, on an input of another width
    spellings = {
        "a": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"),
        "b": ("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight"),
        "c": ("attention.query.weight", "attention.key.weight", "attention.value.weight", "output.dense.weight"),
        "d": ("self.query.weight", "self.key.weight", "self.value.weight", "output.dense.weight"),
        "e": ("q_lin.weight", "k_lin.weight", "v_lin.weight", "out_lin.weight"),
        "f": ("wq.weight", "wk.weight", "wv.weight", "wo.weight"),
        "g": ("q.weight", "k.weight", "v.weight", "o.weight"),
    }
    tensors = {}
    for path, names in spellings.items():
        tensors |= named(**{f"{path}/{name}": (rows, d) for name in names[:3]}, **{f"{path}/{names[3]}": (d, rows)})
    packed = {"h": ("qkv", "proj"), "i": ("to_qkv", "to_out.0"), "j": ("Wqkv", "out_proj"), "l": ("c_attn", "c_proj")}
    for path, (qkv, out) in packed.items():
        tensors |= named(**{f"{path}/{qkv}.weight": (3 * rows, d), f"{path}/{out}.weight": (d, rows)})
    found = {heads.name: heads for heads in layers(open_model(write(tmp_path, tensors), None, 4))}
    assert sorted(found) == sorted([*spellings, *packed])
    for path, names in spellings.items():
        expected = [tensors[f"{path}.{name}"].double().numpy() for name in names]
        for weight, stored in zip((found[path].W_Q, found[path].W_K, found[path].W_V), expected[:3], strict=True):
            np.testing.assert_array_equal(weight, stored.reshape(4, 3, d).swapaxes(1, 2))
        np.testing.assert_array_equal(found[path].W_O, expected[3].T.reshape(4, 3, d))
    for path, (qkv, _) in packed.items():
        stored = tensors[f"{path}.{qkv}.weight"].double().numpy()
        np.testing.assert_array_equal(found[path].W_V, stored[2 * rows :].reshape(4, 3, d).swapaxes(1, 2))


def test_gpt2s_packed_projection_is_not_transposed(tmp_path):
    tensors = named(**{"h/0/attn/c_attn/weight": (9, 27), "h/0/attn/c_proj/weight": (9, 9)})
    (heads,) = layers(open_model(write(tmp_path, tensors), None, 3))
    stored = tensors["h.0.attn.c_attn.weight"].double().numpy()
    np.testing.assert_array_equal(heads.W_K[1], stored[:, 12:15])
    np.testing.assert_array_equal(heads.W_O[2], tensors["h.0.attn.c_proj.weight"].double().numpy()[6:])


def test_fewer_key_heads_follow_from_the_shapes(tmp_path):
    tensors = named(
        **{
            "a/q_proj/weight": (12, 10),
            "a/k_proj/weight": (6, 10),
            "a/v_proj/weight": (6, 10),
            "a/o_proj/weight": (10, 12),
        },
        **{"b/qkv_proj/weight": (24, 10), "b/o_proj/weight": (10, 12)},
    )
    grouped, packed = layers(open_model(write(tmp_path, tensors), None, 4))
    assert (grouped.num_heads, grouped.num_kv_heads, grouped.head_dim) == (4, 2, 3)
    assert (packed.num_heads, packed.num_kv_heads, packed.head_dim) == (4, 2, 3)
    stored = tensors["b.qkv_proj.weight"].double().numpy()
    np.testing.assert_array_equal(packed.W_V[1], stored[21:24].T)


def test_layers_come_in_the_order_of_their_numbers(tmp_path):
    tensors = {}
    for layer in (10, 2, 0):
        tensors |= named(**{f"blocks/{layer}/attn/qkv/weight": (9, 3), f"blocks/{layer}/attn/proj/weight": (3, 3)})
    found = open_model(write(tmp_path, tensors), None, 1)
    assert [spec.path for spec in found.architecture.specs] == [f"blocks.{layer}.attn" for layer in (0, 2, 10)]


BLOCK = {"b/attn/qkv/weight": (9, 3), "b/attn/proj/weight": (3, 3)}
NORM = {"b/norm1/weight": (3,), "b/norm1/bias": (3,)}


@pytest.mark.parametrize(
    ("beside", "known"),
    [
        (NORM, True),
        ({"b/ln_1/weight": (3,), "b/ln_1/bias": (3,)}, True),
        ({"b/norm1/weight": (3,)}, False),  # an RMSNorm multiplies by its weight, or by 1 + weight
        ({**NORM, "b/ln_1/weight": (3,), "b/ln_1/bias": (3,)}, False),
        ({**NORM, "b/attn/logit_scale": (1,)}, False),  # Swin V2 norms behind the layer
        ({**NORM, "b/linear1/weight": (5, 3), "b/linear2/weight": (3, 5)}, False),  # torch's layer: by an argument
        ({**NORM, "b/cross/qkv/weight": (9, 3), "b/cross/proj/weight": (3, 3)}, False),
        ({"b/norm/weight": (3,), "b/norm/bias": (3,)}, False),
    ],
)
def test_a_norm_is_guessed_only_where_its_name_leaves_no_doubt(tmp_path, beside, known):
    opened = open_model(write(tmp_path, named(**BLOCK, **beside)), None, 1)
    heads = layers(opened)[0]
    assert (heads.norm_gain is not None) == known
    assert ("norm_unknown" in heads.leaves_out) != known


def test_what_stands_inside_the_module_is_flagged(tmp_path):
    inside = {"b/attn/q_norm/weight": (3,), "b/attn/relative_position_bias_table": (5, 1), "b/attn/q_bias": (3,)}
    (spec,) = open_model(write(tmp_path, named(**BLOCK, **inside)), None, 1).architecture.specs
    assert {"q_norm", "rel_pos_bias", "qk_bias"} <= set(spec.leaves_out)
    assert spec.q.bias == "b.attn.q_bias"


def test_one_head_count_for_layers_of_two_widths_is_refused(tmp_path):
    tensors = named(**BLOCK, **{"c/attn/qkv/weight": (18, 6), "c/attn/proj/weight": (6, 6)})
    with pytest.raises(UsageError, match=r"widths 3, 6: one num_heads cannot be true of all"):
        open_model(write(tmp_path, tensors), None, 3)


def test_a_head_count_that_does_not_divide_the_rows_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"b\.attn cannot have 2 heads: it has 3 rows for q"):
        open_model(write(tmp_path, named(**BLOCK)), None, 2)


@pytest.mark.parametrize("heads", [0, -3])
def test_a_head_count_below_one_is_refused(tmp_path, heads):
    with pytest.raises(UsageError, match=f"num_heads.{heads} is not a number of heads"):
        open_model(write(tmp_path, named(**BLOCK)), None, heads)


def test_num_heads_with_a_named_model_is_refused():
    for model, checkpoint in (("vit_tiny_patch16_224", None), ("vit_tiny_patch16_224", "a.safetensors"), (None, None)):
        with pytest.raises(UsageError, match="num_heads goes with a weight file alone"):
            open_model(model, checkpoint, 3)


def test_a_file_without_known_names_is_refused_by_what_it_holds(tmp_path):
    with pytest.raises(UnsupportedAttentionError, match=r"it holds conv\.weight, \.\.\."):
        open_model(write(tmp_path, named(**{"conv/weight": (3, 3)})), None, 3)


def test_the_guess_shows_in_table_and_provenance(tmp_path):
    found = attnlens.inspect(write(tmp_path, named(**BLOCK, **NORM)), num_heads=1)
    assert any(text.startswith("layout guessed") for text in found.left_out())
    assert found.provenance["layout"] == "guessed from tensor names, 1 head"
    assert {row["layer"] for row in found.stats.records()} == {0}


def test_without_a_known_norm_only_raw_products_are_measured(tmp_path):
    assert attnlens.inspect(write(tmp_path, named(**BLOCK)), num_heads=1, fold="both").folds == ("raw",)
    with pytest.raises(UsageError, match="use fold='raw'"):
        attnlens.inspect(tmp_path / "bare.safetensors", num_heads=1, fold="effective")


def test_a_bare_file_is_inspected_from_the_command_line(tmp_path, monkeypatch, capfd):
    from attnlens.cli import main

    path = write(tmp_path, named(**{**BLOCK, "b/attn/qkv/weight": (48, 16), "b/attn/proj/weight": (16, 16)}))
    monkeypatch.setattr(
        "sys.argv", ["attnlens", "inspect", str(path), "--num-heads", "2", "--json", "-o", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (None, 0)
    out, err = capfd.readouterr()
    assert '"family": "guessed"' in out
    assert "layout guessed from tensor names" in err
