"""The norm each projection reads and the LayerScale behind a layer, found by following a forward pass."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from attnlens.layouts import read_heads
from attnlens.layouts.describe import attention_modules
from attnlens.layouts.norms import norm_spec, trace_surroundings, with_surroundings
from attnlens.layouts.read_write import _input_norm
from attnlens.layouts.spec import AttentionSpec
from tests.layout_forms import skipped_where_timm_is_older


def traced(name: str) -> dict[str, AttentionSpec]:
    with skipped_where_timm_is_older(), torch.device("meta"):
        model = timm.create_model(name)
    return complete(model, model.pretrained_cfg["input_size"])


def complete(model: nn.Module, size: tuple[int, ...]) -> dict[str, AttentionSpec]:
    specs = [spec for spec in attention_modules(model) if isinstance(spec, AttentionSpec)]
    around = trace_surroundings(model, specs, [(torch.zeros(1, *size, device="meta"),)])
    return {
        spec.path: with_surroundings(spec, around[spec.path] if isinstance(around, dict) else None, model)
        for spec in specs
    }


@pytest.mark.parametrize(
    ("name", "path", "norms", "layer_scale", "flags"),
    [
        ("test_vit", "blocks.0.attn", {"qkv": ("layer", "blocks.0.norm1.weight")}, None, {"qk_bias"}),
        ("test_vit4", "blocks.0.attn", {"qkv": ("rms", "blocks.0.norm1.weight")}, "blocks.0.ls1.gamma", {"qk_bias"}),
        ("test_vit3", "attn_pool", {"kv": ("layer", "norm.weight")}, None, {"latent_query", "qk_bias"}),
        (
            "xcit_nano_12_p16_224",
            "cls_attn_blocks.0.attn",
            {"qkv": ("layer", "cls_attn_blocks.0.norm1.weight")},
            "cls_attn_blocks.0.gamma1",
            {"class_query", "qk_bias"},
        ),
        (
            "pvt_v2_b0",
            "stages.0.blocks.0.attn",
            {"q": ("layer", "stages.0.blocks.0.norm1.weight"), "kv": ("layer", "stages.0.blocks.0.attn.norm.weight")},
            None,
            {"spatial_reduction", "qk_bias"},
        ),
        (
            "pvt_v2_b2_li",
            "stages.0.blocks.0.attn",
            {"q": ("layer", "stages.0.blocks.0.norm1.weight")},
            None,
            {"spatial_reduction", "norm_not_folded", "qk_bias"},
        ),
        (
            "mobilenetv4_hybrid_medium",
            "blocks.2.4.attn",
            {
                "q": ("batch", "blocks.2.4.norm.weight"),
                "k": ("batch", "blocks.2.4.attn.key.norm.weight"),
                "v": ("batch", "blocks.2.4.attn.value.norm.weight"),
            },
            "blocks.2.4.layer_scale.gamma",
            {"spatial_reduction"},
        ),
        (
            "vit_pwee_patch16_reg1_gap_256",
            "blocks.0",
            {"qkv": ("layer", "blocks.0.in_norm.weight")},
            "blocks.0.ls.gamma",
            {"parallel_mlp", "qk_bias"},
        ),
        (
            "shvit_s1",
            "stages.1.blocks.0.mixer.m",
            {"qkv": ("group", "stages.1.blocks.0.mixer.m.pre_norm.weight")},
            None,
            {"passthrough", "act_before_proj", "qk_bias"},
        ),
        (
            "csatv2",
            "stages.3.5.attn",
            {"qkv": ("layer", "stages.3.5.norm1.weight")},
            None,
            {"tokens_mixed"},
        ),
        ("botnet26t_256", "stages.3.1.self_attn", {}, None, {"rel_pos_bias", "norm_after", "norm_not_folded"}),
        (
            "swinv2_tiny_window8_256",
            "layers.0.blocks.1.attn",
            {},
            None,
            {"rel_pos_bias", "cosine", "norm_after", "qk_bias"},
        ),
        (
            "efficientformerv2_s0",
            "stages.3.blocks.2.token_mixer",
            {},
            "stages.3.blocks.2.ls1.gamma",
            {"local_values", "act_before_proj", "rel_pos_bias", "talking_heads", "qk_bias"},
        ),
        (
            "eva02_tiny_patch14_224",
            "blocks.0.attn",
            {"qkv": ("layer", "blocks.0.norm1.weight")},
            None,
            {"rope", "qk_bias"},
        ),
    ],
)
def test_norms_and_layer_scale_are_those_of_the_forward_pass(name, path, norms, layer_scale, flags):
    found = traced(name)[path]
    assert {norm.roles: (norm.kind, norm.weight) for norm in found.norms} == norms
    assert found.layer_scale == layer_scale
    assert set(found.leaves_out) == flags


def test_a_latent_query_has_no_gain_while_keys_and_values_have():
    model = timm.create_model("test_vit3").double()
    nn.init.normal_(model.norm.weight)
    spec = complete(_copied_to_meta(model), (3, 160, 160))["attn_pool"]
    heads = read_heads(spec, {name: value.numpy() for name, value in model.state_dict().items()})
    assert heads.input_norm("q").gain is None
    assert not heads.input_norm("q").centres
    for role in "kv":
        np.testing.assert_array_equal(heads.input_norm(role).gain, model.norm.weight.detach())
        assert heads.input_norm(role).centres


def _copied_to_meta(model: nn.Module) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("test_vit3", num_classes=model.num_classes)


NORMS = [
    nn.LayerNorm(7),
    nn.RMSNorm(7),
    nn.BatchNorm2d(7),
    timm.layers.LayerNorm(7),
    timm.layers.LayerNorm2d(7),
    timm.layers.LayerNormFp32(7),
    timm.layers.LayerNorm2dFp32(7),
    timm.layers.RmsNorm(7),
    timm.layers.RmsNorm2d(7),
    timm.layers.RmsNormFp32(7),
    timm.layers.RmsNorm2dFp32(7),
    timm.layers.SimpleNorm(7),
    timm.layers.SimpleNorm2d(7),
    timm.layers.GroupNorm1(7),
    timm.layers.BatchNormAct2d(7, apply_act=False),
    timm.layers.LayerNormAct2d(7, apply_act=False),
    timm.layers.FrozenBatchNormAct2d(7, apply_act=False),
]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: f"{type(norm).__module__}.{type(norm).__name__}")
def test_the_gain_is_what_the_norm_multiplies_by_and_centring_what_it_takes_out(norm):
    torch.manual_seed(0)
    channels_first = "2d" in type(norm).__name__ or isinstance(norm, nn.GroupNorm)
    norm.eval()
    for name, value in [*norm.named_parameters(), *norm.named_buffers()]:
        if value.is_floating_point():
            nn.init.uniform_(value, 0.5, 2.0) if "var" in name else nn.init.normal_(value)
    modules = nn.ModuleDict({"norm": norm})
    gain = _input_norm(norm_spec(modules, "norm"), _arrays({"norm": norm}))
    axis = 1 if channels_first else -1
    x = torch.randn(5, 7, 3, 3) if channels_first else torch.randn(5, 3, 7)
    with torch.no_grad():
        y = norm(x).movedim(axis, -1)
        bias = getattr(norm, "bias", None)
        bias = torch.zeros(7) if bias is None else bias.clone()
        if norm_spec(modules, "norm").kind == "batch":
            plain = (x - norm.running_mean[:, None, None]).movedim(axis, -1)
        else:
            nn.init.ones_(norm.weight)
            if getattr(norm, "bias", None) is not None:
                nn.init.zeros_(norm.bias)
            plain = norm(x).movedim(axis, -1)
    torch.testing.assert_close(y, plain * torch.from_numpy(gain.gain).float() + bias, atol=1e-5, rtol=1e-5)
    assert gain.centres == (plain.mean(-1).abs().max().item() < 1e-5)


def _arrays(modules: dict[str, nn.Module]) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in nn.ModuleDict(modules).state_dict().items()}


class Undecided(nn.Module):
    """A network whose forward pass asks a tensor for its value, which a meta tensor does not have."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(12), timm.layers.AttentionRope(12, 3)

    def forward(self, x):
        return self.attn(self.norm(x)) if x.sum() > 0 else x


def test_a_network_that_cannot_be_traced_is_said_to_be_unknown():
    with torch.device("meta"):
        found = complete(Undecided(), (5, 12))["attn"]
    assert found.norms == ()
    assert {"norm_unknown", "rope_unknown"} <= set(found.leaves_out)


class Sliced(nn.Module):
    """A layer that reads half the channels of a norm: the gain has another length than the input."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(24), timm.layers.Attention(12, 3)

    def forward(self, x):
        return self.attn(self.norm(x)[..., :12])


def test_the_gain_of_a_norm_that_is_read_in_part_is_not_folded():
    with torch.device("meta"):
        found = complete(Sliced(), (5, 24))["attn"]
    assert found.norms == ()
    assert "norm_mixed" in found.leaves_out
