"""Words are checked at every door: any case, either spelling; errors name what is accepted; numpy's integers count."""

from types import SimpleNamespace

import numpy as np
import pytest

import attnlens
from attnlens.errors import UsageError
from attnlens.inspection import Inspection
from attnlens.vocabulary import CIRCUIT, FOLD, Vocabulary, coverage, index, layer_choice, spelled_alike


@pytest.fixture(scope="module")
def seen() -> Inspection:
    return attnlens.inspect(fold="all")


@pytest.fixture(scope="module")
def params():
    return attnlens.fit_params()


@pytest.mark.parametrize(
    ("british", "american"),
    [
        ("centred", "centered"),
        ("centring", "centering"),
        ("Centre", "CENTER"),
        ("normalised", "normalized"),
        ("realised_requested", "realized requested"),
        ("colour", "color"),
        ("grey", "gray"),
        ("labelled", "labeled"),
    ],
)
def test_both_spellings_are_one_word(british, american):
    assert spelled_alike(british) == spelled_alike(american)


@pytest.mark.parametrize("word", ["raised", "noise", "basis", "precise", "this"])
def test_a_word_that_only_looks_british_keeps_apart_from_no_other_word(word):
    words = ("raised", "noise", "basis", "precise", "this")
    assert len({spelled_alike(one) for one in words}) == len(words)
    assert Vocabulary("word", words)(word.upper()) == word


@pytest.mark.parametrize("given", ["centred", "centered", "CENTERED", " Centred "])
def test_a_fold_in_any_spelling_is_the_same_product(seen, given):
    expected = seen.circuits(1, head=2, circuit="ov", fold="centred").dense()
    assert np.array_equal(seen.circuits(1, head=2, circuit="OV", fold=given).dense(), expected)


def test_folds_of_other_case_are_not_another_fold(seen):
    raw = seen.circuits(1, head=2, circuit="ov", fold="raw").dense()
    assert np.array_equal(seen.circuits(1, head=2, circuit="ov", fold="Raw").dense(), raw)
    assert not np.array_equal(seen.circuits(1, head=2, circuit="ov", fold="effective").dense(), raw)


DOORS = {
    "inspect fold": (lambda _: attnlens.inspect(fold="eff"), "raw, effective, centred, balanced, both, all"),
    "inspect include": (lambda _: attnlens.inspect(include="chanel"), "did you mean channel"),
    "inspect layers": (lambda _: attnlens.inspect(layers=[-1]), "layer -1 is no index"),
    "inspect layers text": (lambda _: attnlens.inspect(layers="3-1"), "give indices and ranges, e.g. 0-3,11"),
    "circuits fold": (lambda s: s.seen.circuits(0, fold="eff"), "choose raw, effective, centred, balanced"),
    "circuits circuit": (lambda s: s.seen.circuits(0, circuit="kq"), "choose qk, ov"),
    "circuits head": (lambda s: s.seen.circuits(0, head=3), "head 3 of layer 0 does not exist: choose 0 to 2"),
    "circuits truth": (lambda s: s.seen.circuits(0, head=True), "head True of layer 0 does not exist"),
    "circuits text": (lambda s: s.seen.circuits(0, head="al"), "head 'al' of layer 0 does not exist"),
    "circuits layer": (lambda s: s.seen.circuits(9), r"layer 9 was not read: choose from \[0, 1, 2, 3, 4, 5\]"),
    "heads": (lambda s: s.seen.heads(-1), "layer -1 was not read"),
    "figures": (lambda s: s.seen.figures("eff"), "choose raw, effective"),
    "corners": (lambda s: s.seen.corners("Rw", 7), "fold 'Rw' is not known"),
    "select circuit": (lambda s: s.seen.stats.select(circuit="vo"), "choose qk, ov"),
    "select fold": (lambda s: s.seen.stats.select(fold="eff"), "choose raw"),
    "select head": (lambda s: s.seen.stats.select(head="0"), "head '0' is neither an index nor 'all'"),
    "select layer": (lambda s: s.seen.stats.select(layer="0"), "layer '0' is no index"),
    "select column": (lambda s: s.seen.stats.select(circ="ov"), "column 'circ' is not known"),
    "column": (lambda s: s.seen.stats.column("betta"), "did you mean beta"),
    "column of words": (lambda s: s.seen.stats.column("circuit"), "holds words, no numbers"),
    "fit fold": (lambda _: attnlens.fit_params(fold="eff"), "choose raw"),
    "fit per": (lambda _: attnlens.fit_params(per="heads"), r"did you mean head\?\): choose head, layer, model"),
    "fit level": (lambda _: attnlens.fit_params(level=95), "95 % is 0.95"),
    "fit shrinkage": (lambda _: attnlens.fit_params(shrinkage="lw"), "choose ledoit-wolf, oas, none"),
    "params circuit": (lambda s: s.params.select("vo", "each"), "choose qk, ov"),
    "params head": (lambda s: s.params.select("ov", "every"), "choose each, all"),
    "params fold": (lambda s: s.params.select("ov", "all", fold="eff"), "choose raw"),
    "compare": (lambda _: attnlens.compare(None, None, fold="both"), "choose raw, effective, centred, balanced"),
    "compose fold": (lambda _: attnlens.compose(fold="eff"), "choose raw"),
    "compose layers": (lambda _: attnlens.compose(layers=[0, True]), "layer True is no index"),
    "initialiser": (lambda _: attnlens.create_model("vit_tiny_patch16_224", "mimetik", depth=1), "mimetic"),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_word_that_is_none_is_told_with_those_that_are(seen, params, door):
    call, message = DOORS[door]
    with pytest.raises(UsageError, match=message) as told:
        call(SimpleNamespace(seen=seen, params=params))
    assert "\n" not in str(told.value)


def test_numbers_of_numpy_are_indices(seen):
    assert np.array_equal(seen.circuits(np.int64(1), np.int32(2)).dense(), seen.circuits(1, 2).dense())
    assert len(seen.stats.select(layer=np.int64(0))) == len(seen.stats.select(layer=0)) > 0
    assert attnlens.inspect(layers=np.array([0, 2])).layers == (0, 2)


def test_layers_are_one_index_several_or_text():
    assert [layer_choice(given) for given in (None, 2, [0, 2], "0-2,5", range(2))] == [
        None,
        [2],
        [0, 2],
        [0, 1, 2, 5],
        [0, 1],
    ]


@pytest.mark.parametrize("value", [True, 1.0, "1", -1, None])
def test_what_is_no_index_is_refused(value):
    with pytest.raises(UsageError, match="is no index"):
        index("head", value)


@pytest.mark.parametrize("level", [0, 1, True, "0.95", float("nan"), 95])
def test_what_is_no_coverage_is_refused(level):
    with pytest.raises(UsageError, match="is not a coverage probability"):
        coverage(level)


def test_the_words_are_the_types():
    from typing import get_args

    from attnlens import circuits
    from attnlens.composition import Composed
    from attnlens.filters.entries import Estimator
    from attnlens.fit.entries import Heads
    from attnlens.fit.params import Per
    from attnlens.layouts.spec import OPT_IN
    from attnlens.vocabulary import COMPOSED, HEADS, ON_REQUEST, PER, SHRINKAGE

    types = {
        FOLD: circuits.Fold,
        CIRCUIT: circuits.Kind,
        PER: Per,
        HEADS: Heads,
        COMPOSED: Composed,
        SHRINKAGE: Estimator,
    }
    assert {words.name: words.words for words in types} == {words.name: get_args(of) for words, of in types.items()}
    assert FOLD.words == circuits.FOLDS
    assert set(ON_REQUEST.words) == set(OPT_IN)


@pytest.mark.parametrize("fold", ["raw", "effective"])
def test_an_option_of_an_initialiser_in_another_case_draws_the_same(fold):
    import torch

    drawn = []
    for given in (fold, fold.upper()):
        module = attnlens.create_model(
            "vit_tiny_patch16_224", "default", depth=1, embed_dim=24, num_heads=2, img_size=32
        )
        with torch.no_grad():
            module.blocks[0].norm1.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(0))
        attnlens.init_(module, "Transfer_Attention", teacher=_teacher(), fold=given, keep="Weights")
        drawn.append(module.blocks[0].attn.qkv.weight.detach().clone())
    assert torch.equal(*drawn)


def _teacher():
    import torch

    teacher = attnlens.create_model("vit_tiny_patch16_224", "mimetic", depth=1, embed_dim=24, num_heads=2, img_size=32)
    with torch.no_grad():
        teacher.blocks[0].norm1.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    return teacher


@pytest.mark.parametrize("layers", ["0-99999999", "9" * 5000, "0-9999,0-9999,0-9999", range(10**12), [10**5000]])
def test_more_layers_than_a_network_has_are_never_counted_out(layers):
    with pytest.raises(UsageError, match="names more layers than a network has"):
        layer_choice(layers)
