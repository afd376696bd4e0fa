"""Every result in Python: it fits a screen, iterates, indexes, and becomes a frame and a notebook's table."""

import subprocess
import sys

import numpy as np
import pytest

import attnlens
from attnlens.errors import UsageError
from attnlens.statistics.table import StatsTable, Tabular
from tests.filter_models import convnext
from tests.test_inspect import small_vit

SCREEN = (100, 16)
"""Columns and lines that a result's text stays within."""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return one result of every public function that measures, and the columns its rows have."""
    folder, module, vit = tmp_path_factory.mktemp("results"), convnext(), small_vit()
    inspection = attnlens.inspect()
    return {
        "inspection": inspection,
        "filters": attnlens.inspect(module),
        "table": inspection.stats,
        "params": attnlens.fit_params(),
        "filter params": attnlens.fit_params(module),
        "comparison": attnlens.compare(inspection, vit),
        "composition": attnlens.compose(),
        "scan": attnlens.scan(str(attnlens.__path__[0]) + "/embedded", folder, workers=1),
        "init": attnlens.init_(small_vit(), "mimetic"),
        "filter init": attnlens.init_(convnext(), "conv-covariance"),
        "verify": attnlens.verify_init(small_vit()),
        "propagation": attnlens.propagate(depth=2, seeds=2, sequences=1, arms=["softmax", "e-spa"]),
        "rewiring": attnlens.rewire_(small_vit()),
        "training": attnlens.train_compare(
            dataset="digits", arms=["default", "mimetic"], seeds=2, epochs=1, train_images=64, test_images=32,
            embed_dim=16, depth=1, num_heads=2, output=folder / "training", quiet=True,
        ),
    }  # fmt: skip


def test_every_public_result_is_among_them(results):
    kinds = {type(result) for result in results.values()}
    public = {getattr(attnlens, name) for name in attnlens.__all__}
    assert kinds == {kind for kind in public if isinstance(kind, type) and issubclass(kind, Tabular)}


def test_the_text_of_every_result_fits_a_screen_and_names_what_it_leaves_out(results, tmp_path_factory):
    base = str(tmp_path_factory.getbasetemp())
    for name, result in results.items():
        lines = repr(result).splitlines()
        assert len(lines) <= SCREEN[1], name
        assert max(len(line.replace(base, "")) for line in lines) <= SCREEN[0], name
        assert lines[0].startswith(f"<{type(result).__name__}")
        assert lines[1].split()[0] == result._table().columns[0], name
        hidden = [column for column in result._table().columns if column not in lines[1].split()]
        counted = f"and {len(hidden)} more column{'s' * (len(hidden) != 1)}: {hidden[0]}" if hidden else ""
        assert lines[-1].startswith(counted), name


def test_rows_of_every_result_are_iterated_indexed_sliced_and_counted(results):
    for name, result in results.items():
        rows = list(result)
        assert len(result) == len(rows) > 0, name
        assert result
        assert repr(result[0]) == repr(rows[0]), name
        assert list(result[-1]) == list(rows[-1]) == list(result._table().columns), name
        part = result[1:3]
        assert isinstance(part, StatsTable)
        assert repr(part.rows) == repr(result._table().rows[1:3]), name
        with pytest.raises(IndexError, match=f"row {len(rows)} does not exist: there are {len(rows)}"):
            result[len(rows)]
        with pytest.raises(UsageError, match="column 'nothing' is not known"):
            result["nothing"]
        with pytest.raises(UsageError, match=r"2.5 is no index: give the number of a row, a slice or a column's name"):
            result[2.5]


def test_a_column_is_an_array_of_numbers_or_of_words(results):
    table = results["inspection"].stats
    assert results["inspection"]["beta"].dtype == np.float64
    np.testing.assert_array_equal(results["inspection"]["beta"], table.column("beta"))
    assert set(results["inspection"]["circuit"]) == {"qk", "ov"}
    assert set(results["params"]["verdict"]) == {entry.verdict for entry in results["params"].entries}


def test_a_frame_of_every_result_holds_its_rows(results):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install 'attnlens[pandas]'")
    for name, result in results.items():
        frame = result.to_pandas()
        assert list(frame.columns) == list(result._table().columns), name
        pandas.testing.assert_frame_equal(frame, pandas.DataFrame(list(result)), check_dtype=False)


def test_what_a_notebook_shows_of_every_result_is_escaped_and_of_one_size(results):
    for name, result in results.items():
        html = result._repr_html_()
        assert html.lstrip().startswith("<div"), name
        assert "<script" not in html, name
        assert html.count("<tr>") <= 2 + 36, name
    shown = StatsTable((("<script>x</script>", 1.0),) * 50, ("name", "value"))._repr_html_()
    assert "<script>" not in shown
    assert shown.count("&lt;script&gt;x") == 20


def test_rows_of_a_fit_are_its_entries_with_the_model_and_those_of_filters_where_there_is_no_attention(results):
    params, filters = results["params"], results["filter params"]
    assert len(params) == len(params.entries)
    entry = params.entries[17]
    row = params[17]
    assert (row["model"], row["layer"], row["head"]) == ("embedded", entry.layer, entry.head)
    assert (row["beta_low"], row["verdict"]) == (entry.beta_low, entry.verdict)
    assert [row["s"] for row in filters] == [entry.s for entry in filters.filters]


def test_without_pandas_a_frame_says_in_one_line_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['pandas'] = None\n"
        "import attnlens\n"
        "try: attnlens.inspect().to_pandas()\n"
        "except attnlens.AttnlensError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "to_pandas needs pandas, which is not installed: pip install 'attnlens[pandas]'\n"


def test_a_table_of_records_keeps_what_is_there_and_has_nan_for_the_rest():
    table = StatsTable.of([{"a": 1, "b": "x"}, {"a": None, "b": "y", "c": 2}])
    assert table.columns == ("a", "b")
    assert table.rows[0] == (1, "x")
    assert np.isnan(table.rows[1][0])
    assert not StatsTable.of([])
    assert repr(StatsTable.of([])) == "<StatsTable of 0 rows and 0 columns>"


def test_inspections_are_compared_and_fitted_as_the_models_they_are_of():
    vit = small_vit()
    seen, other = attnlens.inspect(), attnlens.inspect(vit)
    assert attnlens.compare(seen, other).distances == attnlens.compare([None, vit]).distances
    same = attnlens.compare(seen, seen)
    assert same.models == ("embedded (1)", "embedded (2)")
    assert [row["identity_share"] for row in same] == [0, 0]
    fitted = attnlens.fit_params(seen, vit)
    assert fitted.entries == attnlens.fit_params([None, other]).entries
    assert len(fitted.sources) == 2


def test_what_an_inspection_cannot_stand_for_is_said_in_a_line():
    seen = attnlens.inspect()
    with pytest.raises(UsageError, match=r"embedded was inspected without fold 'balanced': choose from raw, effective"):
        attnlens.compare(seen, seen, fold="balanced")
    with pytest.raises(UsageError, match="embedded is inspected already: give its checkpoint to inspect"):
        attnlens.compare(seen, seen, checkpoints=["a", "b"])
    with pytest.raises(UsageError, match="the list of models is empty: give at least one"):
        attnlens.fit_params([])
    with pytest.raises(UsageError, match="compare needs at least two models"):
        attnlens.compare([seen])


def test_a_page_and_what_is_made_on_request_have_short_texts_too(results):
    seen = results["inspection"]
    page = attnlens.report(compare=[seen])
    assert repr(page).startswith("<Page about embedded: 84 rows, ")
    assert len(page.to_pandas()) == len(seen)
    for shown in (page, seen.circuits(0), seen.heads(0), seen.opened, attnlens.initialisers()["fitted"]):
        assert len(repr(shown)) < 200
