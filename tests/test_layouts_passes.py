"""The forward pass that is followed, what is told where none can be, and the norms that come into a layout."""

import pytest
import timm
import torch
from torch import nn

from attnlens.layouts.describe import attention_modules
from attnlens.layouts.norms import norm_spec, trace_surroundings, with_surroundings
from attnlens.layouts.spec import NormSpec
from attnlens.layouts.tracing import Surroundings, norm_kind
from tests.test_layouts_tracing import FOLDED, WIDTH, Attention, Network, followed


def test_a_pass_leaves_no_hook_and_the_mode_as_it_was():
    network = Network(lambda n, x: n.attn(n.before(x)))
    for mode in (True, False):
        network.train(mode)
        assert followed(network) == FOLDED
        assert all(module.training is mode for module in network.modules())
        for module in network.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_a_pass_is_made_as_in_use_and_not_as_in_training():
    seen = []
    followed(Network(lambda n, x: (seen.append((n.training, torch.is_grad_enabled())), n.attn(n.before(x)))[1]))
    assert seen == [(False, False)]


def test_the_first_input_that_is_taken_is_used_and_the_first_failure_told():
    network = Network(lambda n, x: n.attn(n.before(x))).to("meta")
    specs = list(attention_modules(network))
    good, small, flat = ((torch.zeros(1, 5, width, device="meta"),) for width in (WIDTH, 7, 3))
    assert trace_surroundings(network, specs, [small, flat, good]) == {"attn": FOLDED}
    told = trace_surroundings(network, specs, [small, flat])
    assert told.startswith("with an input of 1x5x7 float32 it raised RuntimeError: Given normalized_shape=[12]")
    assert "\n" not in told
    assert trace_surroundings(network, specs, []) == "no input was given"


class Failing(nn.Module):
    def forward(self, *_given):
        raise KeyError


def test_a_failure_without_words_is_told_by_its_kind_and_the_first_thing_that_went_in():
    given = (torch.zeros(2, 3, dtype=torch.int64, device="meta"), torch.zeros(5, device="meta"))
    assert trace_surroundings(Failing(), [], [given]) == "with an input of 2x3 int64 it raised KeyError"


@pytest.mark.parametrize(
    ("attention", "flags"), [(Attention(), ("norm_unknown", "rope_unknown")), (None, ("norm_unknown",))]
)
def test_what_was_not_followed_is_flagged_as_unknown_behind_what_is_known(attention, flags):
    model = nn.ModuleDict({"attn": attention or timm.models.cait.ClassAttn(WIDTH, 3)})
    (spec,) = attention_modules(model)
    found = with_surroundings(spec, None, model)
    assert found == spec.replace(leaves_out=(*spec.leaves_out, *flags))
    assert len(spec.leaves_out) > 0
    again = with_surroundings(found, Surroundings(flags=("norm_unknown",)), model)
    assert again == found


def test_norms_and_scale_come_into_the_layout_whole():
    model = Network(lambda _n, x: x, before=nn.BatchNorm1d(WIDTH, eps=0.25), other=nn.RMSNorm(WIDTH))
    (spec,) = attention_modules(model)
    found = with_surroundings(spec, Surroundings((("q", "before"), ("kv", "other")), "gamma", ("rope",)), model)
    assert found == spec.replace(
        norms=(
            NormSpec(kind="batch", roles="q", weight="before.weight", variance="before.running_var", eps=0.25),
            NormSpec(kind="rms", roles="kv", weight="other.weight", eps=0.0),
        ),
        layer_scale="gamma",
        leaves_out=(*spec.leaves_out, "rope"),
    )


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        (nn.LayerNorm(3, eps=0.5), NormSpec(kind="layer", weight="n.weight", eps=0.5)),
        (nn.LayerNorm(3, elementwise_affine=False), NormSpec(kind="layer")),
        (nn.GroupNorm(1, 3), NormSpec(kind="group", weight="n.weight")),
        (nn.BatchNorm2d(3, affine=False), NormSpec(kind="batch", variance="n.running_var")),
        (timm.layers.SimpleNorm(3), NormSpec(kind="rms", weight="n.weight", eps=1e-6)),
    ],
)
def test_a_norm_is_described_by_its_kind_and_tensors(norm, expected):
    model = nn.ModuleDict({"n": norm})
    assert norm_spec(model, "n") == expected
    assert norm_spec(model, "n", "kv").roles == "kv"
    assert norm_kind(norm) == expected.kind


def test_what_is_no_norm_has_no_kind():
    assert norm_kind(nn.Linear(3, 3)) is None
    assert norm_kind(nn.Identity()) is None
    named = type("MyLayerNormWrapper", (nn.Module,), {})
    for attributes in ((), ("weight",), ("eps",)):
        module = named()
        for name in attributes:
            setattr(module, name, torch.ones(1))
        assert norm_kind(module) is None
    with pytest.raises(AssertionError, match="n is a Linear, not a norm"):
        norm_spec(nn.ModuleDict({"n": nn.Linear(3, 3)}), "n")
