"""The worked examples of docs/extending.md: each runs as it stands, and is short."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = {
    part.splitlines()[0].removeprefix("An ").removeprefix("A "): re.findall(
        r"```(?:python|diff)\n(.*?)```", part, re.DOTALL
    )
    for part in PAGE.split("\n## ")[1:]
}
MOST_LINES = 40
MOST_LINES_OF_A_STATISTIC = 10


def test_there_is_one_example_of_everything_that_is_added():
    assert list(EXAMPLES) == ["layout", "statistic", "initialiser", "arm", "network", "data set", "figure"]


@pytest.mark.slow
@pytest.mark.parametrize("what", [what for what in EXAMPLES if what != "statistic"])
def test_an_example_runs_as_it_stands_and_is_short(what, tmp_path):
    (block,) = EXAMPLES[what]
    assert len(block.splitlines()) < MOST_LINES
    subprocess.run([sys.executable, "-W", "error", "-c", block], check=True, capture_output=True, cwd=tmp_path)


def test_a_statistic_costs_one_file_and_few_lines_and_reaches_the_table(tmp_path):
    (block,) = EXAMPLES["statistic"]
    (path,) = re.findall(r"^\+\+\+ b/(.*)$", block, re.MULTILINE)
    text = (ROOT / path).read_text()
    added = 0
    for hunk in block.split("@@\n")[1:]:
        lines = hunk.splitlines()
        before = "\n".join(line[1:] for line in lines if line[:1] != "+")
        after = "\n".join(line[1:] for line in lines)
        assert text.count(before) == 1, before
        text = text.replace(before, after)
        added += sum(line[:1] == "+" for line in lines)
    assert added < MOST_LINES_OF_A_STATISTIC
    shutil.copytree(ROOT / "attnlens", tmp_path / "attnlens")
    (tmp_path / path).write_text(text)
    code = (
        "import attnlens; stats = attnlens.inspect().stats.select(circuit='qk'); "
        "ratio = stats.column('participation_ratio'); assert (ratio >= 1).all() and (ratio <= 32).all(); "
        "assert attnlens.__file__.startswith(%r); assert 'participation_ratio' in stats.to_csv().splitlines()[0]"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code % str(tmp_path)], check=True, cwd=tmp_path, env=environment)
