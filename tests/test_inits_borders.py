"""Where what is accepted ends: rounding of narrow types, options, teachers, position embeddings, one draw or two."""

import dataclasses
import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from attnlens.circuits import FactoredProduct, layer_ov, qk_circuit
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.fit.fit_params import fit_params
from attnlens.inits import init_, verify_init
from attnlens.inits.file import METADATA_KEY
from attnlens.inits.plan import Plan
from attnlens.inits.products import padded
from attnlens.inits.registry import find_initialiser, initialisers
from attnlens.inits.rules.conditioned import _identity_blocks
from attnlens.inits.rules.filters import _given, _resolved_shape
from attnlens.inits.rules.fitted import load_params
from attnlens.inits.rules.impulse import _embedding, _places, _Positions, _shift
from attnlens.inits.rules.reduced import keeping
from attnlens.inits.verify import verify
from attnlens.inits.verify.factors import skipped_directions
from attnlens.inits.verify.mistakes import clones
from attnlens.inits.verify.record import Claim, recorded
from attnlens.inits.verify.verify import _builder
from attnlens.models.opened import OpenedModel
from tests.drawn_cases import NETWORKS, rope, teacher, vit
from tests.filter_models import both
from tests.test_inits_limits import layers_of
from tests.test_inits_pieces import row_of

# What storing in a narrow type may cost.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("roundings", "passes"), [(3.5, True), (4.6, False)])
@torch.no_grad()
def test_products_biases_and_filters_of_narrow_types_are_held_to_four_roundings(dtype, roundings, passes):
    eps = torch.finfo(dtype).eps
    scaled, biased = vit(), vit()
    for model in (scaled, biased):
        init_(model, "mimetic", seed=3)
    scaled.blocks[0].attn.qkv.weight[:26] *= 1 + roundings * eps
    biased.blocks[0].attn.qkv.bias[7] = roundings * eps
    for model in (scaled, biased):
        assert verify_init(model.to(dtype), init="mimetic", seed=3).passed == passes
    filters, bias = both(), both()
    for model in (filters, bias):
        init_(model, "conv-covariance", seed=3)
    weight = filters.mix.weight
    weight.view(-1)[weight.abs().argmin()] += roundings * eps * weight.norm()
    bias.mix.bias[3] = roundings * eps
    for model in (filters, bias):
        assert verify_init(model.to(dtype), init="conv-covariance", seed=3).passed == passes


def test_the_coarsest_type_of_a_layer_counts():
    model = vit()
    init_(model, "mimetic", seed=3)
    model.blocks[0].attn.proj.to(torch.bfloat16)
    (limit,) = {c.matrix_tolerance for c in verify_init(model, init="mimetic", seed=3).checks if c.layer == 0}
    assert limit == 4 * 2**-7


@pytest.mark.parametrize(("cosine", "repeats"), [(0.49, False), (0.51, True)])
def test_off_diagonals_are_one_draw_above_a_cosine_of_a_half(cosine, repeats):
    A, B = np.random.default_rng(0).normal(size=(2, 2, 90, 6))
    one, other = (a @ b.T * ~np.eye(90, dtype=bool) for a, b in zip(A, B, strict=True))
    x, y, z = (one**2).sum(), (one * other).sum(), (other**2).sum()
    # (x + t y) / sqrt(x (x + 2 t y + t^2 z)) = cosine
    roots = np.roots([y**2 - cosine**2 * x * z, 2 * x * y * (1 - cosine**2), x**2 * (1 - cosine**2)])
    t = float(max(roots.real))
    pair = FactoredProduct(
        np.stack([np.hstack([A[0], 0 * A[1]]), np.hstack([A[0], t * A[1]])]), np.stack([np.hstack([B[0], B[1]])] * 2)
    )
    assert bool(clones(pair)) == repeats


# Options.


def test_shares_and_widths_are_accepted_up_to_one():
    assert _given(blur=1.0, slope=0.0, relative_s=1.0, contrast=None) == {"blur": 1.0, "slope": 0.0, "relative_s": 1.0}
    for wrong, text in (
        ({"blur": 1.0001}, r"^blur = 1\.0001 is not accepted: pass a share of the trace, from 0 to 1$"),
        ({"relative_s": 1.0001}, r"^relative_s = 1\.0001 is not accepted: pass s / side\^2, above 0 and up to 1$"),
        ({"relative_s": 0.0}, r"^relative_s = 0 is not accepted"),
        ({"contrast": -1e-9}, r"^contrast = -1e-09 is not accepted: pass a number of at least 0$"),
    ):
        with pytest.raises(UsageError, match=text):
            _given(**wrong)
    whole = {"blur": 0.5, "slope": 0.25, "contrast": 0.25}
    assert _resolved_shape(False, whole)._asdict().items() >= whole.items()
    _resolved_shape(True, {**whole, "blur": 0.5 + 5e-10})  # rounding
    for strided, title in ((False, "1"), (True, "above 1")):
        with pytest.raises(UsageError, match=rf"0\.5, 0\.25 and 0\.26 in layers of stride {title}: shares of one"):
            _resolved_shape(strided, {**whole, "contrast": 0.26})


def test_a_name_that_is_like_none_is_answered_with_all():
    with pytest.raises(UsageError, match=r"^no initialiser is named 'xyz': choose from (?:[a-z-]+, ){13}[a-z-]+$"):
        find_initialiser("xyz")
    with pytest.raises(
        UsageError, match=r"^no initialiser is named 'transfer': did you mean transfer-\w+ or transfer-"
    ):
        find_initialiser("transfer")
    with pytest.raises(UsageError, match=r"^no initialiser is named 'norm': did you mean norm-matched\?$"):
        find_initialiser("norm")
    with pytest.raises(UsageError, match=r"has no option 'bta_qk' \(did you mean beta_qk\?\): it accepts alpha_qk, "):
        init_(vit(), "mimetic", bta_qk=1)
    with pytest.raises(UsageError, match=r"^initialiser 'mimetic' has no option 'xyz': it accepts "):
        init_(vit(), "mimetic", xyz=1)
    with pytest.raises(UsageError, match=r"^initialiser 'default' has no option 'x': it accepts none$"):
        init_(vit(), "default", x=1)
    assert len(initialisers()) == 14


def test_parameters_are_a_fit_the_path_of_one_or_a_model(tmp_path):
    fit = fit_params(teacher())
    assert load_params(fit) is fit
    fit.save(tmp_path / "p.json")
    assert load_params(tmp_path / "p.json").to_json() == fit.to_json()
    assert load_params(str(tmp_path / "p.json")).to_json() == fit.to_json()
    assert load_params(teacher()).fold == fit.fold


# Position embeddings.


def network_of(rows, width=6, kind=np.asarray):
    values = np.random.default_rng(0).normal(size=(1, rows, width))
    tensors = {"pos_embed": kind(values)}
    return SimpleNamespace(tensors=tensors, architecture=SimpleNamespace(name="net")), values[0]


@pytest.mark.parametrize(
    ("rows", "grid", "shape"),
    [(16, None, (4, 4)), (17, None, (4, 4)), (16 + 7, None, (4, 4)), (27, None, (5, 5)), (3, None, (1, 1)),
     (1, None, (1, 1)), (16, (2, 8), (2, 8)), (16, (2, 5), (2, 5)), (26, (4, 4), (4, 4))],
)  # fmt: skip
@pytest.mark.parametrize("kind", [np.asarray, lambda values: torch.nn.Parameter(torch.from_numpy(values))])
def test_patches_are_the_last_rows_of_an_embedding_normalised(rows, grid, shape, kind):
    network, values = network_of(rows, kind=kind)
    found, sides = _embedding(network, "pos_embed", grid)
    assert sides == shape
    kept = values[rows - shape[0] * shape[1] :]
    centred = kept - kept.mean(1, keepdims=True)
    np.testing.assert_allclose(found, centred / np.sqrt(centred.var(1, keepdims=True) + 1e-6))


def test_an_embedding_without_a_grid_is_refused():
    network, _ = network_of(24)  # 4 x 4 behind eight class tokens
    with pytest.raises(UsageError, match=r"^pos_embed has 24 rows, no square grid behind class tokens: pass grid="):
        _embedding(network, "pos_embed", None)
    with pytest.raises(UsageError, match=r"^grid = \(5, 5\) has 25 patches, pos_embed has 24 rows$"):
        _embedding(network, "pos_embed", (5, 5))
    assert _embedding(network, "pos_embed", (4, 6))[1] == (4, 6)
    with pytest.raises(UsageError, match=r"^net holds no 'place': the impulse initialisation needs a position"):
        _embedding(network, "place", None)


def test_directions_of_an_embedding_count_from_a_millionth_of_the_largest():
    U, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(9, 4)))
    embedding = U * np.array([2.0, 1.0, 2.2e-6, 1.8e-6])
    found = _Positions.of(embedding, 4)
    assert pytest.approx([2.0, 1.0, 2.2e-6]) == found.S
    assert pytest.approx([2.0, 1.0]) == _Positions.of(embedding, 2).S
    np.testing.assert_allclose((found.U * found.S) @ found.V.T, embedding, atol=2e-6)


def test_places_go_from_the_centre_outwards_and_shift_the_grid():
    assert _places(1) == [(0, 0)]
    assert _places(3) == [(0, 0), (-1, 0), (0, -1), (0, 1), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1)]
    assert len(_places(5)) == 25
    assert _places(5)[9:11] == [(-2, 0), (0, -2)]
    shift = _shift((2, 3), (1, -1))
    expected = np.zeros((6, 6))
    expected[1, 3] = expected[2, 4] = 1  # row 0, columns 1 and 2, to row 1, columns 0 and 1
    np.testing.assert_array_equal(shift, expected)


def test_a_neighbours_logit_exceeds_the_others_by_the_margin():
    rng = np.random.default_rng(0)
    positions = _Positions.of(rng.normal(size=(6, 5)), 5)
    shift = _shift((2, 3), (0, 1))
    W_Q, W_K = positions.factors(shift, 0.25, 5.0)
    P = (positions.U * positions.S) @ positions.V.T
    logits = 0.25 * P @ W_Q @ W_K.T @ P.T
    rows = shift.any(1)
    hit = logits[shift > 0].mean()
    others = logits[rows][shift[rows] == 0].mean()
    assert hit - others == pytest.approx(5)
    np.testing.assert_allclose((W_Q**2).sum(0), (W_K**2).sum(0))


# Blocks, widths, parts of a teacher.


def test_blocks_of_the_identity_go_on_through_the_heads_and_begin_again():
    blocks = _identity_blocks(np.zeros((3, 4, 3)))
    rows = [[list(block[:, column]).index(1) for column in range(3)] for block in blocks]
    assert rows == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]
    assert blocks.sum() == 9


def test_padding_leaves_products_and_has_no_dead_unit():
    _, (layer, *_) = layers_of(vit())
    A, B = np.random.default_rng(0).normal(size=(2, 2, 7, 3))
    wide = padded(layer, A, 5), padded(layer, B, 5)
    np.testing.assert_allclose(wide[0] @ wide[1].swapaxes(1, 2), A @ B.swapaxes(1, 2))
    assert np.abs(wide[0]).max(1).min() > 0.01
    assert padded(layer, A, 3) is A


@pytest.mark.parametrize("network", ["vit", "grouped", "wide heads", "narrow heads"])
def test_norms_alone_are_kept_of_every_product(network):
    _, (layer, *_) = layers_of(NETWORKS[network]())
    have = layer.weights
    plan = keeping("norms")(layer, Plan(have.W_Q, have.W_K, have.W_V, have.W_O, notes=("x",), biases={"q": have.W_Q}))
    assert (plan.biases, plan.notes) == ({}, ())
    now = have.replace(W_Q=plan.W_Q, W_K=plan.W_K, W_V=plan.W_V, W_O=plan.W_O)
    for circuit in (qk_circuit, layer_ov):
        found, wanted = circuit(now), circuit(have)
        np.testing.assert_allclose(found.squared_norm(), wanted.squared_norm())
        values = np.atleast_2d(found.singular_values())
        given = np.atleast_2d(wanted.singular_values())[0]
        rank = int((given > 1e-9 * given[0]).sum())
        np.testing.assert_allclose(values[:, :rank], values[:, :1].repeat(rank, 1))


def test_a_teacher_may_have_more_query_heads_to_a_key_head_but_no_fewer():
    for heads, keys, passes in ((6, 2, True), (8, 2, True), (6, 3, False)):
        student = rope()  # three query heads to a key head
        given = {"teacher": rope(29, heads, keys, 7), "fold": "raw"}
        if passes:
            init_(student, "weight-selection", **given)
            continue
        with pytest.raises(UsageError, match=r"^layer 0: 3 query heads share a key head, in the teacher 2: name a"):
            init_(student, "weight-selection", **given)


# The live network that `default` runs again.


def test_only_a_live_network_or_one_of_timm_can_be_built_again():
    model = vit()
    opened = OpenedModel("x", SimpleNamespace(name="vit_tiny_patch16_224"), None, {})
    assert _builder(model, opened)() is model
    for named in (None, "name", {}):
        assert _builder(named, opened) is None
    of_timm = OpenedModel("x", SimpleNamespace(name="vit_tiny_patch16_224"), None, {}, timm_args={"depth": 1})
    assert len(_builder("name", of_timm)().blocks) == 1
    empty = OpenedModel("x", SimpleNamespace(name="vit_tiny_patch16_224"), None, {}, timm_args={})
    assert len(_builder(None, empty)().blocks) == 12


# What a network is compared with.


def opened_with(record=None):
    metadata = {} if record is None else {METADATA_KEY: json.dumps(record)}
    return SimpleNamespace(name="net", checkpoint=SimpleNamespace(metadata=metadata))


def test_what_a_file_says_is_compared_unless_something_else_is_said(tmp_path):
    fit_params(teacher()).save(tmp_path / "p.json")
    params = str(tmp_path / "p.json")
    sha256 = hashlib.sha256((tmp_path / "p.json").read_bytes()).hexdigest()
    assert recorded(opened_with(), None, {}) == Claim("mimetic", None, {})
    assert recorded(opened_with(), 3, {"params": params}) == Claim("fitted", 3, {"params": params})
    drawn = {"init": "identity", "seed": 5, "options": {"qk": 0.5, "ov": -0.1}}
    assert recorded(opened_with(drawn), None, {}) == Claim("identity", 5, drawn["options"])
    assert recorded(opened_with(drawn), 0, {"ov": 0.2}) == Claim("identity", 0, {"qk": 0.5, "ov": 0.2})
    assert recorded(opened_with(drawn), None, {"params": params}) == Claim("fitted", None, {"params": params})
    fitted = {
        "init": "fitted",
        "seed": 5,
        "options": {"params": params},
        "params": {"file": "p.json", "sha256": sha256},
    }
    given = {"params": params}
    assert recorded(opened_with(fitted), None, {}, tmp_path) == Claim("fitted", 5, given)
    assert recorded(opened_with({**fitted, "params": None}), None, given).init == "fitted"
    with pytest.raises(UsageError, match=r"^the file was made with params = .*p\.json: pass that option again$"):
        recorded(opened_with(fitted), None, {})
    other = {**fitted, "params": {"file": "p.json", "sha256": "0123456789abcdef" * 4}}
    told = r"^net was made with a parameter file p\.json of another content \(sha256 0123456789ab\.\.\.\): pass that"
    with pytest.raises(UsageError, match=told):
        recorded(opened_with(other), None, given)
    from_object = {"init": "fitted", "seed": 5, "options": {"ov": "head", "params": "<InitParams>"}}
    with pytest.raises(UsageError, match=r"^the file was made with params = <InitParams>: pass that option again$"):
        recorded(opened_with(from_object), None, {})
    again = recorded(opened_with(from_object), None, {"params": params})
    assert again.options == {"ov": "head", "params": params}


def test_a_report_says_how_many_checks_failed():
    model = vit()
    init_(model, "mimetic", seed=3)
    report = verify_init(model, init="mimetic", seed=3)
    assert report.passed
    assert (report.whole, report.mistakes) == (True, {})
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[3] = 1
    spoilt = verify_init(model, init="mimetic")
    assert not spoilt.whole
    assert repr(spoilt).splitlines()[0].endswith(f"against mimetic, any seed: 1 of {len(spoilt)} checks failed>")
    assert list(spoilt[0])[:5] == ["layer", "circuit", "head", "problem", "mistake"]
    told = spoilt.to_json()
    assert (told["passed"], told["mistakes"], told["seed"]) == (False, {"bias not zero": 1}, None)
    assert list(spoilt.mistakes) == ["bias not zero"]
    assert told["checks"][0]["matrix_error"] is None
    worst = next(check for check in spoilt.checks if check.problem)
    assert worst.problem == "b_Q is up to 1 away from what it is set to"


def test_layers_that_read_another_width_than_the_embedding_are_left():
    with pytest.raises(UnsupportedAttentionError, match=r"reads 26 coordinates, the position embedding has 4$"):
        init_(vit(), "impulse", position="patch_embed.proj.weight", grid=(2, 2))


def test_a_single_direction_is_never_called_missing():
    _, (layer, *_) = layers_of(vit())
    for count, expected in ((1, 0), (2, 0), (3, 1)):
        W_Q, W_K = layer.weights.W_Q.copy(), layer.weights.W_K.copy()
        W_Q[:, :, count:] = 0
        planned = layer.weights.replace(W_Q=W_Q, W_K=W_K)
        U, S, Vh = np.linalg.svd(W_Q[0] @ W_K[0].T)
        left = W_Q.copy()
        left[0], right = 0, W_K.copy()
        left[0, :, : count - 1], right[0, :, : count - 1] = U[:, 1:count] * S[1:count], Vh[1:count].T
        have = dataclasses.replace(layer, weights=planned.replace(W_Q=left, W_K=right))
        assert skipped_directions(have, row_of("qk", 0), planned, "raw") == expected


def test_gains_are_not_judged_again_where_whole_products_are_compared(monkeypatch):
    source, model = fit_params(teacher()), vit()
    init_(model, "fitted", params=source, gains="quantiles", seed=3)
    asked = []
    monkeypatch.setattr(verify, "gain_problem", lambda *_: asked.append(1) or "")
    assert verify_init(model, init="fitted", params=source, gains="quantiles", seed=3).passed
    assert asked == []
    assert verify_init(model, init="fitted", params=source, gains="quantiles").passed
    assert asked != []


@pytest.mark.parametrize(("alpha", "mistakes"), [(0.0, []), (0.5, ["cloned heads"])])
def test_heads_that_repeat_are_a_mistake_where_noise_was_asked_for(alpha, mistakes):
    model = vit()
    init_(model, "qk-only", alpha=alpha, seed=3)
    with torch.no_grad():
        weight = model.blocks[0].attn.qkv.weight
        weight[13:26] = weight[:13]
        weight[39:52] = weight[26:39]
    assert list(verify_init(model, init="qk-only", alpha=alpha).mistakes) == mistakes
