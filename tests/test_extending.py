"""The worked examples of docs/extending.md: each runs as it stands, and is short."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = {
    part.splitlines()[0].removeprefix("An ").removeprefix("A "): re.findall(r"```python\n(.*?)```", part, re.DOTALL)
    for part in PAGE.split("\n## ")[1:]
}
LINES = 40


def test_there_is_one_example_of_everything_that_is_added():
    assert list(EXAMPLES) == ["layout", "statistic", "initialiser", "arm", "network", "data set", "figure"]


@pytest.mark.parametrize("what", EXAMPLES)
def test_an_example_runs_as_it_stands_and_is_short(what, tmp_path):
    (block,) = EXAMPLES[what]
    assert len(block.splitlines()) < LINES
    subprocess.run([sys.executable, "-W", "error", "-c", block], check=True, capture_output=True, cwd=tmp_path)
