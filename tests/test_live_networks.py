"""Live networks as people have them: in wrappers, with computed weights, of any type and size, of transformers."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import attnlens
from attnlens.errors import CheckpointError, UnsupportedAttentionError, UsageError
from attnlens.layouts import read_heads
from attnlens.models.open import open_model
from tests.transformers_models import CASES, build, transformers

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
WIDTH, HEADS = 33, 3


def vit(seed=0, **sizes):
    """Build a small timm ViT whose every parameter is random."""
    sizes = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": WIDTH,
        "num_heads": HEADS,
        "depth": 2,
        "num_classes": 5,
    } | sizes
    return random_(timm.create_model("vit_tiny_patch16_224", **sizes), seed)


def random_(module, seed=0):
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def layers(model, checkpoint=None, **how):
    opened = open_model(model, checkpoint, **how)
    return [read_heads(spec, opened.checkpoint, layer) for layer, spec in opened.architecture.indexed()]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.arrays().keys() == other.arrays().keys()
        for name, array in other.arrays().items():
            np.testing.assert_array_equal(one.arrays()[name], array, err_msg=name)
        assert one.leaves_out == other.leaves_out


def in_blocks(wrap):
    def wrapped(model):
        for place, block in enumerate(model.blocks):
            model.blocks[place] = wrap(block)
        return model

    return wrapped


def checkpointed(block):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(block)


def compiled_in_place(model):
    model.compile()
    return model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "torch.compile": torch.compile,
    "module.compile": compiled_in_place,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "ModelEmaV3": timm.utils.ModelEmaV3,
    "both": lambda model: nn.DataParallel(torch.compile(model)),
    "compiled blocks": in_blocks(torch.compile),
    "checkpointed blocks": in_blocks(checkpointed),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_changes_nothing_of_what_is_read(wrapper):
    found = open_model(WRAPPERS[wrapper](vit()), None)
    same([read_heads(spec, found.checkpoint, i) for i, spec in found.architecture.indexed()], layers(vit()))
    assert [spec.path for spec in found.architecture.specs] == ["blocks.0.attn", "blocks.1.attn"]


def test_distributed_networks_are_read_and_shards_are_not_written():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        same(layers(nn.parallel.DistributedDataParallel(vit())), layers(vit()))
        sharded = vit()
        for block in sharded.blocks:
            torch.distributed.fsdp.fully_shard(block)
        same(layers(torch.distributed.fsdp.fully_shard(sharded)), layers(vit()))
        with pytest.raises(UsageError, match=r"spread over processes: initialise before sharding"):
            attnlens.init_(sharded)
    finally:
        torch.distributed.destroy_process_group()


def pruned(attention):
    prune.random_unstructured(attention.qkv, "weight", 0.4)


COMPUTED = {
    "weight_norm": lambda attention: parametrizations.weight_norm(attention.qkv),
    "spectral_norm": lambda attention: parametrizations.spectral_norm(attention.qkv),
    "orthogonal": lambda attention: parametrizations.orthogonal(attention.qkv),
    "weight_norm of old": lambda attention: nn.utils.weight_norm(attention.qkv),
    "spectral_norm of old": lambda attention: nn.utils.spectral_norm(attention.qkv),
    "pruning": pruned,
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("training", [True, False])
def test_a_weight_that_is_computed_is_read_as_the_layer_applies_it_and_nothing_is_changed(name, training):
    model = vit().train(training)
    for block in model.blocks:
        COMPUTED[name](block.attn)
        for parameter in block.attn.qkv.parameters():  # moved on since it was last computed
            parameter.data.mul_(1.25)
    before = copy.deepcopy(model.state_dict())
    found = layers(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.eval()
    for heads, block in zip(found, model.blocks, strict=True):
        with torch.no_grad():
            applied = block.attn.qkv(torch.eye(WIDTH)) - block.attn.qkv(torch.zeros(1, WIDTH))
        read = np.concatenate([w.transpose(1, 0, 2).reshape(WIDTH, -1) for w in (heads.W_Q, heads.W_K, heads.W_V)], 1)
        np.testing.assert_allclose(read, applied, atol=1e-6)
    with pytest.raises(UsageError, match=r"blocks.0.attn.qkv.weight is computed from other tensors"):
        attnlens.init_(model)


ADAPTERS = ("LoraConfig", "dora", "IA3Config", "LoHaConfig")


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_peft_are_read_as_merged_and_as_absent_where_they_are_switched_off(kind):
    peft = pytest.importorskip("peft", reason="peft is the oracle of this test: pip install it")
    config = {
        "LoraConfig": lambda: peft.LoraConfig(target_modules=["qkv"], modules_to_save=["head"]),
        "dora": lambda: peft.LoraConfig(target_modules=["qkv"], use_dora=True),
        "IA3Config": lambda: peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]),
        "LoHaConfig": lambda: peft.LoHaConfig(target_modules=["qkv"]),
    }[kind]()
    adapted = peft.get_peft_model(vit(), config)
    for name, parameter in adapted.named_parameters():
        if any(part in name for part in ("lora", "ia3", "hada")):
            nn.init.normal_(parameter, std=0.3)
    expected = layers(copy.deepcopy(adapted).merge_and_unload())
    assert np.abs(expected[0].W_V - layers(vit())[0].W_V).max() > 0.01
    same(layers(adapted), expected)
    with adapted.disable_adapter():
        same(layers(adapted), layers(vit()))
    adapted.merge_adapter()
    same(layers(adapted), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_type_has_effective_products(dtype):
    model = vit().to(dtype)
    inspection = attnlens.inspect(model)
    assert inspection.folds == ("raw", "effective")
    for heads, block in zip(layers(model), model.blocks, strict=True):
        np.testing.assert_array_equal(heads.norm_gain, block.norm1.weight.detach().double())
    assert attnlens.init_(model).products


def test_norms_in_another_type_than_the_projections_are_found():
    model = vit().bfloat16()
    for block in model.blocks:
        block.norm1.float()
    assert attnlens.inspect(model).folds == ("raw", "effective")


def torchvision_vit(side):
    torchvision = pytest.importorskip("torchvision", reason="torchvision's networks are read here: pip install it")
    return random_(torchvision.models.VisionTransformer(side, 4, 2, HEADS, WIDTH, 17, num_classes=2))


@pytest.mark.parametrize("side", [8, 32, 224])
def test_a_network_of_another_image_size_has_effective_products(side):
    model = torchvision_vit(side)
    for heads, block in zip(layers(model), model.encoder.layers, strict=True):
        np.testing.assert_array_equal(heads.norm_gain, block.ln_1.weight.detach())


class Block(nn.Module):
    """A pre-norm block of somebody's own, on tokens, token numbers or images."""

    def __init__(self, front=None, length=None):
        super().__init__()
        self.front, self.length = front, length
        self.norm, self.attn = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x):
        x = x if self.front is None else self.front(x)
        x = x.flatten(2).mT if x.ndim == 4 else x.mT if isinstance(self.front, nn.Conv1d) else x
        assert self.length in (None, x.shape[1]), f"{x.shape[1]} tokens"
        n = self.norm(x)
        return x + self.attn(n, n, n)[0]


@pytest.mark.parametrize(
    "front",
    [None, nn.Embedding(19, WIDTH), nn.Conv2d(1, WIDTH, 4, 4), nn.Conv1d(2, WIDTH, 5, 3), nn.Linear(7, WIDTH)],
    ids=lambda front: type(front).__name__,
)
def test_tokens_numbers_images_and_waves_go_in_without_being_asked_for(front):
    model = random_(Block(front))
    (heads,) = layers(model)
    np.testing.assert_array_equal(heads.norm_gain, model.norm.weight.detach())


def test_a_size_that_is_not_stated_is_asked_for_and_taken():
    model = random_(Block(nn.Conv2d(3, WIDTH, 4, 4), length=5 * 7))
    with pytest.raises(UsageError, match=r"AssertionError: \d+ tokens; give input_size=\): use fold='raw'"):
        attnlens.inspect(model, fold="effective")
    with pytest.raises(UnsupportedAttentionError, match="give input_size="):
        attnlens.fit_params(model)
    with pytest.raises(attnlens.AttnlensError, match="give input_size="):
        attnlens.init_(model, fold="effective")
    (heads,) = layers(model, input_size=(3, 20, 28))
    np.testing.assert_array_equal(heads.norm_gain, model.norm.weight.detach())
    assert attnlens.fit_params(model, input_size=(3, 20, 28)).entries
    assert attnlens.init_(model, fold="effective", input_size=(3, 20, 28)).products
    with pytest.raises(UsageError, match=r"does not take input_size=12: with an input of 1x3x12x12 float32 it raised"):
        attnlens.inspect(model, input_size=12)


@pytest.mark.parametrize("size", [0, "32", (), (3, -1, 4), 1.5])
def test_an_input_size_that_is_none_is_refused(size):
    with pytest.raises(UsageError, match="give a side, as 32, or the shape of one input"):
        attnlens.inspect(vit(), input_size=size)


class Broken(Block):
    """A network whose forward pass fails whatever goes in."""

    def forward(self, _x):
        raise KeyError("cfg")


def test_no_exception_of_the_network_becomes_a_statement_about_its_norms():
    inspection = attnlens.inspect(Broken(), fold="raw")
    assert not any("no norm" in reason for reason in inspection.left_out())
    with pytest.raises(
        UsageError, match=r"are not known \(no forward pass could be followed: .* raised KeyError: 'cfg'"
    ):
        attnlens.inspect(Broken(), fold="effective")


class Own(nn.Module):
    """Attention of a class nobody knows, its norm inside, as lucidrains writes it."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.to_qkv(self.norm(x)).chunk(3, -1))
        mixed = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.to_out(mixed.transpose(1, 2).flatten(2))


def test_a_module_of_ones_own_is_read_by_its_names_with_the_norm_its_forward_pass_shows():
    model = random_(nn.Sequential(Own(), Own())).double()
    with pytest.raises(UnsupportedAttentionError, match="class and its layout are not known"):
        attnlens.inspect(model)
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    for heads, own in zip(layers(model, num_heads=HEADS), model, strict=True):
        assert "norm_before_proj" not in heads.leaves_out
        np.testing.assert_array_equal(heads.norm_gain, own.norm.weight.detach())
        n = (nn.functional.layer_norm(x, (WIDTH,)) * own.norm.weight + own.norm.bias).detach().numpy()
        q, k, v = (np.einsum("ti,hik->htk", n, weight) for weight in (heads.W_Q, heads.W_K, heads.W_V))
        scores = torch.from_numpy(heads.scale * np.einsum("hsk,htk->hst", q, k)).softmax(-1).numpy()
        out = np.einsum("hst,htk,hko->so", scores, v, heads.W_O) + heads.b_O
        np.testing.assert_allclose(out, own(x[None])[0].detach(), atol=1e-9)


def test_quantised_and_scripted_networks_are_refused_by_name():
    quantised = torch.ao.quantization.quantize_dynamic(vit(), {nn.Linear})
    with pytest.raises(
        UnsupportedAttentionError, match=r"blocks.0.attn .*holds quantised layers .torch.*Linear.*before it was"
    ):
        attnlens.inspect(quantised)
    codes = vit()
    codes.blocks[0].attn.qkv.weight = nn.Parameter(torch.zeros(99, 33, dtype=torch.int8), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"stored as torch.int8: codes of a quantised network"):
        attnlens.inspect(codes)
    with pytest.raises(CheckpointError, match="TorchScript, whose modules have no class"):
        attnlens.inspect(torch.jit.script(nn.Linear(3, 3)))


def test_a_network_on_the_meta_device_is_refused_in_one_line():
    with torch.device("meta"), pytest.raises(CheckpointError, match="on the meta device and holds no numbers"):
        attnlens.inspect(vit())


@pytest.mark.parametrize("given", [7, [1, 2], object()])
def test_what_is_no_model_is_said_to_be_none(given):
    with pytest.raises(
        UsageError, match=r"is no model: give a name, a file, a folder, a torch.nn.Module or a state dict"
    ):
        attnlens.inspect(given)


def test_a_state_dict_in_memory_is_read_with_a_name_or_a_head_count():
    state = vit(img_size=224, patch_size=16, depth=12, embed_dim=192).state_dict()
    expected = layers("vit_tiny_patch16_224", state)
    found = attnlens.inspect(state, model="vit_tiny_patch16_224")
    assert found.stats.to_csv() == attnlens.inspect("vit_tiny_patch16_224", state).stats.to_csv()
    assert found.provenance["state_dict"] == f"{len(state)} tensors in memory"
    arrays = {name: value.numpy() for name, value in state.items()}
    for one, other in zip(layers(arrays, num_heads=3), expected, strict=True):
        np.testing.assert_array_equal(one.W_Q, other.W_Q)
    assert attnlens.fit_params("vit_tiny_patch16_224", checkpoint=state).entries
    with pytest.raises(UsageError, match=r"does not say which architecture.*model='vit_base_patch16_224'.*num_heads"):
        attnlens.inspect(state)
    with pytest.raises(UsageError, match="one too many"):
        attnlens.inspect(state, state, model="vit_tiny_patch16_224")


@pytest.mark.parametrize("name", CASES)
def test_a_live_model_of_transformers_is_read_as_its_folder(name, tmp_path):
    model = build(CASES[name])
    model.save_pretrained(tmp_path)
    live, saved = open_model(model, None), open_model(tmp_path, None)
    assert [spec.path for spec in live.architecture.specs] == [spec.path for spec in saved.architecture.specs]
    same(layers(model), layers(tmp_path))


@pytest.mark.parametrize("name", ["vit", "bert", "gpt2", "llama", "siglip vision"])
def test_a_live_model_of_transformers_is_initialised_and_verified(name):
    model = build(CASES[name]).float()
    before = copy.deepcopy(model.state_dict())
    report = attnlens.init_(model, seed=3)
    assert report.products
    assert attnlens.verify_init(model, init="mimetic", seed=3).passed
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert all("att" in key for key in changed)


def test_a_model_of_transformers_inside_a_network_of_ones_own_is_found():
    encoder = build(CASES["vit"])
    outer = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(33, 2), "attn": timm.layers.Attention(33, 3)})
    opened = open_model(outer, None)
    assert next(spec.path for spec in opened.architecture.specs).startswith("encoder.")
    assert [(one.path, one.reason) for one in opened.architecture.refused] == [
        ("attn", "stands beside encoder: give it alone")
    ]
    same(layers(outer), layers(encoder))
    two = nn.ModuleDict({"a": encoder, "b": build(CASES["bert"])})
    with pytest.raises(UsageError, match=r"several models of transformers: give one of them, as its a or b"):
        open_model(two, None)


def test_a_live_model_of_an_unknown_kind_says_so():
    config = transformers.FunnelConfig(vocab_size=19, block_sizes=[1], d_model=12, n_head=3, d_head=4, d_inner=7)
    with pytest.raises(
        UnsupportedAttentionError, match=r"model_type 'funnel' is not among those that are read\..*num_heads"
    ):
        attnlens.inspect(transformers.FunnelModel(config))


@pytest.mark.parametrize("num_heads", [0, -1, True, 1.5, "3"])
@pytest.mark.parametrize("given", [nn.MultiheadAttention(33, 3), nn.MultiheadAttention(33, 3).state_dict()])
def test_a_head_count_that_is_none_is_refused(num_heads, given):
    with pytest.raises(UsageError, match="is not a number of heads: give 1 or more"):
        attnlens.inspect(given, num_heads=num_heads)


@pytest.mark.parametrize("args", [[1], {1: 2}, {"norm_layer": nn.LayerNorm}, {"depth": torch.tensor(3)}])
def test_arguments_that_are_no_plain_data_are_refused(args):
    with pytest.raises(attnlens.AttnlensError, match=r"^model_args of this call "):
        attnlens.inspect("vit_tiny_patch16_224", vit().state_dict(), model_args=args)


def test_a_module_in_place_of_a_checkpoint_is_told_what_to_give():
    with pytest.raises(UsageError, match=r"a Linear is no checkpoint: give a file or a state dict"):
        attnlens.inspect("vit_tiny_patch16_224", nn.Linear(2, 2))


def headless(attention):
    attention.num_heads = 0


def without_proj(attention):
    del attention.proj


@pytest.mark.parametrize("spoil", [headless, without_proj])
def test_a_module_that_was_changed_after_it_was_built_is_refused_with_what_is_missing(spoil):
    model = vit()
    for block in model.blocks:
        spoil(block.attn)
    with pytest.raises(UnsupportedAttentionError, match=r"blocks.0.attn .* is not built as its class builds it \("):
        attnlens.inspect(model)
