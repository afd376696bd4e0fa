"""The benchmark suite compares before it times: tools that agree pass, one that is wrong is named."""

import json

import numpy as np
import pytest

from benchmarks.suite.__main__ import RESULTS
from benchmarks.suite.agreement import differences, disagreements, unordered
from benchmarks.suite.cases import CASES, TINY
from benchmarks.suite.methods import REFERENCE, TOOLS
from benchmarks.suite.table import PAGE, fill

INSTALLED = [
    (name, task) for name, tool in TOOLS.items() if name != REFERENCE and not tool.missing for task in tool.tasks
]


@pytest.mark.parametrize(("name", "task"), INSTALLED)
def test_tools_agree_with_the_dense_way(name, task):
    weights = TINY.draw()
    apart = differences(TOOLS[name].tasks[task](*weights), TOOLS[REFERENCE].tasks[task](*weights), TINY.embed_dim)
    assert apart
    assert disagreements({task: {name: apart}}) == []


@pytest.mark.parametrize(("quantity", "task"), [("mean_diagonal", "spectra"), ("eigenvalues", "eigenvalues")])
def test_a_wrong_product_is_a_disagreement(quantity, task):
    W_Q, W_K = TINY.draw()
    apart = differences(TOOLS["attnlens"].tasks[task](W_Q, W_K[:, ::-1]), TOOLS[REFERENCE].tasks[task](W_Q, W_K), 32)
    assert any(quantity in line for line in disagreements({task: {"attnlens": apart}}))


def test_nan_is_a_disagreement():
    assert disagreements({"whole": {"attnlens": {"singular": float("nan")}}})


def test_eigenvalues_are_compared_without_their_order():
    values = np.array([1 + 2j, 3, -1j])
    assert unordered(values, values[::-1]) == 0
    assert unordered(values, np.array([3, 1 + 2j, -1.5j])) == pytest.approx(0.5)


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_heads_are_drawn_with_the_condition_they_name(case):
    for W in case.draw():
        assert W.shape == (case.num_heads, case.embed_dim, case.head_dim)
        assert np.linalg.cond(W.astype(np.float64)) == pytest.approx(np.full(case.num_heads, case.condition), rel=0.05)


def test_the_tables_are_what_the_results_say():
    assert fill(json.loads(RESULTS.read_text())) == PAGE.read_text()
