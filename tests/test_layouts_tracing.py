"""Which norm is read and what scales an output: small networks, followed one step of a forward pass at a time."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from attnlens.layouts.describe import attention_modules
from attnlens.layouts.norms import trace_surroundings
from attnlens.layouts.tracing import Surroundings

WIDTH, TOKENS = 12, 5
NORMED = (("qkv", "before"),)
FOLDED, UNREAD = Surroundings(NORMED), Surroundings()
MIXED = Surroundings(NORMED, flags=("tokens_mixed",))
LOST, PART = Surroundings(flags=("norm_not_folded",)), Surroundings(flags=("norm_mixed",))
SCALED = Surroundings(NORMED, "gamma")


class Attention(nn.Module):
    """A layer of family A that is guessed; ``project`` and ``finish`` say how it gets from input to output."""

    def __init__(self, project=None, finish=None, width=WIDTH):
        super().__init__()
        self.num_heads, self.qkv, self.proj = 3, nn.Linear(width, 36), nn.Linear(12, 12)
        self.own = nn.Parameter(torch.ones(12))
        self.project = project or (lambda layer, x: layer.qkv(x))
        self.finish = finish or (lambda _layer, y, _x: y)

    def forward(self, x, rope=None, rope_mixed=None, shared_rel_pos=None, mask=None):  # noqa: ARG002  # their names count
        q, k, v = self.project(self, x).unflatten(-1, (3, 12)).unbind(-2)
        return self.finish(self, self.proj(functional.scaled_dot_product_attention(q, k, v)), x)


class Network(nn.Module):
    """A norm, a layer of attention and a few parts to put between, before and behind them, as ``step`` says."""

    def __init__(self, step, **parts):
        super().__init__()
        self.before, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.other, self.narrow = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH // 2)
        self.gamma = nn.Parameter(torch.ones(WIDTH))
        self.token = nn.Parameter(torch.ones(1, 1, WIDTH))
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, padding=1)
        self.grouped = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH // 2, padding=1)
        for name, part in parts.items():
            setattr(self, name, part)
        self.step = step

    def forward(self, x):
        return self.step(self, x)


def followed(model, *shape, path="attn"):
    specs = list(attention_modules(model.to("meta")))
    found = trace_surroundings(model, specs, [(torch.zeros(shape or (1, TOKENS, WIDTH), device="meta"),)])
    assert isinstance(found, dict), found
    return found[path]


def over_tokens(convolution, x):
    return convolution(x.mT).mT


def pooled(x, by=functional.avg_pool1d):
    return by(x.mT, 1).mT


READ = {
    "the norm": (lambda n, x: n.before(x), FOLDED),
    "no norm": (lambda _n, x: x, UNREAD),
    "a norm that is not the last": (lambda n, x: n.other(n.before(x)), Surroundings((("qkv", "other"),))),
    "moved tokens": (
        lambda n, x: n.before(x).roll(1, 1).flip(1)[:, :3].reshape(3, 1, WIDTH),
        UNREAD,
    ),  # flip is unknown
    "rolled tokens": (lambda n, x: n.before(x).roll(1, 1)[:, :3].reshape(3, 1, WIDTH).double().float(), FOLDED),
    "padded tokens": (lambda n, x: functional.pad(n.before(x), (0, 0, 0, 2)), FOLDED),
    "clamped tokens": (lambda n, x: n.before(x).clamp(-1, 1), FOLDED),
    "split tokens": (lambda n, x: n.before(x).split([2, 3], 1)[1], FOLDED),
    "chunks": (lambda n, x: n.before(x).chunk(2, 1)[1], FOLDED),
    "a pool": (lambda n, x: pooled(n.before(x)), MIXED),
    "two pools": (lambda n, x: pooled(pooled(n.before(x))), MIXED),
    "an adaptive pool": (
        lambda n, x: functional.adaptive_avg_pool2d(n.before(x).mT[..., None], (3, 1))[..., 0].mT,
        MIXED,
    ),
    "a pool of other things": (lambda _n, x: pooled(x), UNREAD),
    "an activation": (lambda n, x: n.before(x).relu(), LOST),
    "an activation behind a pool": (lambda n, x: functional.gelu(pooled(n.before(x))), LOST),
    "a pool behind an activation": (lambda n, x: pooled(n.before(x).tanh()), LOST),
    "an activation in place": (lambda n, x: n.before(x).relu_(), LOST),
    "two activations": (lambda n, x: n.before(x).relu().sigmoid(), LOST),
    "an activation of other things": (lambda _n, x: x.relu(), UNREAD),
    "an unknown operation": (lambda n, x: n.before(x).cumsum(1), UNREAD),
    "a depthwise convolution": (lambda n, x: over_tokens(n.depthwise, n.before(x)), MIXED),
    "two depthwise convolutions": (lambda n, x: over_tokens(n.depthwise, over_tokens(n.depthwise, n.before(x))), MIXED),
    "a depthwise convolution behind an activation": (lambda n, x: over_tokens(n.depthwise, n.before(x).relu()), LOST),
    "a depthwise convolution of other things": (lambda n, x: over_tokens(n.depthwise, x), UNREAD),
    "a convolution of two channels each": (lambda n, x: over_tokens(n.grouped, n.before(x)), UNREAD),
    "another token in front": (lambda n, x: torch.cat([n.token, n.before(x)], 1), PART),
    "another token behind": (lambda n, x: torch.cat([n.before(x), n.token], 1), PART),
    "another token and an activation": (lambda n, x: torch.cat([n.before(x), n.token], 1).relu(), LOST),
    "another token and a pool": (lambda n, x: pooled(torch.cat([n.before(x), n.token], 1)), PART),
    "another token and a depthwise convolution": (
        lambda n, x: over_tokens(n.depthwise, torch.cat([n.before(x), n.token], 1)),
        PART,
    ),
    "tokens of two norms": (lambda n, x: torch.cat([n.before(x), n.other(x)], 1), PART),
    "an activation of channels of two norms": (
        lambda n, x: torch.cat([n.before(x), n.narrow(x[..., :6])], -1).relu()[..., :WIDTH],
        LOST,
    ),
    "one norm twice": (lambda n, x: torch.cat([n.before(x), n.before(x)], 1), FOLDED),
    "one norm stacked": (lambda n, x: torch.stack([n.before(x), n.before(x)]).flatten(0, 1), FOLDED),
    "one norm and its pool": (lambda n, x: torch.cat([n.before(x), pooled(n.before(x))], 1), PART),
    "one pooled norm twice": (lambda n, x: torch.cat([pooled(n.before(x)), pooled(n.before(x))], 1), MIXED),
    "tokens of none": (lambda n, x: torch.cat([n.token, x], 1), UNREAD),
    "a sum of a norm": (lambda n, x: n.before(x) + n.before(x), FOLDED),
    "a sum with a pool": (lambda n, x: n.before(x) + pooled(n.before(x)), MIXED),
    "a pool summed with it": (lambda n, x: pooled(n.before(x)) + n.before(x), MIXED),
    "a sum of two norms": (lambda n, x: n.before(x) + n.other(x), UNREAD),
    "a sum of two activations": (lambda n, x: n.before(x).relu() + n.before(x).relu(), UNREAD),
    "a sum of a norm and its activation": (lambda n, x: n.before(x) + n.before(x).relu(), UNREAD),
    "a sum with something else": (lambda n, x: n.before(x) + x, UNREAD),
    "something else summed with it": (lambda n, x: x + n.before(x), UNREAD),
    "a number more": (lambda n, x: n.before(x) + 1.0, UNREAD),
    "a product": (lambda n, x: n.before(x) * n.gamma, UNREAD),
}


@pytest.mark.parametrize("case", READ)
def test_what_a_layer_reads_is_followed_through_every_step(case):
    step, expected = READ[case]
    assert followed(Network(lambda n, x: n.attn(step(n, x)))) == expected


BEHIND = {
    "nothing": (lambda _n, y: y, FOLDED),
    "a scale": (lambda n, y: y * n.gamma, SCALED),
    "a scale in front": (lambda n, y: n.gamma * y, SCALED),
    "a scale in place": (lambda n, y: y.mul_(n.gamma), SCALED),
    "a scale of a moved output": (lambda n, y: y.flatten(0, 1).reshape(1, -1, WIDTH) * n.gamma, SCALED),
    "a scale of a pool": (lambda n, y: pooled(y) * n.gamma, SCALED),
    "a scale of another shape": (lambda n, y: y * n.token, Surroundings(NORMED, "token")),
    "a scale beside other tokens": (lambda n, y: torch.cat([n.token, y], 1) * n.gamma, SCALED),
    "a scale beside a norm": (lambda n, y: torch.cat([n.before(n.token), y], 1) * n.gamma, SCALED),
    "a scale for every token of its own": (lambda n, y: y * n.table, FOLDED),
    "a number": (lambda _n, y: y * 2.0, FOLDED),
    "what is no parameter": (lambda _n, y: y * torch.ones(WIDTH, device="meta"), FOLDED),
    "a scale of the residual": (lambda n, y: (y + torch.zeros_like(y)) * n.gamma, FOLDED),
    "a scale behind an activation": (lambda n, y: y.relu() * n.gamma, FOLDED),
    "a scale of its own square": (lambda _n, y: y * y, FOLDED),
    "a norm": (lambda n, y: n.other(y), Surroundings(NORMED, flags=("norm_after",))),
    "a scale and a norm": (lambda n, y: n.other(y * n.gamma), Surroundings(NORMED, "gamma", ("norm_after",))),
    "a norm and a scale": (lambda n, y: n.other(y) * n.gamma, Surroundings(NORMED, flags=("norm_after",))),
    "a norm of the residual": (lambda n, y: n.other(y + torch.zeros_like(y)), FOLDED),
}


@pytest.mark.parametrize("case", BEHIND)
def test_what_stands_behind_a_layer_is_followed(case):
    step, expected = BEHIND[case]
    found = followed(Network(lambda n, x: step(n, n.attn(n.before(x))), table=nn.Parameter(torch.ones(TOKENS, WIDTH))))
    assert found == expected


INSIDE = {
    "nothing": (lambda _a, y, _x: y, None),
    "its own scale": (lambda a, y, _x: y * a.own, "attn.own"),
    "a bias more and its own scale": (lambda a, y, _x: (y + 1.0) * a.own, "attn.own"),
    "its own scale of something more": (lambda a, y, _x: (torch.ones_like(y) + y) * a.own, "attn.own"),
    "its input more and its own scale": (lambda a, y, x: (y + x) * a.own, None),
    "its own scale and its input": (lambda a, y, x: x + y * a.own, "attn.own"),
    "an activation": (lambda a, y, _x: y.relu() * a.own, None),
}


@pytest.mark.parametrize("case", INSIDE)
def test_a_scale_inside_a_layer_is_its_own(case):
    finish, scale = INSIDE[case]
    assert followed(Network(lambda n, x: n.attn(n.before(x)), attn=Attention(finish=finish))) == Surroundings(
        NORMED, scale
    )


@pytest.mark.parametrize("finish", [lambda _a, y, x: y + x, lambda _a, y, x: x + y])
def test_a_layer_that_adds_its_input_returns_the_residual_stream(finish):
    found = followed(Network(lambda n, x: n.other(n.attn(n.before(x)) * n.gamma), attn=Attention(finish=finish)))
    assert found == FOLDED
    found = followed(Network(lambda n, x: n.attn(x=n.before(x)) * n.gamma, attn=Attention(finish=finish)))
    assert found == FOLDED


def test_a_layer_that_adds_what_is_not_its_input_returns_its_output():
    finish = Attention(finish=lambda _a, y, x: y + x.clone())
    assert followed(Network(lambda n, x: n.attn(n.before(x)) * n.gamma, attn=finish)) == SCALED


def test_what_a_layer_projected_is_not_its_output_outside_of_it():
    kept = []

    def finish(_attention, y, _x):
        kept.append(y)
        return y.relu()

    network = Network(lambda n, x: (n.attn(n.before(x)), (kept[0] + 1.0) * n.gamma)[1], attn=Attention(finish=finish))
    assert followed(network) == FOLDED


@pytest.mark.parametrize("wrap", [lambda y: {"x": y}, lambda y: (y, None), lambda y: [[y]]])
def test_an_output_is_found_inside_of_what_a_layer_returns(wrap):
    def unwrap(value):
        while not isinstance(value, torch.Tensor):
            value = next(iter(value.values() if isinstance(value, dict) else value))
        return value

    attention = Attention(finish=lambda _a, y, _x: wrap(y.clone()))
    assert followed(Network(lambda n, x: unwrap(n.attn(n.before(x))) * n.gamma, attn=attention)) == SCALED


WAYS = {
    "linear": lambda a, x: functional.linear(x, a.qkv.weight),
    "linear with a bias": lambda a, x: functional.linear(x, a.qkv.weight, a.qkv.bias),
    "mm": lambda a, x: torch.mm(x[0], a.qkv.weight.t())[None],
    "addmm": lambda a, x: torch.addmm(a.qkv.bias, x[0], a.qkv.weight.t())[None],
    "matmul": lambda a, x: torch.matmul(x, a.qkv.weight.t()),
    "bmm": lambda a, x: torch.bmm(x, a.qkv.weight.t()[None]),
    "baddbmm": lambda a, x: torch.baddbmm(a.qkv.bias, x, a.qkv.weight.t()[None]),
    "convolution": lambda a, x: functional.conv1d(x.mT, a.qkv.weight[..., None]).mT,
}


@pytest.mark.parametrize("recorded", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
def test_a_projection_is_known_however_it_is_multiplied(way, recorded):
    """In inference mode operations arrive whole, `linear`, `matmul`, `conv1d` and `mT` among them."""

    @recorded()
    def run(network, x):
        return network.attn(network.before(x)) * network.gamma

    assert followed(Network(run, attn=Attention(WAYS[way]))) == SCALED
    half = Network(lambda n, x: n.attn(n.before(x)[..., :6]), attn=Attention(WAYS[way], width=6))
    half.step = recorded()(half.step)
    assert followed(half) == PART


def test_a_norm_without_a_gain_fits_every_slice():
    plain = nn.LayerNorm(WIDTH, elementwise_affine=False)
    network = Network(lambda n, x: n.attn(n.before(x)[..., :6]), before=plain, attn=Attention(width=6))
    assert followed(network) == FOLDED


def test_channels_of_images_are_counted_along_their_own_axis():
    whole = Network(lambda n, x: n.attn(n.before(x)), before=nn.GroupNorm(1, WIDTH), attn=Attention(on_images))
    assert followed(whole, 1, WIDTH, 3, 7) == FOLDED
    half = Network(
        lambda n, x: n.attn(n.before(x)[:, :6]), before=nn.GroupNorm(1, WIDTH), attn=Attention(on_images, width=6)
    )
    assert followed(half, 1, WIDTH, 3, WIDTH) == PART


def on_images(attention, x):
    return functional.conv2d(x, attention.qkv.weight[..., None, None]).flatten(2).mT


@pytest.mark.parametrize("recorded", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("channels", "expected"), [(1, UNREAD), (2, MIXED)])
def test_a_depthwise_convolution_has_more_than_one_channel(channels, expected, recorded):
    convolution = nn.Conv1d(channels, channels, 1, groups=channels)
    parts = {"before": nn.GroupNorm(1, channels), "mix": convolution, "attn": Attention(width=channels)}
    network = Network(recorded()(lambda n, x: n.attn(n.mix(n.before(x)).mT)), **parts)
    assert followed(network, 1, channels, TOKENS) == expected


class CrossAttention(timm.models.crossvit.CrossAttention):
    """Read what each projection is given by name."""

    def forward(self, given):
        for name, x in given.items():
            getattr(self, name)(x)
        return next(iter(given.values()))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            lambda n, x: {"wq": n.before(x), "wk": n.other(x), "wv": n.other(x)},
            ((("q", "before"), ("kv", "other")), ()),
        ),
        (lambda n, x: {"wv": n.before(x), "wk": x, "wq": n.before(x)}, ((("qv", "before"),), ())),
        (
            lambda n, x: {"wq": n.before(x), "wk": n.before(x).relu(), "wv": n.other(x).relu()},
            ((("q", "before"),), ("norm_not_folded",)),
        ),
        (
            lambda n, x: {"wq": pooled(n.before(x)), "wk": n.before(x), "wv": x},
            ((("qk", "before"),), ("tokens_mixed",)),
        ),
        (lambda n, x: {"wk": n.before(x)}, ((("k", "before"),), ("norm_unknown",))),
        (lambda n, x: {"wq": x, "wv": n.before(x)}, ((("v", "before"),), ("norm_unknown",))),
    ],
)
def test_each_role_is_told_the_norm_that_it_reads_and_each_flag_once(given, expected):
    network = Network(lambda n, x: n.attn(given(n, x)), attn=CrossAttention(WIDTH, 3))
    norms, flags = expected
    assert followed(network) == Surroundings(norms, flags=flags)


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({}, ()),
        ({"rope": None}, ()),
        ({"rope": torch.ones(1)}, ("rope",)),
        ({"rope_mixed": torch.ones(1)}, ("rope",)),
        ({"shared_rel_pos": torch.ones(1)}, ("rel_pos_bias",)),
        ({"mask": torch.ones(1)}, ()),
        ({"rope": 1, "rope_mixed": 2, "shared_rel_pos": 3}, ("rope", "rel_pos_bias")),
    ],
)
def test_positions_that_are_handed_to_a_layer_are_flagged(given, flags):
    assert followed(Network(lambda n, x: n.attn(n.before(x), **given))) == Surroundings(NORMED, flags=flags)
    by_place = [given.get(name) for name in ("rope", "rope_mixed", "shared_rel_pos", "mask")]
    assert followed(Network(lambda n, x: n.attn(n.before(x), *by_place))).flags == flags


def test_a_batch_norm_that_is_folded_into_a_layer_is_no_norm_before_or_behind_it():
    levit = timm.models.levit.Attention(WIDTH, 4, num_heads=3, attn_ratio=1, resolution=2)
    network = Network(lambda n, x: n.attn(n.before(x)) * n.gamma, attn=levit)
    assert followed(network, 1, 4, WIDTH) == SCALED
    assert followed(Network(lambda n, x: n.attn(x), attn=levit), 1, 4, WIDTH) == UNREAD


def test_a_norm_with_an_activation_inside_is_not_folded():
    act, plain = timm.layers.BatchNormAct2d(WIDTH), timm.layers.BatchNormAct2d(WIDTH, apply_act=False)
    for norm, expected in ((act, LOST), (plain, FOLDED)):
        network = Network(lambda n, x: n.attn(n.before(x)), before=norm, attn=Attention(on_images))
        assert followed(network, 1, WIDTH, 3, 7) == expected


def test_a_layer_that_is_called_twice_keeps_what_it_read_last_and_one_that_is_not_is_left_out():
    network = Network(lambda n, x: n.attn(n.other(n.attn(n.before(x)))), idle=Attention())
    assert followed(network) == Surroundings((("qkv", "other"),), flags=("norm_after",))
    specs = list(attention_modules(network))
    assert [spec.path for spec in specs] == ["attn", "idle"]
    assert set(trace_surroundings(network, specs, [(torch.zeros(1, TOKENS, WIDTH, device="meta"),)])) == {"attn"}


def test_layers_in_a_row_have_each_their_own():
    network = Network(lambda n, x: n.second(n.other(x + n.attn(n.before(x)) * n.gamma)) * n.last)
    network.second, network.last = Attention(), nn.Parameter(torch.ones(WIDTH))
    specs = list(attention_modules(network.to("meta")))
    found = trace_surroundings(network, specs, [(torch.zeros(1, TOKENS, WIDTH, device="meta"),)])
    assert found == {"attn": SCALED, "second": Surroundings((("qkv", "other"),), "last")}


def test_a_scale_of_two_outputs_side_by_side_is_that_of_the_first():
    network = Network(lambda n, x: torch.cat([n.attn(n.before(x)), n.idle(x)], 1) * n.gamma, idle=Attention())
    assert followed(network) == SCALED
    assert followed(network, path="idle") == UNREAD


class ScaledLevit(timm.models.levit.Attention):
    """Scales its own output, behind the BatchNorm of its output projection."""

    def __init__(self):
        super().__init__(WIDTH, 4, num_heads=3, attn_ratio=1, resolution=2)
        self.own = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return super().forward(x) * self.own


def test_a_batch_norm_that_is_folded_into_an_output_projection_hands_the_output_on():
    network = Network(lambda n, x: n.attn(n.before(x)), attn=ScaledLevit())
    assert followed(network, 1, 4, WIDTH) == Surroundings(NORMED, "attn.own")
