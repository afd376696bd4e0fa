"""Networks that names tell (nanoGPT, vit-pytorch, TransformerLens) and folders of old: what their own code applies."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import attnlens
from attnlens.errors import UsageError
from attnlens.layouts import read_heads
from attnlens.models.open import open_model
from tests.transformers_models import CASES, Case, build

WIDTH, HEADS, TOKENS = 33, 3, 7


def random_(module):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.double().eval()


def layers(model, **how):
    opened = open_model(model, None, **how)
    return [read_heads(spec, opened.checkpoint, layer) for layer, spec in opened.architecture.indexed()]


def attend(heads, x, causal=False):
    """Return the layer's output for its input x ``[token, embed_dim]``, by the heads alone."""
    q, k, v = (
        np.einsum("ti,hik->htk", x, weight) + (0.0 if bias is None else bias[:, None])
        for weight, bias in ((heads.W_Q, heads.b_Q), (heads.W_K, heads.b_K), (heads.W_V, heads.b_V))
    )
    k, v = (np.repeat(part, heads.num_heads // heads.num_kv_heads, 0) for part in (k, v))
    scores = heads.scale * np.einsum("hsk,htk->hst", q, k)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf) if causal else scores
    weights = torch.from_numpy(scores).softmax(-1).numpy()
    return np.einsum("hst,htk,hko->so", weights, v, heads.W_O) + (0.0 if heads.b_O is None else heads.b_O)


class NanoAttention(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).split(WIDTH, 2))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class NanoBlock(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH, bias=bias), NanoAttention(bias)

    def forward(self, x):
        return self.attn(self.ln_1(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("live", [True, False])
def test_nanogpt_is_read_with_its_norm_and_its_mask(bias, live, tmp_path):
    blocks = [random_(NanoBlock(bias)) for _ in range(2)]
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"h": nn.ModuleList(blocks)})})
    torch.save(model.state_dict(), tmp_path / "ckpt.pt")
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    for heads, block in zip(layers(model if live else tmp_path / "ckpt.pt", num_heads=HEADS), blocks, strict=True):
        n = (nn.functional.layer_norm(x, (WIDTH,)) * torch.from_numpy(heads.norm_gain))[0]
        n = n if block.ln_1.bias is None else n + block.ln_1.bias
        np.testing.assert_allclose(attend(heads, n.detach().numpy(), causal=True), block(x)[0].detach(), atol=1e-9)
        assert "causal" in heads.leaves_out
        assert heads.norm_centres
    found = attnlens.inspect(tmp_path / "ckpt.pt", num_heads=HEADS)
    assert found.folds == ("raw", "effective")
    assert found.provenance["layout"] == "of nanogpt, told by tensor names, 3 heads"


class Lucid(nn.Module):
    """Attention as vit_pytorch has it: its norm inside, its heads joined by ``to_out``."""

    def __init__(self, inner):
        super().__init__()
        self.norm, self.to_qkv = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, WIDTH), nn.Dropout(0.0))

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.to_qkv(self.norm(x)).chunk(3, -1))
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_vit_pytorch_is_read_with_the_norm_inside_its_attention(tmp_path):
    found = [random_(Lucid(15)) for _ in range(2)]
    stack = nn.ModuleList(nn.ModuleList([attention, nn.Linear(3, 3)]) for attention in found)
    model = nn.ModuleDict({"transformer": nn.ModuleDict({"layers": stack})})
    torch.save(model.state_dict(), tmp_path / "vit.pt")
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    for heads, attention in zip(layers(tmp_path / "vit.pt", num_heads=HEADS), found, strict=True):
        n = attention.norm(x)[0].detach().numpy()
        np.testing.assert_array_equal(heads.norm_gain, attention.norm.weight.detach())
        np.testing.assert_allclose(attend(heads, n), attention(x)[0].detach(), atol=1e-9)
        assert heads.leaves_out == ()
    with pytest.raises(UsageError, match="vit-pytorch layers cannot have 4 heads: q, k and v are 15 wide each"):
        open_model(tmp_path / "vit.pt", None, num_heads=4)


def lens(kv_heads=HEADS, folded=False):
    """Make the tensors of a two-layer TransformerLens network."""
    torch.manual_seed(0)
    tensors, one = {}, "_" if kv_heads != HEADS else ""
    for layer in range(2):
        path = f"blocks.{layer}.attn."
        shapes = {"W_Q": (HEADS, WIDTH, 5), f"{one}W_K": (kv_heads, WIDTH, 5), f"{one}W_V": (kv_heads, WIDTH, 5)}
        shapes |= {"W_O": (HEADS, 5, WIDTH), "b_Q": (HEADS, 5), f"{one}b_K": (kv_heads, 5), f"{one}b_V": (kv_heads, 5)}
        shapes |= {"b_O": (WIDTH,)} | ({} if folded else {"ln1.w": (WIDTH,), "ln1.b": (WIDTH,)})
        for name, shape in shapes.items():
            full = f"blocks.{layer}.{name}" if name.startswith("ln") else path + name
            tensors[full] = torch.randn(shape, dtype=torch.float64)
    return tensors


@pytest.mark.parametrize("kv_heads", [HEADS, 1])
def test_transformer_lens_needs_no_head_count(kv_heads, tmp_path):
    tensors = lens(kv_heads)
    save_file(tensors, tmp_path / "lens.safetensors")
    one = "_" if kv_heads != HEADS else ""
    for layer, heads in enumerate(layers(tmp_path / "lens.safetensors")):
        path = f"blocks.{layer}.attn."
        for name, found in (("W_Q", heads.W_Q), (f"{one}W_K", heads.W_K), (f"{one}W_V", heads.W_V), ("W_O", heads.W_O)):
            np.testing.assert_array_equal(found, tensors[path + name])
        for name, found in (("b_Q", heads.b_Q), (f"{one}b_K", heads.b_K), (f"{one}b_V", heads.b_V), ("b_O", heads.b_O)):
            np.testing.assert_array_equal(found, tensors[path + name])
        np.testing.assert_array_equal(heads.norm_gain, tensors[f"blocks.{layer}.ln1.w"])
        assert heads.norm_centres
    inspection = attnlens.inspect(tensors)
    assert any(reason.startswith("TransformerLens: the scale") for reason in inspection.left_out())
    with pytest.raises(UsageError, match="stores 3 heads in each layer, not 5"):
        attnlens.inspect(tensors, num_heads=5)


def test_transformer_lens_with_its_norms_folded_away_has_equal_products():
    rows = {
        fold: [row["alpha"] for row in attnlens.inspect(lens(folded=True), fold=fold).stats.records()]
        for fold in ("raw", "effective")
    }
    assert rows["raw"] == rows["effective"]


BIGCODE = Case("GPTBigCodeModel", "GPTBigCodeConfig", {"n_embd": 36, "n_head": 3, "n_layer": 2, "vocab_size": 19})


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2", "mpnet", "dinov2", "gpt_bigcode"])
def test_a_configuration_without_a_model_type_is_told_by_the_tensors_names(name, tmp_path):
    build({**CASES, "gpt_bigcode": BIGCODE}[name]).save_pretrained(tmp_path)
    expected = layers(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    opened = open_model(tmp_path, None)
    assert opened.provenance()["layout"] == f"model_type {name}, told by the tensors' names"
    for found, other in zip(layers(tmp_path), expected, strict=True):
        assert found.leaves_out == other.leaves_out
        for key, array in other.arrays().items():
            np.testing.assert_array_equal(found.arrays()[key], array, err_msg=key)


def test_names_that_several_families_have_are_not_told_apart(tmp_path):
    build(CASES["llama"]).save_pretrained(tmp_path)  # Gemma has the same names and multiplies by 1 + weight
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_type"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(attnlens.AttnlensError, match="no model_type of transformers"):
        open_model(tmp_path, None)


@pytest.mark.weights
def test_a_trained_bert_without_a_model_type_has_the_values_of_an_independent_float64_reading():
    root = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("ATTNLENS_TEST_DATA", root))
    if not (folder / "rxnfp_bert").is_dir():
        pytest.skip("real weights are not at hand: rxnfp_bert is neither in ../shared/data nor in ATTNLENS_TEST_DATA")
    expected = json.loads((folder / "expected_real.json").read_text())
    tables = {"raw": expected["rxnfp raw"], "effective": expected["rxnfp effective (gain of the norm before)"]}
    rows = list(attnlens.inspect(folder / "rxnfp_bert").stats.records())
    assert len(rows) == 12 * 2 * (4 + 4 + 1)
    for row in rows:
        layer = tables[row["fold"]][str(row["layer"])]
        found = [row["alpha"], row["beta"], row["identity_cosine"]]
        wanted = layer["ov_sum"] if row["head"] == "all" else layer[row["circuit"]][row["head"]]
        np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-12)
