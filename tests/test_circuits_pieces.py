"""The pieces of circuits by themselves: sizes of factors, gains of products that are not square, spectra."""

import numpy as np
import pytest

from attnlens.circuits import FactoredProduct, WholeProduct, ov_circuit, qk_circuit
from attnlens.circuits.factored import exponent_of, gram_of, squares_of
from attnlens.circuits.whole import _identity
from attnlens.errors import UnsupportedAttentionError
from attnlens.heads import InputNorm, expand_groups
from tests.conftest import random_heads


@pytest.mark.parametrize(
    ("entries", "exponent"), [([0.5, 0.25], 0), ([8.0, 1.0], 4), ([-8.0, 1.0], 4), ([-7.9, 3.0], 3), ([0.0, 0.0], 0)]
)
def test_the_exponent_of_a_factor_is_that_of_its_entry_of_largest_size(entries, exponent):
    factor = np.array([[entries, [0.0, 0.0]], [[0.0, 0.0], entries]])
    np.testing.assert_array_equal(exponent_of(factor), [exponent, exponent])


def test_sizes_and_gram_matrices_are_of_each_factor():
    factor = np.arange(12.0).reshape(2, 3, 2)
    np.testing.assert_array_equal(squares_of(factor), [(factor[0] ** 2).sum(), (factor[1] ** 2).sum()])
    np.testing.assert_array_equal(gram_of(factor), [factor[0].T @ factor[0], factor[1].T @ factor[1]])


def test_the_identity_takes_no_room_and_cannot_be_written():
    identity = _identity(5)
    np.testing.assert_array_equal(identity, np.eye(5))
    assert not identity.flags.writeable
    assert identity.base is not None


def narrower(width):
    """Return heads whose output has another width than their input, with gains of both widths."""
    heads = random_heads()
    inputs = heads.W_V.shape[-2]
    assert inputs != width
    rng = np.random.default_rng(2)
    return heads.replace(
        W_O=rng.normal(size=(*heads.W_O.shape[:-1], width)),
        b_O=None,
        norm_gain=rng.uniform(1, 2, inputs),
        layer_scale=rng.uniform(1, 2, width),
    )


def test_gains_of_an_output_of_another_width_belong_to_their_own_side():
    heads = narrower(7)
    W_OV = expand_groups(heads.W_V, len(heads.W_O)) @ heads.W_O
    inputs, outputs = W_OV.shape[-2:]
    found = ov_circuit(heads, "effective").dense()
    np.testing.assert_allclose(found, heads.norm_gain[:, None] * W_OV * heads.layer_scale)
    with pytest.raises(UnsupportedAttentionError, match=f"front of v has {outputs} gains, the projection {inputs} cha"):
        ov_circuit(heads.replace(norm_gain=np.ones(outputs)), "effective")
    np.testing.assert_allclose(ov_circuit(heads.replace(norm_gain=np.ones(outputs)), "raw").dense(), W_OV)


def test_keys_of_another_width_than_queries_have_a_gain_of_their_own():
    heads = random_heads()
    rng = np.random.default_rng(3)
    gains = {"q": rng.uniform(1, 2, heads.W_Q.shape[-2]), "k": rng.uniform(1, 2, 9)}
    assert len(gains["q"]) != 9
    W_K = rng.normal(size=(len(heads.W_K), 9, heads.W_K.shape[-1]))
    norms = {role: InputNorm(gain, False) for role, gain in gains.items()}
    found = qk_circuit(heads.replace(W_K=W_K, own_norms=norms), "effective").dense()
    W_QK = heads.W_Q @ np.swapaxes(expand_groups(W_K, len(heads.W_Q)), -1, -2)
    np.testing.assert_allclose(found, gains["q"][:, None] * W_QK * gains["k"])
    swapped = heads.replace(W_K=W_K, own_norms={"q": norms["k"], "k": norms["q"]})
    with pytest.raises(UnsupportedAttentionError, match=f"front of q has 9 gains, the projection {len(gains['q'])} ch"):
        qk_circuit(swapped, "effective")


@pytest.mark.parametrize("exponent", [-70, -3, 1, 10, 71])
@pytest.mark.parametrize("whole", [False, True])
def test_spectra_of_a_power_of_two_times_a_product_are_those_of_the_product_times_it(whole, exponent):
    A, B = np.random.default_rng(6).normal(size=(2, 40, 61, 17))
    factored = FactoredProduct(A, B), FactoredProduct(A, np.ldexp(B, exponent))
    one, other = (WholeProduct.of(each.dense(), 17) if whole else each for each in factored)
    np.testing.assert_array_equal(other.singular_values(), np.ldexp(one.singular_values(), exponent))
    one_by_one, scaled = one.eigenvalues(), other.eigenvalues()
    np.testing.assert_array_equal(scaled.real, np.ldexp(one_by_one.real, exponent))
    np.testing.assert_array_equal(scaled.imag, np.ldexp(one_by_one.imag, exponent))
