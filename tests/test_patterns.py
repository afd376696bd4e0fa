"""Patterns over paths: what `glob` finds, where no link is walked through."""

import glob
from pathlib import Path

import pytest

from attnlens.patterns import matching_paths
from attnlens.scans.plan import plan_scan
from attnlens.training.data.text import load_text
from tests.test_scan import plant


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in ("a/b/c/x.txt", "a/b/y.txt", "a/.hidden/z.txt", "a/x[1].txt", ".dot/x.txt", "b/a/b/x.txt", "top.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


PATTERNS = """
    ** **/ **/* **/*.txt */*.txt a/**/b a/**/*.txt a/**/**/x.txt **/b/**/x.txt .*/* **/.hidden/* [ab]/?/** top.txt
    a/x[[]1].txt absent */ ./a/* a/../b/** *
""".split()  # noqa: SIM905


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_without_links_a_pattern_matches_what_glob_does(pattern, absolute, tree):
    pattern = f"{tree}/{pattern}" if absolute else pattern
    expected = {Path(match) for match in glob.glob(pattern, recursive=True)}  # noqa: PTH207
    found = matching_paths(pattern)
    assert len(found) == len(set(found))
    assert {path for path in found if path != Path()} == {path for path in expected if path != Path()}


@pytest.mark.parametrize(
    "pattern", ["", "\0", "a\0/**", "absent/**", "top.txt/**", "top.txt/*", "x/" * 3000, "a" * 300]
)
@pytest.mark.usefixtures("tree")
def test_what_is_no_path_matches_nothing(pattern):
    assert matching_paths(pattern) == []


def test_links_that_loop_are_named_and_not_walked_through(tmp_path):
    loop = tmp_path / "loop"
    plant(loop, 1, corrupt=False)
    (loop / "text").mkdir()
    (loop / "text" / "a.txt").write_text("some words of text " * 10)
    for name in "ab":
        (loop / name).symlink_to(".")
        (loop / "text" / name).symlink_to("../text")
    (loop / "latest").symlink_to("good0")
    assert [job.name for job in plan_scan([f"{loop}/**"]).jobs] == [f"{loop}/good0", f"{loop}/latest"]
    assert load_text(f"text:{loop}/**/*.txt").files == 1
