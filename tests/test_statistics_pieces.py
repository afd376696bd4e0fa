"""The pieces around the statistics: corners kept for heatmaps, tables shown and indexed, profiles over depth."""

import json
import math
import time
from itertools import pairwise

import numpy as np
import pytest

from attnlens.circuits import FactoredProduct, fold_qk, layer_ov, ov_circuit, qk_circuit
from attnlens.errors import UsageError
from attnlens.statistics import corners as kept
from attnlens.statistics.corners import Corners
from attnlens.statistics.depth import GRID, Profile, Trend, relative_depth, rms_over_depth
from attnlens.statistics.inference import infer
from attnlens.statistics.layer import measure_layer
from attnlens.statistics.preview import HTML_ROWS, TEXT_ROWS, WIDTH, cell, html_preview, shown_rows, text_preview
from attnlens.statistics.table import StatsTable
from tests.conftest import random_heads

# Corners.


def stack(count, rows=40, cols=40, rank=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count,) if count else ()
    return FactoredProduct(rng.normal(size=(*shape, rows, rank)), rng.normal(size=(*shape, cols, rank)))


def test_corners_of_each_head_and_of_the_sum_are_kept_under_their_fold_alone():
    weights, found = random_heads(), Corners("raw", 4)
    by_head, total = ov_circuit(weights), layer_ov(weights)
    found.observe(weights, "ov", "raw", by_head)
    found.observe(weights, "ov", "raw", total)
    found.observe(weights, "qk", "effective", fold_qk(qk_circuit(weights), weights, "effective"))
    panels, shapes = found.of("ov")
    assert list(panels) == [2]
    assert list(panels[2]) == [0, 1, 2, 3, 4, 5, "all"]
    assert shapes == {2: (13, 13)}
    for head, panel in panels[2].items():
        whole = (total if head == "all" else by_head.head(head)).dense()
        assert panel.dtype == np.float32
        np.testing.assert_array_equal(panel, whole[:4, :4].astype(np.float32))
    assert found.of("qk") == ({}, {})
    assert found.size == 4


def test_corners_of_layers_come_in_order_and_those_of_another_circuit_apart():
    found = Corners("raw", 5)
    for layer in (3, 1, 2):
        found.observe(random_heads(layer=layer), "qk", "raw", stack(2, 7, 6))
    found.observe(random_heads(layer=9), "ov", "raw", stack(2))
    panels, shapes = found.of("qk")
    assert list(panels) == list(shapes) == [1, 2, 3]
    assert shapes[1] == (7, 6)
    assert panels[1][0].shape == (5, 5)
    assert list(found.of("ov")[0]) == [9]


def test_bounded_corners_shrink_as_panels_come_and_those_that_are_there_are_cut(monkeypatch):
    monkeypatch.setattr(kept, "HEATMAP_ENTRIES", 600)
    monkeypatch.setattr(kept, "HEATMAP_SIDE", 55)
    found = Corners("raw", 30, bounded=True)
    first = stack(2)
    found.observe(random_heads(layer=0), "qk", "raw", first)
    assert found.size == math.isqrt(600 // 2) == 17
    found.observe(random_heads(layer=0), "ov", "raw", stack(1))  # counted by circuit
    assert found.size == 17
    found.observe(random_heads(layer=1), "qk", "raw", stack(3))
    assert found.size == math.isqrt(600 // 5) == 10
    found.observe(random_heads(layer=1), "qk", "raw", stack(None))  # one more panel of that layer
    assert found.size == 10
    panels, _ = found.of("qk")
    assert [panel.shape for panel in panels[0].values()] == [(10, 10)] * 2
    np.testing.assert_array_equal(panels[0][1], first.head(1).dense()[:10, :10].astype(np.float32))
    found.observe(random_heads(layer=2), "qk", "raw", stack(4))
    assert found.size == math.isqrt(600 // 10) == 7
    found.observe(random_heads(layer=3), "ov", "raw", stack(11))
    assert found.size == 55 // 11 == 5
    found.observe(random_heads(layer=4), "ov", "raw", stack(600))
    assert found.size == 2  # at least
    assert max(max(panel.shape) for layer in found.of("qk")[0].values() for panel in layer.values()) == 2


def test_a_heatmaps_limits_are_those_of_32_layers_of_32_heads():
    found = Corners("raw", 64, bounded=True)
    for layer in range(33):
        found._make_room("qk", layer, 33)
    assert found.size == 64
    found._make_room("qk", 33, 33)
    assert found.size == 63
    wide = Corners("raw", 64, bounded=True)
    wide._make_room("qk", 0, 256)
    assert wide.size == 64
    wide._make_room("qk", 0, 1)
    assert wide.size == 63


def test_time_to_choose_a_heatmaps_size_grows_with_the_layers():
    def seconds(layers):
        found, began = Corners("raw", 64, bounded=True), time.process_time()
        for layer in range(layers):
            found._make_room("qk", layer, 1)
        return time.process_time() - began

    assert min(seconds(8000) for _ in range(3)) < 10 * min(seconds(2000) for _ in range(3)) + 0.05


# Tables as they are shown.


def test_a_cell_has_four_digits_and_nothing_where_nothing_is_defined():
    assert [cell(value) for value in (0.123456, math.nan, 12, "word", -math.inf, 1234567.0)] == [
        *("0.1235", "", "12", "word", "-inf", "1.235e+06")
    ]


@pytest.mark.parametrize("most", [TEXT_ROWS, HTML_ROWS])
def test_all_rows_are_shown_up_to_a_number_and_then_as_many_of_both_ends(most):
    def shown(count):
        rows = [(index,) for index in range(count)]
        if most == HTML_ROWS:
            return [row[0] for row in shown_rows(rows)]
        return [line.strip() for line in text_preview(("n",), rows).splitlines()[1:]]

    assert (TEXT_ROWS, HTML_ROWS) == (10, 20)
    assert shown(most) == [str(index) for index in range(most)]
    gap = "…" if most == HTML_ROWS else "..."
    half = most // 2
    assert shown(most + 1) == [*map(str, range(half)), gap, *map(str, range(half + 1, most + 1))]
    assert shown_rows([(index, "x") for index in range(21)])[10] == ["…", "…"]


def test_numbers_stand_to_the_right_and_words_to_the_left_with_two_spaces_between():
    rows = [(1, "a", 0.5, "x"), (10, "bcd", math.nan, 2)]
    assert text_preview(("n", "word", "value", "mixed"), rows).split("\n") == [
        " n  word  value  mixed",
        " 1  a       0.5  x",
        "10  bcd          2",
    ]


def test_lines_are_at_most_79_wide_and_the_last_names_the_columns_without_room():
    assert WIDTH == 79
    widths = (25, 25, 25)  # with two gaps 79

    def header(*sizes):
        return text_preview([chr(97 + place) * size for place, size in enumerate(sizes)], []).split("\n")

    assert header(*widths) == ["a" * 25 + "  " + "b" * 25 + "  " + "c" * 25]
    assert header(25, 25, 26) == ["a" * 25 + "  " + "b" * 25, "and 1 more column: " + "c" * 26]
    assert header(79) == ["a" * 79]
    assert header(80, 1) == ["and 2 more columns: ..."]
    assert header(70, 30, 27)[1] == "and 2 more columns: " + "b" * 30 + ", " + "c" * 27  # 79
    assert header(70, 30, 28)[1] == "and 2 more columns: " + "b" * 30 + ", ..."
    assert header(70, 54, 9)[1] == "and 2 more columns: " + "b" * 54 + ", ..."  # 79 with what is left out
    assert header(70, 55, 2)[1] == "and 2 more columns: ..."
    assert header(70, 60)[1] == "and 1 more column: " + "b" * 60  # 79
    assert header(70, 61)[1] == "and 1 more column: ..."


def test_white_space_in_a_cell_is_one_space_and_a_long_one_is_cut():
    assert text_preview(("t",), [("a\n b",)]).split("\n")[1] == "a b"
    assert text_preview(("t",), [("x" * 28,), ("y" * 29,)]).split("\n")[1:] == ["x" * 28, "y" * 25 + "..."]


def test_a_notebook_shows_every_column_with_numbers_told_apart_and_text_escaped():
    page = html_preview(("n", "<word>"), [(1, "<b>"), (0.25, "c")], "A & B")
    assert "A &amp; B" in page
    assert "&lt;word&gt;" in page
    assert "&lt;b&gt;" in page
    sides = [part.partition('"')[0] for part in page.split("text-align: ")[1:]]
    assert sides == ["right", "left", "right", "left"]
    mixed = html_preview(("n",), [("1",), (0.25,)], "")
    assert "right" not in mixed  # a column with a word is no column of numbers


# Tables as they are used.


@pytest.fixture(scope="module")
def table():
    rows, *_ = measure_layer(random_heads(), ("raw", "effective"))
    return StatsTable(tuple(rows))


def test_a_table_is_indexed_by_row_slice_and_column(table):
    assert len(table) == 26
    assert table[0]["head"] == 0
    assert table[-1] == dict(zip(table.columns, table.rows[25], strict=True))
    assert table[1:3].rows == table.rows[1:3]
    assert table[1:3].columns == table.columns
    np.testing.assert_array_equal(table["beta"], table.column("beta"))
    assert table["circuit"].dtype == object
    assert table["head"][6] == 0
    assert list(table["head"][[5, 12]]) == [5, "all"]
    assert [row["head"] for row in table] == [row[1] for row in table.rows]
    assert list(table.records()) == list(table)
    with pytest.raises(IndexError, match=r"^row 26 does not exist: there are 26$"):
        table[26]
    with pytest.raises(UsageError, match=r"^1\.5 is no index: give the number of a row, a slice or a column's name$"):
        table[1.5]
    with pytest.raises(UsageError, match=r"^column 'circuit' holds words, no numbers: select\(\) chooses rows by it$"):
        table.column("circuit")
    with pytest.raises(UsageError, match="bta"):
        table["bta"]


def test_a_table_is_true_where_it_has_rows_and_says_how_many(table):
    assert bool(table)
    empty = StatsTable((), ("a", "b"))
    assert not bool(empty)
    assert repr(empty) == "<StatsTable of 0 rows and 2 columns>\na  b"
    assert repr(StatsTable(((1,),), ("a",))) == "<StatsTable of 1 row and 1 column>\na\n1"
    assert "StatsTable of 26 rows" in table._repr_html_()


def test_a_ratio_is_one_column_over_another_where_both_are_there(table):
    share = table.column("identity_share")
    np.testing.assert_array_equal(share, table.column("identity_cosine") / table.column("identity_cosine_bound"))
    zero = StatsTable(((1.0, 0.0), (0.0, 0.0)), ("identity_cosine", "identity_cosine_bound"))
    assert list(zero.column("identity_share")) == [math.inf, pytest.approx(math.nan, nan_ok=True)]
    with pytest.raises(UsageError, match="identity_share"):
        StatsTable(((1.0,),), ("identity_cosine",)).column("identity_share")


def test_rows_are_selected_by_words_in_any_spelling_and_by_index(table):
    assert table.select(circuit="OV", head="all", fold="raw").rows == table.select(circuit="ov", head="ALL")[:1].rows
    assert len(table.select(head=3)) == 4
    assert len(table.select(layer=2)) == 26
    assert len(table.select(layer=1)) == 0
    assert len(table.select(name="blocks.2.attn")) == 26
    for wrong, reason in (
        ({"head": "last"}, "^head 'last' is neither an index nor 'all', the layer's sum$"),
        ({"circuit": "vo"}, "circuit"),
        ({"head": 1.5}, "head"),
        ({"layer": "first"}, "layer"),
        ({"heads": 1}, "heads"),
    ):
        with pytest.raises(UsageError, match=reason):
            table.select(**wrong)


def test_a_table_is_written_as_it_is_returned(table, tmp_path):
    assert table.to_csv(tmp_path / "a.csv") == (tmp_path / "a.csv").read_bytes().decode()
    assert table.to_json(tmp_path / "a.json") == (tmp_path / "a.json").read_text()
    assert json.loads(table.to_json()) == table.json_rows()
    assert table.to_json().startswith('[\n {\n  "layer": 2,\n')
    made = StatsTable.of([{"a": None, "b": (3, 5), "c": 1.5, "d": "x", "e": True}])
    assert made.json_rows() == [{"a": None, "b": "3 × 5", "c": 1.5, "d": "x", "e": True}]


def test_columns_and_rows_of_unequal_length_are_no_table():
    short = StatsTable(((1,),), ("a", "b"))
    for use in (lambda: short[0], lambda: list(short), short.json_rows):
        with pytest.raises(ValueError, match="zip"):
            use()


# A layer.


def test_what_is_observed_of_a_layer_and_what_is_returned_beside_its_rows():
    weights, seen = random_heads(), []
    rows, spectra, gains = measure_layer(
        weights, ("raw", "balanced"), observe=lambda _, circuit, fold, product: seen.append((circuit, fold, product))
    )
    assert [(circuit, fold, product.shape[:-2]) for circuit, fold, product in seen] == [
        *(("qk", "raw", (6,)), ("ov", "raw", (6,)), ("ov", "raw", ())),
        *(("qk", "balanced", (6,)), ("ov", "balanced", (6,)), ("ov", "balanced", ())),
    ]
    assert len(rows) == 26
    assert list(spectra) == [(2, circuit, fold) for fold in ("raw", "balanced") for circuit in ("qk", "ov")]
    assert spectra[2, "qk", "raw"].shape == (6, 5)
    assert list(gains) == [(2, "qk", "each"), (2, "ov", "each"), (2, "ov", "all")]
    whole, *_ = measure_layer(weights, ("raw",), layer_spectra=True)
    names = StatsTable(()).columns
    place = names.index("effective_rank")
    assert math.isnan(rows[12][place])
    assert whole[12][place] > 1
    assert rows[12][names.index("num_heads") :] == (6, "blocks.2.attn", "")
    without, *_ = measure_layer(weights.replace(W_O=None, b_O=None), ("raw",))
    assert [row[2] for row in without] == ["qk"] * 6
    unknown = weights.replace(leaves_out=("norm_unknown", "rope"))
    found, *_ = measure_layer(unknown, ("raw", "effective", "balanced"))
    assert {row[3] for row in found} == {"raw"}
    assert found[0][-1] == "norm_unknown rope"


# Depth.


def test_relative_depth_runs_from_0_to_1():
    assert [relative_depth(layer, 5) for layer in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert [relative_depth(0, 1), relative_depth(0, 2), relative_depth(1, 2)] == [0.5, 0, 1]


def test_a_trend_has_the_degree_that_the_depths_allow():
    depths = np.array([0.0, 0.25, 0.5, 1.0])
    trend = Trend.fit(list(depths), 1 - 2 * depths + 3 * depths**2)
    assert trend.coefficients == pytest.approx([1, -2, 3])
    assert trend.residual_sd == pytest.approx(0, abs=1e-12)
    assert trend(0.5) == pytest.approx(0.75)
    assert len(Trend.fit([0, 0.2, 0.5, 0.7, 1], depths[[0, 1, 2, 3, 3]] ** 3).coefficients) == 3
    line = Trend.fit([0.0, 1.0, 1.0], np.array([1.0, 2.0, 4.0]))
    assert line.coefficients == pytest.approx([1, 2])
    assert line.residual_sd == pytest.approx(math.sqrt(2 / 3))
    assert Trend.fit([0.5, 0.5], np.array([1.0, 2.0])).coefficients == pytest.approx([1.5])
    for wrong in ({"coefficients": [], "residual_sd": 0}, {"coefficients": [1.0], "residual_sd": -1e-9}):
        with pytest.raises(ValueError, match="validation error"):
            Trend(**wrong)
    for wrong in ({"more": 1}, {"residual_sd": math.nan}, {"residual_sd": math.inf}):
        with pytest.raises(ValueError, match="validation error"):
            Trend(**{"coefficients": [1.0], "residual_sd": 0.0, **wrong})
    with pytest.raises(ValueError, match="frozen"):
        trend.residual_sd = 1.0
    assert Trend(coefficients=[1.0], residual_sd=0.0).residual_sd == 0


def test_profiles_are_interpolated_on_a_grid_of_hundredths():
    assert len(GRID) == 101
    assert (GRID[0], GRID[1], GRID[-1]) == (0, 0.01, 1)
    assert all(later > earlier for earlier, later in pairwise(GRID))
    profile = Profile("m", "qk", "beta", np.array([0.0, 1.0]), np.array([1.0, 3.0]))
    np.testing.assert_allclose(profile.at(GRID), 1 + 2 * GRID)
    assert rms_over_depth(np.full(101, -3.0)) == pytest.approx(3)
    assert rms_over_depth(np.sqrt(GRID)) == pytest.approx(math.sqrt(0.5))


# Rounding.


@pytest.mark.parametrize("size", [1.0, 3.3])
def test_what_rounding_leaves_off_the_diagonal_of_an_identity_is_no_less_than_nothing(size):
    for seed in range(10):
        Q = np.linalg.qr(np.random.default_rng(seed).normal(size=(17, 17))).Q
        found = infer(FactoredProduct(size * Q, Q))
        assert 0 <= found.alpha_stderr < 1e-6
        assert 0 <= found.alpha_low <= found.alpha_high < size  # not NaN, as a root of less than nothing is
        np.testing.assert_allclose([found.beta_low, found.beta_high], size)
