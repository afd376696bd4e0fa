"""Composition of heads: dense products, the random baseline by Monte Carlo, memory, streams, the command."""

import json
import tracemalloc
from itertools import product

import numpy as np
import pytest

import attnlens
from attnlens.circuits import FactoredProduct, ov_circuit, qk_circuit
from attnlens.composition import COLUMNS, KINDS, composition_scores
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.figures.composition import mosaic
from attnlens.layouts import read_heads
from attnlens.models.open import open_model
from benchmarks.trust.scale import CONFIG, write_model

GROUPED = {
    **CONFIG,
    "hidden_size": 22,
    "intermediate_size": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 5,
    "num_hidden_layers": 4,
    "vocab_size": 3,
}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "grouped"
    write_model(folder, GROUPED, layers_a_shard=2)
    return folder


def stack(rng, heads, d, rank):
    return FactoredProduct(rng.normal(size=(heads, d, rank)), rng.normal(size=(heads, d, rank)))


def dense_score(first, second):
    return np.linalg.norm(first @ second) / (np.linalg.norm(first) * np.linalg.norm(second))


@pytest.mark.parametrize(("d", "ranks"), [(23, (3, 7)), (23, (7, 3)), (11, (13, 5)), (5, (11, 17))])
def test_scores_are_those_of_the_dense_products(d, ranks):
    rng = np.random.default_rng(0)
    first, second = stack(rng, 3, d, ranks[0]), stack(rng, 2, d, ranks[1])
    scores, _ = composition_scores(first, second)
    assert scores.shape == (3, 2)
    for i, j in product(range(3), range(2)):
        np.testing.assert_allclose(scores[i, j], dense_score(first.dense()[i], second.dense()[j]), rtol=1e-12)


def test_the_squared_norm_is_that_of_the_gram_matrices():
    rng = np.random.default_rng(1)
    first, second = stack(rng, 1, 23, 3), stack(rng, 1, 23, 7)
    (A1, B1), (A2, B2) = ((product.A[0], product.B[0]) for product in (first, second))
    C = B1.T @ A2
    squared = np.sum((C.T @ (A1.T @ A1) @ C) * (B2.T @ B2))
    norms = first.squared_norm()[0] * second.squared_norm()[0]
    np.testing.assert_allclose(composition_scores(first, second)[0][0, 0] ** 2, squared / norms, rtol=1e-12)


def test_a_head_that_reads_exactly_what_was_written_scores_one_and_another_zero():
    u, v = np.eye(7)[:, :1], np.eye(7)[:, 1:2]
    writes_v = FactoredProduct(u[None], v[None])
    readers = FactoredProduct(np.stack([v, u]), np.stack([u, v]))
    np.testing.assert_allclose(composition_scores(writes_v, readers)[0], [[1.0, 0.0]], atol=1e-15)


def test_a_zero_product_has_no_score():
    rng = np.random.default_rng(2)
    nothing = FactoredProduct(np.zeros((1, 7, 3)), np.zeros((1, 7, 3)))
    score, deviation = composition_scores(nothing, stack(rng, 1, 7, 2))
    assert np.isnan(score).all()
    assert np.isnan(deviation).all()


def test_random_rotations_have_the_mean_and_spread_the_deviation_states():
    """Haar rotations between two fixed products: mean of the squared score 1/d, standard deviation as stated."""
    rng, d, draws = np.random.default_rng(3), 11, 4000
    first, second = stack(rng, 1, d, 2), stack(rng, 1, d, 5)
    deviations, squares = [], []
    for _ in range(draws):
        Q, R = np.linalg.qr(rng.normal(size=(d, d)))
        turned = FactoredProduct((Q * np.sign(np.diag(R))) @ second.A, second.B)
        score, deviation = composition_scores(first, turned)
        squares.append(score.item() ** 2)
        deviations.append(deviation.item())
    assert abs(np.mean(squares) - 1 / d) < 4 * np.std(squares) / draws**0.5
    assert abs(np.mean(deviations)) < 4 / draws**0.5
    fourth = np.mean((np.array(deviations) - np.mean(deviations)) ** 4)
    assert abs(np.var(deviations) - 1) < 4 * ((fourth - 1) / draws) ** 0.5


def expected_products(folder, fold):
    opened = open_model(folder, None)
    layers = [read_heads(spec, opened.checkpoint, layer) for layer, spec in opened.architecture.indexed()]
    return [(qk_circuit(heads, fold).dense(), ov_circuit(heads, fold).dense()) for heads in layers]


@pytest.mark.parametrize("fold", ["raw", "effective", "centred"])
def test_every_kind_is_its_dense_product_with_grouped_heads(grouped, fold):
    found = attnlens.compose(grouped, fold=fold)
    dense = expected_products(grouped, fold)
    forms = {
        "q": lambda ov, later, j: (ov, later[0][j]),
        "k": lambda ov, later, j: (ov, later[0][j].T),
        "v": lambda ov, later, j: (ov, later[1][j]),
    }
    pairs = [(kind, first, second) for kind in KINDS for first in range(4) for second in range(first + 1, 4)]
    assert list(found.scores) == pairs
    for kind, first, second in pairs:
        expected = [
            [dense_score(*forms[kind](dense[first][1][i], dense[second], j)) for j in range(4)] for i in range(4)
        ]
        np.testing.assert_allclose(found.scores[kind, first, second], expected, rtol=1e-12)


def test_layers_read_in_blocks_give_the_same_scores(grouped, monkeypatch):
    whole = attnlens.compose(grouped)
    monkeypatch.setattr("attnlens.composition.HELD", 1)
    separate = attnlens.compose(grouped)
    assert list(separate.scores) == list(whole.scores)
    for pair, scores in whole.scores.items():
        np.testing.assert_array_equal(separate.scores[pair], scores)


def test_array_table_and_json_hold_the_same_scores(grouped):
    found = attnlens.compose(grouped, layers=[0, 2, 3])
    array = found.array("k")
    assert array.shape == (3, 4, 3, 4)
    np.testing.assert_array_equal(array[0, :, 2, :], found.scores["k", 0, 3])
    assert np.isnan(array[1, :, 1, :]).all()
    rows = found.stats.select(kind="k", from_layer=0, from_head=1, layer=3, head=2)
    assert rows.column("score").tolist() == [array[0, 1, 2, 2]]
    assert rows.column("baseline").tolist() == [22**-0.5]
    pair = next(pair for pair in found.to_json()["pairs"] if (pair["kind"], pair["from_layer"]) == ("k", 0))
    assert pair["scores"] == found.scores["k", 0, pair["layer"]].tolist()


def test_layers_of_another_width_or_tower_do_not_compose():
    import timm

    sizes = {"img_size": 56, "embed_dim": 12, "depths": (2, 2, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 7}
    found = attnlens.compose(timm.create_model("swin_tiny_patch4_window7_224", **sizes))
    assert {pair[1:] for pair in found.scores} == {(0, 1), (2, 3)}
    assert found.scores["q", 2, 3].shape == (2, 2)
    assert found.widths[0] != found.widths[2]


def test_one_layer_composes_with_nothing_and_says_so(grouped):
    with pytest.raises(UnsupportedAttentionError, match="none stands behind another"):
        attnlens.compose(grouped, layers=[2])
    with pytest.raises(UsageError, match="takes raw, effective or centred"):
        attnlens.compose(grouped, fold="both")
    with pytest.raises(UsageError, match="layer 9"):
        attnlens.compose(grouped, layers=[9])


def test_no_product_is_formed():
    """The peak stays under one d x d matrix."""
    rng, d = np.random.default_rng(4), 1500
    first, second = stack(rng, 2, d, 8), stack(rng, 2, d, 8)
    tracemalloc.start()
    try:
        composition_scores(first, second)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < d * d * 8 / 4


def test_the_figure_shows_the_score_over_the_baseline(grouped):
    found = attnlens.compose(grouped)
    image, starts = mosaic(found.logs("v"), found.heads)
    assert starts.tolist() == [0, 4, 8, 12, 16]
    np.testing.assert_allclose(image[4:8, 12:], np.log2(found.scores["v", 1, 3] * 22**0.5))
    assert np.isnan(image[np.tril_indices(16)]).all()
    figure = found.figures()["v_composition"]
    drawn = next(image for axes in figure.axes for image in axes.images if image.get_gid() == "v")
    np.testing.assert_array_equal(np.ma.filled(drawn.get_array(), np.nan), image)


def test_the_command_prints_the_strongest_pairs_and_writes_every_file(run, grouped, tmp_path):
    code, out, err = run("compose", grouped, "--top", "2", "-o", "made")
    assert code == 0
    assert "queries and keys are rotated by position: layers 0-3" in err
    found = attnlens.compose(grouped)
    best = max((scores.max(), pair) for pair, scores in found.scores.items() if pair[0] == "q")
    assert f"{best[0]:.4f}" in out
    names = {"composition.csv", "composition.json", *(f"{kind}_composition.png" for kind in KINDS)}
    assert {path.name for path in (tmp_path / "made").iterdir()} == names
    data = json.loads((tmp_path / "made" / "composition.json").read_text())
    assert data["schema"] == "attnlens.composition"
    assert (tmp_path / "made" / "composition.csv").read_text() == found.stats.to_csv()


def test_the_files_hold_all_pairs_where_they_are_few_and_the_strongest_where_they_are_many(
    run, grouped, tmp_path, monkeypatch
):
    found = attnlens.compose(grouped)
    assert run("compose", grouped, "-o", "all")[0] == 0
    whole = json.loads((tmp_path / "all" / "composition.json").read_text())
    assert whole["pairs"] == found.to_json()["pairs"]
    monkeypatch.setattr("attnlens.composition_files.MOST_PAIRS", 7)
    code, out, err = run("compose", grouped, "-o", "some", "--json")
    assert code == 0
    assert f"hold the 21 strongest of {3 * 6 * 16} pairs of heads, by score over baseline: --all-pairs" in err
    some = json.loads((tmp_path / "some" / "composition.json").read_text())
    assert json.loads(out) == some
    assert some["pairs_of_heads"] == {"found": 3 * 6 * 16, "written": 21}
    table = (tmp_path / "some" / "composition.csv").read_text().splitlines()
    every = (tmp_path / "all" / "composition.csv").read_text().splitlines()
    place = COLUMNS.index("score")
    for kind in KINDS:
        mine = [line for line in every if line.startswith(f"{kind},")]
        lines = sorted(mine, key=lambda line: float(line.split(",")[place]))
        assert sorted(line for line in table if line.startswith(f"{kind},")) == sorted(lines[-7:])
        kept = [(p["from_layer"], *row) for p in some["pairs"] if p["kind"] == kind for row in p["strongest"]]
        assert sorted(row[3] for row in kept) == [float(line.split(",")[place]) for line in lines[-7:]]
    assert run("compose", grouped, "-o", "some", "--all-pairs")[0] == 0
    assert (tmp_path / "some" / "composition.csv").read_text().splitlines() == every


def test_more_pairs_of_heads_than_memory_is_bounded_to_are_one_line(grouped, monkeypatch):
    monkeypatch.setattr("attnlens.composition.SCORES_HELD", -(10**9))
    with pytest.raises(UsageError, match=r"96 pairs of heads in 4 layers of .* choose fewer layers with layers"):
        attnlens.compose(grouped)


def test_more_heads_than_one_image_holds_are_told_in_its_place(grouped, monkeypatch):
    monkeypatch.setattr("attnlens.figures.composition.MOST_HEADS", 15)
    figure = attnlens.compose(grouped).figures()["k_composition"]
    assert any("16 heads are too many to draw their K-composition" in text.get_text() for text in figure.texts)
    assert not any(axes.images for axes in figure.axes)
