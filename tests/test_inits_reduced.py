"""What `transfer-attention` keeps of a teacher: by whole products, and by the layers' own forward passes."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from attnlens.checkpoints import ModuleWeights
from attnlens.circuits import layer_ov, qk_circuit
from attnlens.errors import UsageError
from attnlens.inits import init_, verify_init
from attnlens.layouts import read_heads
from attnlens.models.architecture import describe_module
from attnlens.models.open import open_model

DEPTH, HEADS, HEAD_DIM = 2, 3, 13
WIDTH = HEADS * HEAD_DIM
SIZES = {"img_size": 14, "patch_size": 2, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 7}
PARTS = ("norms", "spectra", "layers", "weights")


def vit(seed, **more):
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **SIZES, **more).eval()


@pytest.fixture(scope="module")
def teacher():
    """Return a network with gains, LayerScale and biases that are no ones and zeros."""
    model = vit(9, init_values=0.3)
    for number, block in enumerate(model.blocks):
        nn.init.uniform_(block.norm1.weight, 0.5, 1.5 + number)
        nn.init.uniform_(block.ls1.gamma, 0.1, 0.5)
        for bias in (block.attn.qkv.bias, block.attn.proj.bias):
            nn.init.normal_(bias)
    return model


def made(teacher, keep, seed=4):
    model = vit(1)
    init_(model, "transfer-attention", seed=seed, teacher=teacher, keep=keep)
    return model


def heads_of(model):
    weights = ModuleWeights(model)
    return [read_heads(spec, weights, layer) for layer, spec in describe_module(model).indexed()]


def layers(teacher, student):
    return zip(heads_of(teacher), heads_of(student), strict=True)


def singular(product):
    return np.linalg.svd(product.dense(), compute_uv=False)


@pytest.mark.parametrize("circuit", [qk_circuit, layer_ov])
def test_norms_keeps_every_frobenius_norm_and_spreads_it_evenly(teacher, circuit):
    for theirs, mine in layers(teacher, made(teacher, "norms")):
        wanted, found = circuit(theirs, "effective").dense(), circuit(mine).dense()
        np.testing.assert_allclose(
            np.linalg.norm(found, axis=(-2, -1)), np.linalg.norm(wanted, axis=(-2, -1)), rtol=2e-6
        )
        rank = HEAD_DIM if circuit is qk_circuit else WIDTH
        values = singular(circuit(mine))[..., :rank]
        assert np.ptp(values, axis=-1).max() < 1e-5 * values.max()
        assert np.ptp(singular(circuit(theirs, "effective"))[..., :rank], axis=-1).min() > 0.1 * values.max()


@pytest.mark.parametrize("circuit", [qk_circuit, layer_ov])
def test_spectra_keeps_all_singular_values_and_no_direction(teacher, circuit):
    for theirs, mine in layers(teacher, made(teacher, "spectra")):
        wanted, found = circuit(theirs, "effective"), circuit(mine)
        np.testing.assert_allclose(singular(found), singular(wanted), atol=2e-6)
        one, other = wanted.dense().reshape(-1, WIDTH**2), found.dense().reshape(-1, WIDTH**2)
        cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        assert np.abs(cosines).max() < 6 / WIDTH


def order_of(theirs, mine):
    """Find, from QK's first head alone, which of the teacher's channels each of the student's is."""
    wanted, found = (np.linalg.norm(qk_circuit(one, fold).dense()[0], axis=1) for one, fold in (theirs, mine))
    order = np.abs(found[:, None] - wanted).argmin(1)
    assert sorted(order) == list(range(WIDTH))
    return order


def test_layers_keeps_every_product_but_for_one_permutation_a_layer_on_both_sides(teacher):
    orders = []
    for theirs, mine in layers(teacher, made(teacher, "layers")):
        order = order_of((theirs, "effective"), (mine, "raw"))
        for circuit in (qk_circuit, layer_ov):
            wanted = circuit(theirs, "effective").dense()
            np.testing.assert_allclose(circuit(mine).dense(), wanted[..., order, :][..., order], atol=2e-6)
        np.testing.assert_allclose(mine.b_O, (theirs.b_O * theirs.layer_scale)[order], rtol=1e-6)
        np.testing.assert_allclose(mine.b_Q, theirs.b_Q, rtol=1e-6)
        orders.append(tuple(order))
    assert len(set(orders)) == DEPTH
    assert all(np.mean(np.array(order) == np.arange(WIDTH)) < 0.3 for order in orders)


def test_a_permuted_layer_computes_what_the_teachers_does_on_permuted_channels(teacher):
    student = made(teacher, "layers")
    x = torch.randn(2, 11, WIDTH, generator=torch.Generator().manual_seed(0))
    for (theirs, mine), old, new in zip(layers(teacher, student), teacher.blocks, student.blocks, strict=True):
        order = torch.from_numpy(order_of((theirs, "effective"), (mine, "raw")))
        with torch.no_grad():
            wanted = old.ls1(old.attn(x * old.norm1.weight))[..., order]
            torch.testing.assert_close(new.attn(x[..., order]), wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("keep", ["norms", "spectra"])
def test_where_directions_are_random_biases_are_zero(teacher, keep):
    for block in made(teacher, keep).blocks:
        assert not block.attn.qkv.bias.any()
        assert not block.attn.proj.bias.any()


@pytest.mark.parametrize("keep", PARTS)
def test_every_part_is_verified_with_and_without_its_seed(teacher, keep):
    model = made(teacher, keep, seed=6)
    given = {"init": "transfer-attention", "teacher": teacher, "keep": keep}
    assert verify_init(model, seed=6, **given).passed
    assert verify_init(model, **given).passed
    assert verify_init(model, seed=7, **given).passed == (keep == "weights")


def test_a_part_that_is_none_is_refused(teacher):
    with pytest.raises(UsageError, match=r"keep = 'all'.*norms"):
        made(teacher, "all")


@pytest.mark.parametrize("keep", ["norms", "spectra", "layers"])
def test_heads_that_share_keys_and_values_keep_their_own_products(keep):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 44, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14}
    config = transformers.LlamaConfig(
        **sizes, num_hidden_layers=2, intermediate_size=13, vocab_size=17, max_position_embeddings=19
    )
    torch.manual_seed(3)
    teacher, student = transformers.LlamaModel(config).eval(), transformers.LlamaModel(config).eval()
    init_(student, "transfer-attention", seed=1, teacher=teacher, keep=keep)

    old, new = open_model(teacher, None), open_model(student, None)
    for layer in range(2):
        theirs, mine = old.heads(layer), new.heads(layer)
        for circuit in (qk_circuit, layer_ov):
            wanted, found = circuit(theirs, "effective"), circuit(mine, "effective")
            norms = [np.linalg.norm(one.dense(), axis=(-2, -1)) for one in (wanted, found)]
            np.testing.assert_allclose(*norms, rtol=2e-6)
            if keep != "norms":
                np.testing.assert_allclose(singular(found), singular(wanted), atol=2e-6)
