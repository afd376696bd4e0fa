"""Pairs of off-diagonal entries: which are looked at, how they count, and the moments that come out."""

import numpy as np
import pytest
from scipy import stats

from attnlens.circuits import FactoredProduct
from attnlens.statistics.pairs import _pairs, offdiagonal_kurtosis, pair_moments

LARGEST = 32


def numbered(d):
    """Return factors of the matrix whose entry M_ij is i d + j: an entry says where it stands."""
    place = np.arange(float(d))
    return np.stack([place * d, np.ones(d)], axis=1), np.stack([np.ones(d), place], axis=1)


def places(d, sizes, seed=0):
    """Return row and column of the pairs looked at, and their weights."""
    found = _pairs(FactoredProduct(*numbered(d)), sizes, seed)
    entries = found.entries
    weights = np.where(np.arange(entries.shape[1]) < found.counted, 1.0, found.weight)
    weights /= weights.sum()
    first, second = (np.rint(entries).astype(int) // d, np.rint(entries).astype(int) % d)
    np.testing.assert_array_equal(first[0], second[1])  # the second entry is the mirror image of the first
    np.testing.assert_array_equal(second[0], first[1])
    return first[0], second[0], weights


@pytest.mark.parametrize("d", [3, 31, 256])
def test_every_pair_of_a_small_product_is_looked_at_once_and_counts_alike(d):
    rows, cols, weights = places(d, np.ones(d))
    assert len({frozenset(pair) for pair in zip(rows.tolist(), cols.tolist(), strict=True)}) == len(rows)
    assert len(rows) == d * (d - 1) // 2
    np.testing.assert_allclose(weights, 1 / len(rows))


@pytest.mark.parametrize("d", [257, 401, 769, 1031])
def test_of_a_large_product_all_pairs_of_the_largest_channels_are_looked_at_and_a_share_of_the_others(d):
    sizes = np.random.default_rng(d).permutation(d).astype(float)
    largest = set(np.flatnonzero(sizes >= d - LARGEST).tolist())
    rows, cols, weights = places(d, sizes)
    assert (rows != cols).all()
    pairs = [frozenset(pair) for pair in zip(rows.tolist(), cols.tolist(), strict=True)]
    of_largest = np.array([bool(pair & largest) for pair in pairs])
    counted = {pair for pair in pairs if pair & largest}
    assert len(counted) == of_largest.sum() == LARGEST * (LARGEST - 1) // 2 + LARGEST * (d - LARGEST)
    total = d * (d - 1) // 2
    np.testing.assert_allclose(weights[of_largest], 1 / total)
    np.testing.assert_allclose(weights[~of_largest], weights[~of_largest][0])  # together they stand for all the others
    assert weights.sum() == pytest.approx(1)
    often = np.bincount(np.concatenate([rows, cols])[np.tile(~of_largest, 2)], minlength=d)
    others = np.array([channel for channel in range(d) if channel not in largest])
    assert often[sorted(largest)].sum() == 0
    np.testing.assert_allclose(often[others], often[others].mean(), atol=LARGEST)


@pytest.mark.parametrize(("d", "columns"), [(257, 96), (341, 96), (342, 64), (401, 64), (769, 32), (1024, 32)])
def test_each_row_of_the_others_is_looked_at_in_so_many_columns_that_all_are_some_thirty_thousand(d, columns):
    rows, cols, _ = places(d, np.arange(float(d)))
    others = (rows < d - LARGEST) & (cols < d - LARGEST)
    assert others.sum() == (d - LARGEST) * columns
    assert columns * d <= 32768 < (columns + LARGEST) * d


@pytest.mark.parametrize("d", [256, 1025])
def test_all_entries_are_looked_at_where_there_are_few_or_a_row_has_no_room_for_a_block(d):
    rows, cols, weights = places(d, np.arange(float(d)))
    assert len(rows) == d * (d - 1) // 2
    assert (rows < cols).all()
    np.testing.assert_allclose(weights, 1 / len(rows))


def test_a_single_channel_has_no_off_diagonal():
    assert np.isnan(offdiagonal_kurtosis(FactoredProduct(np.ones((3, 1, 2)), np.ones((3, 1, 2))))).all()


def test_rounding_does_not_decide_which_channels_of_one_size_are_looked_at():
    sizes = np.ones(401)
    rounded = sizes + np.random.default_rng(7).uniform(-1e-9, 1e-9, 401)  # as far as balanced margins are from 1
    for one, other in zip(places(401, sizes), places(401, 3e-9 * rounded), strict=True):
        np.testing.assert_array_equal(other, one)
    larger = np.where(np.arange(401) == 200, 1 + 1e-7, sizes)
    assert (places(401, larger)[0] == 200).sum() + (places(401, larger)[1] == 200).sum() == 400  # all its pairs


def test_the_sample_of_the_others_is_a_function_of_the_seed():
    one, again, other = (places(401, np.arange(401.0), seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


@pytest.mark.parametrize("sides", [(0,), (1,), (0, 1)])
def test_moments_are_those_of_all_entries_where_few_channels_are_large(sides):
    rng = np.random.default_rng(3)
    d = 401
    factors = rng.standard_normal((2, d, 64))
    large = rng.choice(d, 20, replace=False)
    for side in sides:
        factors[side, large] *= 6
    product = FactoredProduct(*factors)
    M = product.dense()
    off = ~np.eye(d, dtype=bool)
    pairs = ((M**2 + M.T**2) / 2)[off]
    fourth, kurtosis = pair_moments(product, tuple((M**2 * off).sum(axis) for axis in (1, 0)), seed=0)
    assert fourth == pytest.approx((pairs**2).mean(), rel=0.02)
    assert kurtosis == pytest.approx(stats.kurtosis(M[off]), rel=0.02)
    assert offdiagonal_kurtosis(product) == pytest.approx(float(kurtosis), rel=1e-9)


def test_each_product_of_a_stack_has_moments_of_its_own_and_one_that_is_zero_has_none():
    rng = np.random.default_rng(4)
    A, B = rng.standard_normal((2, 3, 31, 5))
    A[2] = 0
    found = offdiagonal_kurtosis(FactoredProduct(A, B))
    off = ~np.eye(31, dtype=bool)
    for head in range(2):
        assert found[head] == pytest.approx(stats.kurtosis((A[head] @ B[head].T)[off]))
    assert np.isnan(found[2])
