"""Comparing models: profiles by relative depth, and a distance that does not see scale, width or depth."""

import math

import numpy as np
import pytest
import timm
import torch

import attnlens
from attnlens.errors import UsageError
from attnlens.fit.comparison import Comparison, Profile, compare
from attnlens.inits import init_
from tests.test_inspect import SMALL, small_vit


def mimetic(seed=0, beta_ov=-0.4, alpha_ov=0.4, **more):
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **more})
    init_(model, "mimetic", seed=seed, alpha_ov=alpha_ov, beta_ov=beta_ov)
    return model


def distance(comparison, circuit="ov", first=0, second=1):
    names = comparison.models[first], comparison.models[second]
    (row,) = [r for r in comparison.distances if (r["first"], r["second"], r["circuit"]) == (*names, circuit)]
    return row


def test_profiles_are_the_statistics_of_inspect_by_relative_depth():
    model = small_vit()
    found, stats = compare(model, small_vit(1)), attnlens.inspect(model, fold="effective").stats
    (beta, _) = found.select("qk", "beta")
    means = [
        np.mean([r["beta"] for r in stats.select(circuit="qk", layer=layer).records() if r["head"] != "all"])
        for layer in range(3)
    ]
    np.testing.assert_allclose(beta.values, means)
    np.testing.assert_array_equal(beta.depth, [0, 0.5, 1])
    (share, _) = found.select("ov", "identity_share")
    sums = stats.select(circuit="ov", head="all")
    np.testing.assert_allclose(share.values, sums.column("identity_cosine") / sums.column("identity_cosine_bound"))


def test_a_model_is_at_no_distance_from_itself_and_distances_are_symmetric():
    first, second = small_vit(), small_vit(1)
    same = compare(first, first)
    assert all(row["identity_share"] == row["log_alpha"] == 0 for row in same.distances)
    there, back = compare(first, second), compare(second, first)
    assert distance(there)["identity_share"] == pytest.approx(distance(back)["identity_share"])
    assert distance(there)["log_alpha"] == pytest.approx(distance(back)["log_alpha"])


def test_the_sign_of_the_diagonal_is_a_distance_of_twice_its_cosine():
    found = compare(mimetic(beta_ov=-0.4, embed_dim=96), mimetic(beta_ov=0.4, embed_dim=96))
    assert distance(found)["identity_share"] == pytest.approx(2 / math.sqrt(2), rel=0.02)
    assert distance(found)["log_alpha"] < 0.02
    assert distance(found, "qk")["identity_share"] < 1e-6  # the same seed draws the same QK


def test_a_factor_of_ten_is_one_in_log_alpha_and_nothing_in_identity():
    found = compare(mimetic(embed_dim=96), mimetic(embed_dim=96, alpha_ov=4.0, beta_ov=-4.0))
    assert distance(found)["log_alpha"] == pytest.approx(1, abs=1e-4)
    assert distance(found)["identity_share"] < 1e-4


def test_width_head_count_and_depth_of_the_same_structure_make_little_distance():
    found = compare(mimetic(embed_dim=96), mimetic(1, embed_dim=144, num_heads=2, depth=7))
    assert distance(found)["identity_share"] < 0.05
    assert distance(found)["log_alpha"] < 0.03


def test_distances_are_taken_by_the_trapezoid_rule_between_interpolated_profiles():
    profile = Profile("a", "qk", "beta", np.array([0.0, 0.5, 1.0]), np.array([0.0, 1.0, 0.0]))
    np.testing.assert_allclose(profile.at(np.array([0.25, 0.5, 0.9])), [0.5, 1.0, 0.2])
    one = Profile("b", "qk", "beta", np.array([0.5]), np.array([3.0]))
    np.testing.assert_array_equal(one.at(np.array([0.0, 1.0])), [3.0, 3.0])


def test_three_models_give_three_pairs_and_distinct_names():
    model = small_vit()
    found = compare(model, small_vit(1), small_vit(2))
    assert isinstance(found, Comparison)
    assert len(set(found.models)) == 3
    pairs = {(row["first"], row["second"]) for row in found.distances}
    assert len(pairs) == 3


def test_a_model_without_noise_has_no_log_distance():
    model = small_vit()
    with torch.no_grad():
        model.blocks[0].attn.proj.weight.zero_()
    row = distance(compare(small_vit(1), model))
    assert row["log_alpha"] is None
    assert math.isfinite(row["identity_share"])


def test_one_model_or_unmatched_checkpoints_are_refused():
    with pytest.raises(UsageError, match="at least two models"):
        compare(small_vit())
    with pytest.raises(UsageError, match="1 checkpoint for 2 models: give one for each"):
        compare("a", "b", checkpoints=["c"])
