"""The table: columns in the promised order, selections, CSV and JSON without NaN."""

import csv
import io
import json
import math

import numpy as np
import pytest

from attnlens.circuits import ov_circuit
from attnlens.statistics.layer import measure_layer
from attnlens.statistics.preview import text_preview
from attnlens.statistics.table import StatsTable
from tests.conftest import random_heads


@pytest.fixture(scope="module")
def table():
    rows, *_ = measure_layer(random_heads(), ("raw", "effective"))
    return StatsTable(tuple(rows))


def test_columns_begin_with_the_promised_names(table):
    assert table.to_csv().startswith("layer,head,circuit,fold,alpha,beta,beta_stderr,identity_cosine,")


def test_there_is_a_row_per_head_and_circuit_and_one_for_the_sum(table):
    assert len(table) == 2 * (6 + 6 + 1)
    assert [r[1] for r in table.select(circuit="ov", fold="raw").rows] == [0, 1, 2, 3, 4, 5, "all"]
    assert {row[0] for row in table.rows} == {2}


def test_a_row_holds_the_statistics_of_its_own_head(table):
    dense = ov_circuit(random_heads(), "effective").dense()
    found = table.select(circuit="ov", fold="effective").column("beta")
    np.testing.assert_allclose(found[:6], np.trace(dense, axis1=1, axis2=2) / 13)
    np.testing.assert_allclose(found[6], np.trace(dense.sum(0)) / 13)


def test_an_undefined_statistic_is_an_empty_cell_and_a_null(table):
    row = next(csv.DictReader(io.StringIO(table.select(head="all").to_csv())))
    assert row["copying_score"] == ""
    assert json.loads(table.select(head="all").to_json())[0]["copying_score"] is None


def test_csv_numbers_read_back_exactly(table):
    read = [float(row["alpha"]) for row in csv.DictReader(io.StringIO(table.to_csv()))]
    np.testing.assert_array_equal(read, table.column("alpha"))


def test_pandas_gets_the_same_rows(table):
    frame = table.to_pandas()
    assert list(frame.columns) == list(table.columns)
    assert len(frame) == len(table)


def test_a_table_of_records_has_the_names_asked_for_or_those_of_the_first():
    records = [{"a": 1, "b": "x"}, {"b": "y", "c": 3.0}]
    assert StatsTable.of(records) == StatsTable(((1, "x"), (pytest.approx(math.nan, nan_ok=True), "y")), ("a", "b"))
    assert StatsTable.of(records, ["b", "c"]).select(b="y").rows == (("y", 3.0),)
    assert StatsTable.of([]) == StatsTable((), ())


def test_a_row_that_is_longer_than_its_columns_is_no_row():
    with pytest.raises(ValueError, match="zip"):
        StatsTable(((1, 2),), ("a",)).json_rows()


def test_a_long_cell_is_cut_where_its_column_ends():
    lines = text_preview(("name",), [("x" * 28,), ("y" * 29,)]).splitlines()
    assert max(map(len, lines)) <= 28
    assert any("x" * 28 in line for line in lines)
    assert any(line.strip() == "y" * 25 + "..." for line in lines)


def test_rows_by_a_column_are_those_that_select_finds():
    table = StatsTable(((1, "a"), (0, "b"), (1, "c")), ("layer", "name"))
    found = table.by("layer")
    assert list(found) == [1, 0]
    assert all(found[layer].rows == table.select(layer=layer).rows for layer in (0, 1, 2))
