"""What chance enters: Monte Carlo p-values, sampled pairs, noise of draws, spaced choices, logits, tolerances."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from attnlens.checkpoints import ModuleWeights
from attnlens.circuits import FactoredProduct, WholeProduct, ov_circuit, qk_circuit
from attnlens.heads import InputNorm
from attnlens.inits import init_, verify_init
from attnlens.inits.products import draw_matrix
from attnlens.inits.rules.teacher import evenly_spaced
from attnlens.layouts import read_heads
from attnlens.models.architecture import describe_module
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.statistics.inference import infer
from attnlens.statistics.nulls import pairing_draws, rotation_draws, sign_flip_draws
from attnlens.statistics.verdicts import Verdict, judge
from tests.conftest import random_heads
from tests.test_inits_names import vit

MONTE_CARLO = {
    "signs": lambda product, draws: sign_flip_draws(product.diagonal(), draws),
    "pairings": pairing_draws,
    "rotations": rotation_draws,
}


@pytest.mark.parametrize("draws", [1, 9, 99])
@pytest.mark.parametrize("test", MONTE_CARLO)
def test_no_hit_among_n_draws_is_a_p_value_of_one_in_n_and_one(test, draws):
    identity = FactoredProduct(np.eye(61), np.eye(61))
    assert MONTE_CARLO[test](identity, draws) == pytest.approx(1 / (1 + draws))


@pytest.mark.parametrize("draws", [1, 9])
@pytest.mark.parametrize("test", MONTE_CARLO)
def test_a_sum_of_zero_is_met_by_every_draw(test, draws):
    assert MONTE_CARLO[test](FactoredProduct(np.zeros((7, 3)), np.ones((7, 3))), draws) == 1


@pytest.mark.parametrize(("d", "factor", "channels"), [(401, 6, 2), (401, 10, 1), (521, 6, 2)])
def test_sampled_pairs_weigh_what_they_stand_for_beside_the_largest_channels(d, factor, channels):
    """Few channels hold the tails: with every pair counted alike the kurtosis is 1.4 to 1.9 times too large."""
    A, B = np.random.default_rng(d).standard_normal((2, d, 23))
    A[:channels] *= factor
    product = FactoredProduct(A, B)
    expected = stats.kurtosis(product.dense()[~np.eye(d, dtype=bool)])
    assert float(infer(product).offdiagonal_kurtosis) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("noise", ["normal", "uniform"])
def test_noise_has_variance_one_over_its_size_and_the_tails_of_its_name(noise):
    size = 401
    Z = draw_matrix((1.0, 0.0), size, noise, torch.Generator().manual_seed(0)).numpy()
    kurtosis = {"normal": 0.0, "uniform": -1.2}[noise]
    assert size * Z.var() == pytest.approx(1, abs=6 * np.sqrt((2 + kurtosis) / size**2))
    assert stats.kurtosis(Z.ravel()) == pytest.approx(kurtosis, abs=0.1)
    assert abs(Z.mean()) < 6 / size**1.5


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [(7, 3, [0, 2, 4]), (5, 3, [0, 1, 3]), (10, 4, [0, 2, 5, 7]), (11, 7, [0, 1, 3, 4, 6, 7, 9]), (4, 4, [0, 1, 2, 3])],
)
def test_evenly_spaced_entries_at_ratios_that_are_no_whole_numbers(teacher, student, expected):
    assert evenly_spaced(teacher, student).tolist() == expected


def test_each_side_of_a_product_has_the_gain_of_the_norm_it_reads():
    heads = random_heads()
    rng = np.random.default_rng(3)
    asking, asked = rng.uniform(0.5, 2, (2, heads.embed_dim))
    heads = heads.replace(own_norms={"q": InputNorm(asking, True), "k": InputNorm(asked, False)})
    found, raw = qk_circuit(heads, "effective").dense(), qk_circuit(heads).dense()
    np.testing.assert_allclose(found, asking[:, None] * raw * asked, rtol=1e-12)
    rows = np.eye(heads.embed_dim) - 1 / heads.embed_dim
    np.testing.assert_allclose(qk_circuit(heads, "centred").dense(), rows @ found, rtol=1e-9, atol=1e-12)


def test_every_ov_head_has_a_draw_of_its_own():
    model = vit(embed_dim=96, depth=2)
    init_(model, "fitted", params=vit(9, embed_dim=96, depth=2), ov="head", seed=2)
    tensors = ModuleWeights(model)
    off = ~np.eye(96, dtype=bool)
    entries = np.concatenate(
        [
            ov_circuit(read_heads(spec, tensors, layer)).dense()[:, off]
            for layer, spec in describe_module(model).indexed()
        ]
    )
    correlations = np.corrcoef(entries)[np.triu_indices(len(entries), 1)]
    assert len(correlations) == 8 * 7 / 2
    assert np.abs(correlations).max() < 8 / 96


def test_a_neighbours_logit_exceeds_the_mean_of_the_others_by_the_margin():
    model = vit(embed_dim=96, num_heads=2, img_size=48, class_token=False, global_pool="avg")
    nn.init.normal_(model.pos_embed)
    for margin in (3.0, 11.0):
        init_(model, "impulse", margin=margin)
        positions = model.pos_embed[0]
        positions = (positions - positions.mean(1, keepdim=True)) / positions.std(1, keepdim=True, correction=0)
        attn = model.blocks[0].attn
        with torch.no_grad():
            q, k, _ = attn.qkv(positions).reshape(36, 3, 2, 48).permute(1, 2, 0, 3)
            logits = (q[0] @ k[0].T * attn.scale).numpy()  # the first head attends to the place itself
        own = np.diagonal(logits).mean()
        others = logits[~np.eye(36, dtype=bool)].mean()
        assert own - others == pytest.approx(margin, rel=1e-3)


@pytest.mark.parametrize(("changed", "passes"), [(0.3, True), (1.9, False)])
@pytest.mark.parametrize("name", ["alpha_ov", "beta_ov"])
def test_requests_further_apart_than_the_stated_tolerance_are_told_apart(name, changed, passes):
    """10 alpha / d for alpha, 6 alpha / d for beta: a draw's own deviation is below half of it."""
    d = 96
    tolerance = {"alpha_ov": 10, "beta_ov": 6}[name] * 0.4 / d
    model = vit(embed_dim=d, num_heads=3)
    init_(model, "mimetic", seed=1, **{name: {"alpha_ov": 0.4, "beta_ov": -0.4}[name] + changed * tolerance})
    assert verify_init(model, init="mimetic").passed == passes


@pytest.mark.parametrize(("change", "passes"), [(3e-6, True), (3e-5, False)])
def test_whole_matrices_agree_to_the_stated_tolerance_and_no_further(change, passes):
    model = vit(embed_dim=96, num_heads=3)
    init_(model, "mimetic", seed=1)
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.mul_(1 + change)
    assert verify_init(model, init="mimetic", seed=1).passed == passes


def test_a_diagonal_that_varies_more_than_symmetric_noise_does_is_told():
    model = vit(embed_dim=96, num_heads=3)
    init_(model, "mimetic", seed=1)
    with torch.no_grad():
        attn = model.blocks[2].attn
        value, output = attn.qkv.weight[2 * 96 :].double(), attn.proj.weight.double()
        M = output @ value
        M += 2.0 * 0.4 / np.sqrt(96) * torch.diag(torch.arange(96).remainder(2).double() * 2 - 1)
        U, S, Vh = torch.linalg.svd(M)
        attn.qkv.weight[2 * 96 :], attn.proj.weight[:] = S.sqrt()[:, None] * Vh, U * S.sqrt()
    (failed,) = [check for check in verify_init(model, init="mimetic").checks if not check.passed]
    assert (failed.layer, failed.circuit) == (2, "ov")
    assert "sd(diagonal)" in failed.problem


@pytest.mark.parametrize(("size", "word"), [(0.0, Verdict.NONE), (9.0, Verdict.NOT_DESCRIBED)])
def test_few_large_diagonal_entries_of_either_sign_are_neither_an_identity_nor_nothing(size, word):
    rng = np.random.default_rng(4)
    M = rng.standard_normal((97, 97))
    M[range(4), range(4)] += size * np.array([1, -1, 1, -1])
    product = WholeProduct.of(M, 97)
    fit, inference = fit_diagonal(product, product.singular_values()), infer(product)
    assert [found.verdict for found in judge(fit, inference, np.asarray(0.5))] == [word]
