"""Which module is read by which rule, what is guessed, what is refused and what a user is told."""

from importlib import import_module

import pytest
import timm
import torch
from packaging.version import Version
from torch import nn

from attnlens.layouts import AttentionSpec, Refusal
from attnlens.layouts.describe import attention_modules, attention_spec, describe_attention, rules_by_class
from attnlens.layouts.flags import ATTRIBUTE_FLAGS, FLAGS
from tests.layout_forms import NEWEST, skipped_where_timm_is_older


class Strange(nn.Module):
    """A module of a class nobody described, with the shapes of family A."""

    def __init__(self, rows=45, inner=15, heads=3, **claims):
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(13, rows), nn.Linear(inner, 13)
        for name, value in claims.items():
            setattr(self, name, value)


def only(model: nn.Module):
    (found,) = attention_modules(model)
    return found


def test_an_unknown_class_of_the_standard_shapes_is_read_under_a_visible_label():
    found = only(nn.ModuleDict({"attn": Strange()}))
    assert isinstance(found, AttentionSpec)
    assert (found.label, found.path, found.scale) == ("layout guessed", "attn", 5**-0.5)
    with skipped_where_timm_is_older():
        known = attention_spec(timm.layers.Attention(13, num_heads=3, attn_head_dim=5), "attn")
    assert {role: slot.offset for role, slot in found.slots().items()} == {"q": 0, "k": 15, "v": 30, "o": 0}
    assert found.q.tensor == known.q.tensor == "attn.qkv.weight"


@pytest.mark.parametrize(
    "module",
    [
        Strange(rows=46),
        Strange(inner=16),
        Strange(heads=4),
        Strange(heads=None),
        Strange(head_first=True),
        Strange(num_kv_heads=1),
        Strange(head_dim=7),
        Strange(proj=nn.Identity()),
    ],
)
def test_a_guess_that_the_module_contradicts_is_not_made(module):
    found = only(module)
    assert isinstance(found, Refusal)
    assert found.family == "unknown"
    assert found.reason == "looks like attention, but its class and its layout are not known"


def test_projections_under_other_names_are_refused_and_not_passed_over():
    module = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")})
    assert isinstance(only(nn.Sequential(module)), Refusal)


def test_a_module_without_projections_is_no_attention():
    assert not list(attention_modules(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))))
    assert attention_spec(nn.Linear(8, 8), "") is None


def test_nothing_is_guessed_inside_a_module_that_is_read():
    module = timm.layers.Attention(12, num_heads=3)
    module.adapter = Strange()
    assert only(module).label == ""


def test_a_subclass_is_read_by_its_parents_rule_under_a_label():
    class Attention(timm.models.maxxvit.AttentionCl):
        pass

    found = only(Attention(10, dim_head=5))
    assert found.label == "layout of timm.models.maxxvit.AttentionCl"
    assert found.q.head_stride == 15, "the fallback would have read rows by role"


def test_a_subclass_of_a_refused_class_is_refused():
    class Attention(timm.models.mobilevit.LinearSelfAttention):
        pass

    assert isinstance(only(Attention(8)), Refusal)


@pytest.mark.parametrize(
    ("build", "family", "reason"),
    [
        (lambda: timm.models.mobilevit.LinearSelfAttention(8), "C7", "has no pairwise q k^T"),
        (lambda: timm.models.swiftformer.EfficientAdditiveAttention(8, 8), "C7", "has no pairwise q k^T"),
        (lambda: timm.models.volo.OutlookAttention(8, 2), "C7", "neither queries nor keys"),
        (import_module("timm.models.csatv2").SpatialTransformerBlock, "C7", "width one"),
        (lambda: timm.models.gcvit.WindowAttentionGlobal(8, 2, (2, 2), use_global=True), "C10", "there is no W_Q"),
        (lambda: timm.layers.AttentionPoolLatent(8, num_heads=2, q_proj=False), "P", "there is no W_Q"),
        (lambda: timm.layers.attention2d.MultiQueryAttentionV2(8), "C4", "three-dimensional"),
        (lambda: timm.layers.attention_pool.AttentionPoolPrr(8, 2), "P", "without any weights"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(build, family, reason):
    with skipped_where_timm_is_older():
        found = only(build())
    assert isinstance(found, Refusal)
    assert found.family == family
    assert reason in found.reason


def test_channel_attention_says_what_its_product_is_and_how_to_see_it():
    found = describe_attention(timm.models.xcit.XCA(8, 2), "blocks.3.attn")
    assert found.kind == "channel"
    refusal = found.opt_in_refusal()
    assert f"{refusal.path} {refusal.reason}" == (
        "blocks.3.attn is XCA (channel attention): its product never acts between tokens. "
        "Pass --include-channel to see it anyway."
    )


def test_linear_attention_says_what_its_product_is_and_how_to_see_it():
    found = describe_attention(timm.models.efficientvit_mit.LiteMLA(16, 16), "main")
    assert found.kind == "linear"
    assert found.opt_in_refusal().reason == (
        "is LiteMLA (linear attention): there is no softmax over its product. Pass --include-linear to see it anyway."
    )


def test_a_token_layer_needs_no_option():
    assert attention_spec(timm.layers.Attention(8, 2), "").opt_in_refusal() is None


def test_channel_attention_of_davit_is_read_by_what_its_blocks_do():
    found = attention_spec(timm.models.davit.ChannelAttention(10, 2), "")
    assert [slot.offset for slot in found.slots().values()] == [10, 20, 0, 0]
    assert found.label.startswith("scores come from the blocks stored as k and v")


def test_every_flag_a_rule_can_raise_is_explained():
    raised = set(ATTRIBUTE_FLAGS.values())
    for rules in rules_by_class().values():
        for rule in rules:
            raised |= {*rule.leaves_out, *filter(None, rule.flags.values())}
    assert raised <= set(FLAGS)


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (timm.layers.MultiQueryAttention2d(8, num_heads=2), set()),
        (timm.layers.MultiQueryAttention2d(8, num_heads=2, query_strides=2), {"q_pool"}),
        (timm.layers.MultiQueryAttention2d(8, num_heads=2, kv_stride=2), {"spatial_reduction"}),
        (timm.models.hiera.MaskUnitAttention(8, 8, 2, q_stride=4), {"q_pool", "qk_bias"}),
        *([(timm.layers.Attention(8, 2, gated=True), {"gate"})] if Version(timm.__version__) >= NEWEST else []),
        (timm.layers.Attention(8, 2, qk_norm=True, norm_layer=nn.LayerNorm), {"q_norm", "k_norm"}),
        (timm.layers.Attention(8, 2, scale_norm=True, norm_layer=nn.LayerNorm), {"norm_before_proj"}),
        (timm.layers.lambda_layer.LambdaLayer(8, num_heads=2), {"softmax_on_k", "rel_pos_bias", "qk_bias"}),
        (nn.MultiheadAttention(8, 2, bias=False, add_bias_kv=True), {"extra_key"}),
    ],
)
def test_flags_follow_the_attributes_of_the_module(module, flags):
    assert set(attention_spec(module, "").leaves_out) == flags


def test_torchvision_is_read_through_torch_multihead_attention():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        found = list(attention_modules(models.vit_b_16()))
    assert len(found) == 12
    first = found[0]
    assert (first.path, first.scale) == ("encoder.layers.encoder_layer_0.self_attention", 64**-0.5)
    assert first.q.tensor == f"{first.path}.in_proj_weight"
    assert first.o.tensor == f"{first.path}.out_proj.weight"
