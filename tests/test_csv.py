"""CSV: names out of files are one line of text in any spreadsheet, numbers stay numbers."""

import csv
import io
import math

import pandas as pd
import pytest

from attnlens.csv_text import csv_text
from attnlens.scans.plan import Job
from attnlens.scans.store import Store
from attnlens.scans.worker import Settings, failed
from attnlens.statistics.table import StatsTable

HOSTILE = {
    "=1+1": "'=1+1",
    "+1": "'+1",
    "-a": "'-a",
    "@SUM(A1)": "'@SUM(A1)",
    " =1": "' =1",
    "\t=1": r"\t=1",
    "\r=1": r"\r=1",
    "\uff1d1": "'\uff1d1",
    "a\nb": r"a\nb",
    "\x1b[2J": r"\x1b[2J",
    "\u202ea": r"\u202ea",
    "a=b, \"c\"; 'd'": "a=b, \"c\"; 'd'",
    "": "",
    "plain-name.1": "plain-name.1",
}


def cells(text):
    return list(csv.reader(io.StringIO(text)))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_one_line_that_no_spreadsheet_computes(name):
    text = csv_text(["a", "b"], [[name, -1.5]])
    assert cells(text) == [["a", "b"], [HOSTILE[name], "-1.5"]]
    assert len(text.splitlines()) == 2


def test_numbers_are_numbers_and_what_is_undefined_is_empty():
    text = csv_text(["a"] * 6, [[-1, -0.5, 1e-300, math.nan, -math.inf, None]])
    assert text == "a,a,a,a,a,a\n-1,-0.5,1e-300,,,\n"
    frame = pd.read_csv(io.StringIO(text))
    assert [str(kind) for kind in frame.dtypes[:3]] == ["int64", "float64", "float64"]


def test_every_table_writes_names_so(tmp_path):
    table = StatsTable(((0, "=x", -1.0),), ("layer", "name", "alpha"))
    assert cells(table.to_csv())[1] == ["0", "'=x", "-1.0"]
    job = Job("=x", "@y")
    store = Store(tmp_path, Settings())
    store.save_tables({job.name: store.save(job, failed("-z\x1b[2J"))}, {})
    assert cells((tmp_path / "scan.csv").read_text())[1][0] == "'=x"
    assert cells((tmp_path / "scan.csv").read_text())[1][-1] == r"'-z\x1b[2J"
