"""How a module comes to its layout: parts of projections, guesses, flags by attribute, names, and what is refused."""

import pytest
import timm
import torch
from torch import nn

from attnlens.errors import UnsupportedAttentionError
from attnlens.layouts import AttentionSpec, Refusal, Slot, builders
from attnlens.layouts.describe import _is_present, attention_modules, attention_spec, describe_attention
from attnlens.layouts.guess import LABEL, guess, looks_like_attention
from attnlens.layouts.registry import RULES, rule

WIDTH = 15


class Parts(nn.Module):
    """Projections, alone and with a BatchNorm behind them."""

    def __init__(self):
        super().__init__()
        self.plain, self.bare = nn.Linear(4, 12), nn.Linear(4, 12, bias=False)
        self.normed = nn.Sequential(nn.Conv2d(4, 12, 1, bias=False), nn.Identity(), nn.BatchNorm2d(12, eps=0.25))
        self.biased = nn.Sequential(nn.Dropout(), nn.Linear(4, 12), nn.BatchNorm1d(12))
        self.apart = nn.BatchNorm1d(12, eps=0.5)
        self.each = nn.ModuleList([nn.Linear(4, 6)])
        self.layer_normed = nn.Sequential(nn.Linear(4, 12), nn.LayerNorm(12))
        self.empty = nn.Sequential(nn.Identity(), nn.BatchNorm1d(12))


def slot(**fields):
    return Slot(**{"tensor": "plain.weight", "heads": 2, "width": 3, "head_stride": 3, "bias": "plain.bias", **fields})


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (lambda m: builders.rows(m, "plain", 2, 3), slot()),
        (lambda m: builders.rows(m, "plain", 2, 3, offset=5), slot(offset=5, bias_offset=5, batch_norm_offset=5)),
        (lambda m: builders.rows(m, "plain", 2, 3, head_stride=0), slot(head_stride=0)),
        (lambda m: builders.rows(m, "plain", 2, 3, own_bias="b"), slot()),
        (lambda m: builders.rows(m, "bare", 2, 3), slot(tensor="bare.weight", bias=None)),
        (
            lambda m: builders.rows(m, "bare", 2, 3, offset=5, own_bias="b"),
            slot(tensor="bare.weight", bias="b", offset=5, batch_norm_offset=5),
        ),
        (
            lambda m: builders.rows(m, "normed", 2, 3, offset=5),
            slot(
                tensor="normed.0.weight",
                bias=None,
                offset=5,
                batch_norm="normed.2",
                batch_norm_offset=5,
                batch_norm_eps=0.25,
            ),
        ),
        (
            lambda m: builders.rows(m, "biased", 2, 3),
            slot(tensor="biased.1.weight", bias="biased.1.bias", batch_norm="biased.2"),
        ),
        (
            lambda m: builders.rows(m, "each.{head}", 1, 3, offset=3),
            slot(
                tensor="each.{head}.weight",
                bias="each.{head}.bias",
                heads=1,
                head_stride=0,
                offset=3,
                bias_offset=3,
                batch_norm_offset=3,
            ),
        ),
        (lambda m: builders.columns(m, "plain", 2, 3), slot(axis=1)),
        (
            lambda m: builders.columns(m, "normed", 2, 3, interleaved=True),
            slot(
                tensor="normed.0.weight",
                bias=None,
                axis=1,
                head_stride=1,
                unit_stride=2,
                batch_norm="normed.2",
                batch_norm_eps=0.25,
            ),
        ),
        (
            lambda m: builders.behind(builders.rows(m, "plain", 2, 3, offset=5), m, "apart"),
            slot(offset=5, bias_offset=5, batch_norm="apart", batch_norm_eps=0.5),
        ),
    ],
)
def test_a_slot_names_each_part_of_a_projection(made, expected):
    assert made(Parts()) == expected


def test_blocks_follow_one_another_and_heads_lie_side_by_side():
    module = Parts()
    found = builders.blocks(module, "plain", 2, 1, 3, 2, start=7)
    assert [(one.offset, one.width, one.head_stride) for one in found] == [(7, 1, 1), (9, 3, 3), (15, 2, 2)]
    assert [one.offset for one in builders.blocks(module, "plain", 2, 1, 3)] == [0, 2]
    found = builders.by_head(module, "plain", 2, 1, 3, 2)
    assert [(one.offset, one.width, one.head_stride) for one in found] == [(0, 1, 6), (1, 3, 6), (4, 2, 6)]
    assert [builders.out_features(module, name) for name in ("plain", "normed")] == [12, 12]
    assert builders.is_identity(nn.Identity())
    assert not builders.is_identity(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("layer_normed", "has a LayerNorm behind layer_normed: only BatchNorm can be folded"),
        ("empty", "has no projection in empty, a Sequential"),
    ],
)
def test_what_is_no_projection_with_a_batch_norm_is_refused(name, told):
    with pytest.raises(UnsupportedAttentionError) as raised:
        builders.rows(Parts(), name, 2, 3)
    assert str(raised.value) == told


class Strange(nn.Module):
    """A module of a class nobody described, with the shapes of family A."""

    def __init__(self, rows=45, inner=15, heads=3, **claims):
        super().__init__()
        self.num_heads, self.qkv, self.proj = heads, nn.Linear(13, rows), nn.Linear(inner, 13)
        for name, value in claims.items():
            setattr(self, name, value)


CLAIMS = {"head_dim": 5, "key_dim": 5, "val_dim": 5, "num_kv_heads": 3, "head_first": False}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_guess_is_made_where_an_attribute_bears_it_out_and_not_where_it_speaks_against_it(name):
    for value in (None, CLAIMS[name]):
        assert guess(Strange(**{name: value})) == guess(Strange())
    other = True if name == "head_first" else CLAIMS[name] + 1
    assert guess(Strange(**{name: other})) is None


@pytest.mark.parametrize(
    ("module", "heads"),
    [
        (Strange(), 3),
        (Strange(heads=1), 1),
        (Strange(heads=5), 5),
        (Strange(heads=15), 15),
        (Strange(rows=3, inner=1, heads=1), 1),
        (Strange(heads=0), None),
        (Strange(heads=-1), None),
        (Strange(heads=3.0), None),
        (Strange(heads=2), None),
        (Strange(rows=46), None),
        (Strange(rows=47), None),
        (Strange(inner=14), None),
        (Strange(inner=45), None),
        (Strange(qkv=nn.Conv2d(13, 45, 1)), None),
        (Strange(proj=nn.Identity()), None),
    ],
)
def test_a_guess_needs_shapes_that_allow_nothing_else(module, heads):
    found = guess(module)
    assert (found and found["q"].heads) == heads
    if heads:
        total = module.proj.in_features
        assert [one.offset for one in found.values()] == [0, total, 2 * total, 0]
        assert {one.width for one in found.values()} == {total // heads}


def with_parts(**parts):
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


@pytest.mark.parametrize(
    ("parts", "looks"),
    [
        (["qkv"], True),
        (["to_qkv"], True),
        (["Wqkv"], True),
        (["in_proj_weight"], True),
        (["q", "k", "v"], True),
        (["q_proj", "k_proj", "v_proj"], True),
        (["wq", "wk", "wv"], True),
        (["query", "key", "value"], True),
        (["to_q", "to_k", "to_v"], True),
        (["q", "k"], False),
        (["q", "k_proj", "wv"], False),
        (["mlp"], False),
        ([], False),
    ],
)
def test_attention_is_known_by_the_names_of_its_projections(parts, looks):
    assert looks_like_attention(with_parts(**{name: nn.Linear(2, 3) for name in parts})) is looks
    assert looks_like_attention(with_parts(**{name: nn.Parameter(torch.ones(2, 3)) for name in parts})) is looks
    assert not looks_like_attention(with_parts(**{name: nn.Parameter(torch.ones(3)) for name in parts}))
    assert not looks_like_attention(with_parts(**{name: nn.Identity() for name in parts}))


@pytest.mark.parametrize(
    ("value", "present"),
    [
        (None, False),
        (False, False),
        (True, True),
        (1, False),
        (0, True),
        (2, True),
        (nn.Identity(), False),
        (nn.ReLU(), True),
        (torch.ones(1), True),
        ((1, 1), True),
    ],
)
def test_an_attribute_is_present_where_it_adds_something(value, present):
    module = with_parts(part=value)
    assert _is_present(module, "part") is present
    assert _is_present(with_parts(inner=module), "inner.part") is present
    assert not _is_present(module, "part.absent")
    assert not _is_present(module, "absent")


def test_a_guess_is_labelled_and_scaled_by_its_own_scale_or_by_the_width_of_a_head():
    for scale, told in ((None, 5**-0.5), (0.125, 0.125), (2, 2.0), (torch.ones(1), 5**-0.5), ("no", 5**-0.5)):
        found = attention_spec(Strange(scale=scale), "a")
        assert (found.label, found.family, found.scale, found.kind) == (LABEL, "A", told, "token")
        assert found.leaves_out == ("qk_bias",)
    assert attention_spec(with_parts(q=nn.Linear(2, 2), k=nn.Linear(2, 2), v=nn.Linear(2, 2)), "a") is None
    assert attention_spec(nn.Identity(), "a") is None


def test_names_begin_with_the_path_of_the_module_and_with_nothing_at_the_root():
    levit = timm.models.levit.Attention(8, 2, num_heads=2, resolution=2)
    root, placed = (describe_attention(levit, path) for path in ("", "a.b"))
    assert root.path == ""
    assert root.tensors()[0] == "qkv.linear.weight"
    assert placed.tensors() == tuple(f"a.b.{name}" for name in root.tensors())
    assert set(root.tensors()) <= set(levit.state_dict())


def test_nothing_is_guessed_inside_of_what_was_described_and_its_neighbours_are():
    model = nn.ModuleDict({"at": timm.layers.Attention(12, 3), "att": Strange(), "refused": nn.ModuleDict()})
    model["at"].inner = Strange()
    model["at"].known = timm.models.cait.ClassAttn(12, 3)
    model["refused"].update({name: nn.Linear(2, 2) for name in ("q", "k", "v")})
    model["refused"]["inner"] = Strange()
    found = {item.path: type(item) for item in attention_modules(model)}
    assert found == {"at": AttentionSpec, "at.known": AttentionSpec, "att": AttentionSpec, "refused": Refusal}
    whole = Strange()
    whole.inner = Strange()
    assert [item.path for item in attention_modules(whole)] == [""]


def test_a_subclass_keeps_the_label_of_its_rule_behind_that_of_its_parent():
    class Own(timm.models.davit.ChannelAttention):
        pass

    found = describe_attention(Own(10, 2), "a")
    plain = describe_attention(timm.models.davit.ChannelAttention(10, 2), "a")
    assert found.label == f"layout of timm.models.davit.ChannelAttention; {plain.label}"
    assert found.module_class.endswith("Own")
    assert found.q == plain.q


class Known(nn.Module):
    """A class that a rule is made for, in a test."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False), nn.Linear(4, 6)


NAME = f"{Known.__module__}.Known"


@pytest.fixture
def ruled():
    yield lambda family, describe, **about: rule(family, NAME, **about)(describe)
    RULES.pop(NAME, None)


def described(module):
    return {role: builders.rows(module, role, 3, 2) for role in "qkv"}


def test_the_first_rule_that_applies_is_used(ruled):
    ruled("B1", lambda _module: None)
    ruled(
        "B2", described, label="second", leaves_out=("gate", "rope"), flags={"v": "rope", "k": "cosine", "none": "gate"}
    )
    ruled("B3", described)
    found = describe_attention(Known(), "a")
    assert (found.family, found.label, found.o) == ("B2", "second", None)
    assert found.leaves_out == ("gate", "rope", "cosine")
    assert found.scale == 1.0


@pytest.mark.parametrize("role", ["q", "k", "v"])
@pytest.mark.parametrize("part", ["bias", "batch norm"])
def test_a_bias_of_queries_or_keys_is_flagged_and_one_of_values_is_not(ruled, role, part):
    def describe(module):
        slots = {name: builders.rows(module, name, 3, 2) for name in "qkv"}
        return {**slots, role: builders.behind(slots[role], module, "norm") if part != "bias" else slots[role]}

    ruled("B2", describe, sdpa_scale=True)
    module = Known()
    module.norm = nn.BatchNorm1d(6)
    if part == "bias":
        setattr(module, role, nn.Linear(4, 6))
    found = describe_attention(module, "a")
    assert found.leaves_out == (() if role == "v" else ("qk_bias",))
    assert found.scale == 2**-0.5


def test_a_general_flag_may_be_taken_back_by_the_rule(ruled):
    ruled("B2", described, flags={"q_norm": None})
    module = Known()
    module.q_norm = module.k_norm = nn.LayerNorm(2)
    assert describe_attention(module, "a").leaves_out == ("k_norm",)


@pytest.mark.parametrize("error", [AttributeError, TypeError, ValueError, LookupError, KeyError, ZeroDivisionError])
def test_a_module_that_was_rebuilt_is_refused_and_one_that_was_quantised_is_named_so(ruled, error):
    def describe(_module):
        raise error("odd")

    ruled("B2", describe)
    told = str(error("odd"))
    reason = f"is not built as its class builds it ({error.__name__}: {told})"
    assert describe_attention(Known(), "a") == Refusal("a", NAME, "B2", reason)

    class Quantised(nn.Module):
        def weight(self):
            return None

    module = Known()
    module.q = Quantised()
    assert describe_attention(module, "a").reason == (
        f"holds quantised layers ({Quantised.__module__}.{Quantised.__qualname__}), which store codes: give the "
        "network from before it was quantised"
    )


def test_a_rule_that_refuses_says_why(ruled):
    def describe(_module):
        raise UnsupportedAttentionError("has no product")

    ruled("P", describe)
    assert describe_attention(Known(), "a") == Refusal("a", NAME, "P", "has no product")
    RULES.pop(NAME)
    ruled("C10", lambda _module: None, refusal="never")
    ruled("C10", lambda _module: {}, refusal="is refused")
    assert describe_attention(Known(), "a") == Refusal("a", NAME, "C10", "is refused")


def test_what_is_no_attention_is_not_described():
    assert describe_attention(nn.Linear(2, 2), "a") is None
    assert list(attention_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))) == []
