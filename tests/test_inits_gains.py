"""`fitted` with gains: balanced products and gains of the source, channel by channel or by their quantiles."""

import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import attnlens
from attnlens.balance import balance
from attnlens.circuits import FactoredProduct
from attnlens.errors import ParamsError, UsageError
from attnlens.fit.fit_params import fit_params
from attnlens.fit.gains import LEVELS, CircuitGains, GainLaw, gains_of, normal_scores
from attnlens.fit.params import InitParams
from attnlens.inits import init_, verify_init
from attnlens.inits.gained import Factors, offdiagonal_tails, placed, with_gains

D, HEADS, DEPTH = 78, 3, 2  # heads of 26
GOLDEN = Path(__file__).parent / "golden" / "params_v3.json"


def network(seed=0, **more):
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": D, "depth": DEPTH, "num_heads": HEADS, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, "init_values": 0.3, **more}).eval()


@torch.no_grad()
def trained(seed=1, **more):
    """Return a network whose products are noise and identity seen through gains that vary by channel."""
    model = network(seed, **more)
    init_(model, "mimetic", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    width = model.embed_dim

    def spread(size):
        return torch.exp(size * torch.randn(width, generator=generator))

    for block in model.blocks:
        query, key, value = block.attn.qkv.weight.split(width)
        shared = spread(0.5)
        query *= shared * spread(0.3)
        key *= shared * spread(0.2)
        value *= spread(0.6)
        block.attn.proj.weight *= spread(0.4)[:, None]
    return model


@pytest.fixture(scope="module")
def source():
    return fit_params(trained())


@pytest.fixture(scope="module")
def refit(source):
    """The fits of networks drawn with the source's gains, by way."""
    found = {}
    for gains in ("channels", "quantiles"):
        model = network(2)
        init_(model, "fitted", params=source, gains=gains, seed=4)
        found[gains] = fit_params(model)
    return found


DRAWN = (("qk", "each"), ("ov", "all"))


def pairs(source, other, circuit, head):
    return list(zip(*(each.select(circuit, head, fold="balanced") for each in (source, other)), strict=True))


def logs(params, circuit, head, layer):
    """Return log r and log c ``[head, channel]`` of one layer's circuit."""
    (found,) = [g for g in params.gains if (g.circuit, g.head, g.layer) == (circuit, head, layer)]
    return [side.by_channel(found.num_heads, found.embed_dim) for side in (found.rows, found.cols)]


# The file.


def test_the_file_holds_the_gains_that_balancing_finds(source):
    opened = trained()
    weights = opened.blocks[1].attn.qkv.weight.detach().double().numpy()
    gain = opened.blocks[1].norm1.weight.detach().double().numpy()[:, None]
    query, key = (weights[start : start + D].T * gain for start in (0, D))
    rows, cols = logs(source, "qk", "each", 1)
    for head in range(HEADS):
        columns = slice(26 * head, 26 * head + 26)
        gains = balance(FactoredProduct(query[:, columns], key[:, columns]))
        np.testing.assert_allclose(rows[head], np.log(gains.rows), atol=2e-3)  # float16
        np.testing.assert_allclose(cols[head], np.log(gains.cols), atol=2e-3)


def test_quantiles_lie_between_the_order_statistics_of_the_channels_averaged_over_heads(source):
    for each in source.gains:
        for side in (each.rows, each.cols):
            ordered = np.sort(side.by_channel(each.num_heads, D), -1).mean(0)
            place = np.clip(LEVELS * D - 0.5, 0, D - 1)
            found = np.array(side.quantiles)
            found = found - (found[0] - ordered[0])  # they are shifted to mean square 1
            assert (found >= ordered[np.floor(place).astype(int)] - 2e-3).all()  # channels are kept in float16
            assert (found <= ordered[np.ceil(place).astype(int)] + 2e-3).all()


def test_correlation_and_sharing_are_those_of_normal_scores(source):
    (each,) = [g for g in source.gains if (g.circuit, g.head, g.layer) == ("qk", "each", 0)]
    rows, cols = logs(source, "qk", "each", 0)
    ranks = [np.argsort(np.argsort(side, -1), -1) for side in (rows, cols)]
    assert each.correlation == pytest.approx(
        np.mean([np.corrcoef(normal_scores(rows[h]), normal_scores(cols[h]))[0, 1] for h in range(HEADS)]), abs=1e-3
    )
    shared = np.corrcoef(ranks[0])[np.triu_indices(HEADS, 1)].mean()  # Spearman's, near that of normal scores
    assert each.rows.shared == pytest.approx(shared, abs=0.05)
    assert each.rows.shared > 0.5  # what `trained` gives to all heads of a layer


def test_a_file_of_gains_comes_back_as_it_was(source, tmp_path):
    assert InitParams.load(source.save(tmp_path / "p.json")) == source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: g["rows"].update(channels="AAAA"), "gains.0: Value error, rows.channels is not 3 x 78 float16"),
        (lambda g: g["cols"].update(channels="%"), "gains.0: Value error, cols.channels is not 3 x 78 float16"),
        (lambda g: g["rows"]["quantiles"].reverse(), "gains.0.rows.quantiles: Value error, holds 69 numbers"),
        (lambda g: g["rows"]["quantiles"].pop(), "gains.0.rows.quantiles: Value error, holds 68 numbers"),
        (lambda g: g.update(correlation=1.5), "gains.0.correlation: Input should be less than or equal to 1"),
        (lambda g: g["rows"].update(dead=-0.1), "gains.0.rows.dead: Input should be greater than or equal to 0"),
        (lambda g: g["kurtosis"].pop(), "gains.0: Value error, kurtosis holds 2 numbers for 3 heads"),
        (lambda g: g.update(source=3), "gains.0.source is 3, but there is 1 source"),
    ],
)
def test_a_wrong_field_of_gains_is_named(source, change, message):
    import json

    data = json.loads(source.to_json())
    change(data["gains"][0])
    with pytest.raises(ParamsError, match=re.escape(message)) as caught:
        InitParams.parse(json.dumps(data))
    assert "\n" not in str(caught.value)


def test_a_file_of_version_3_loads_and_says_that_it_has_no_gains():
    old = InitParams.load(GOLDEN)
    assert (old.schema_version, old.gains, len(old.entries)) == (4, [], 2 * 2 * 5)
    assert InitParams.parse(old.to_json()) == old
    model = network(embed_dim=22, num_heads=2)
    init_(model, "fitted", params=old)
    with pytest.raises(ParamsError, match="hold no gains: fit again"):
        init_(model, "fitted", params=old, gains="quantiles")


def test_raw_parameters_have_no_gains():
    assert fit_params(network(), fold="raw").gains == []


# What is drawn.


@pytest.mark.parametrize("gains", ["channels", "quantiles"])
@pytest.mark.parametrize(("circuit", "head"), DRAWN)
def test_balanced_alpha_is_met_exactly_and_beta_within_a_draws_spread(source, refit, gains, circuit, head):
    for wanted, found in pairs(source, refit[gains], circuit, head):
        assert found.alpha == pytest.approx(wanted.alpha, rel=1e-5)
        assert abs(found.beta - wanted.beta) < 6 * wanted.alpha / D


@pytest.mark.parametrize(("circuit", "head"), DRAWN)
def test_channels_get_the_gains_of_the_sources_channels(source, refit, circuit, head):
    for layer in range(DEPTH):
        for wanted, found in zip(
            logs(source, circuit, head, layer), logs(refit["channels"], circuit, head, layer), strict=True
        ):
            np.testing.assert_allclose(found, wanted, atol=4e-3)  # both are kept in float16


@pytest.mark.parametrize(("circuit", "head"), DRAWN)
def test_quantiles_come_back_and_the_order_of_channels_does_not(source, refit, circuit, head):
    for layer in range(DEPTH):
        for side, (wanted, found) in enumerate(
            zip(logs(source, circuit, head, layer), logs(refit["quantiles"], circuit, head, layer), strict=True)
        ):
            mean = np.sort(wanted).mean(0)
            assert np.sqrt(np.mean((np.sort(found) - mean) ** 2)) < 0.04, side
            assert np.abs(found - wanted).max() > 0.5


@pytest.mark.parametrize("gains", ["channels", "quantiles"])
def test_tails_before_balancing_are_the_sources(source, refit, gains):
    wanted, found = (
        [k for g in each.gains if (g.circuit, g.head) in DRAWN for k in g.kurtosis] for each in (source, refit[gains])
    )
    ratio = np.array(found) / np.array(wanted)
    assert np.mean(np.abs(ratio - 1) <= 0.2) >= 0.75
    assert 0.8 < np.median(ratio) < 1.2


def test_heads_share_their_gains_as_the_sources_do_and_r_goes_with_c(source):
    wide = network(3, embed_dim=1311, num_heads=3, depth=DEPTH)  # 437 a head: the law, not one small draw of it
    law = next(g for g in source.gains if (g.circuit, g.head, g.layer) == ("qk", "each", 0)).law()
    rows, cols = law.draw(3, wide.embed_dim, np.random.default_rng(0))
    scores = [normal_scores(side) for side in (rows, cols)]
    asked = next(g for g in source.gains if (g.circuit, g.head, g.layer) == ("qk", "each", 0))
    for found, side in zip(scores, (asked.rows, asked.cols), strict=True):
        assert np.corrcoef(found)[np.triu_indices(3, 1)].mean() == pytest.approx(side.shared, abs=0.08)
    together = np.mean([np.corrcoef(*pair)[0, 1] for pair in zip(*scores, strict=True)])
    assert together == pytest.approx(asked.correlation, abs=0.08)
    np.testing.assert_allclose([np.mean(side**2, -1) for side in (rows, cols)], 1.0, rtol=1e-9)


@pytest.mark.parametrize(("width", "heads"), [(87, 3), (58, 2), (155, 5)])
def test_quantiles_carry_over_to_another_width_head_dim_and_head_count(source, width, heads):
    model = network(4, embed_dim=width, num_heads=heads)
    report = init_(model, "fitted", params=source, gains="quantiles", seed=1)
    found = fit_params(model)
    for row in report.products:
        assert row.alpha == pytest.approx(row.expected_alpha, rel=1e-5)
    for each in (g for g in found.gains if (g.circuit, g.head) in DRAWN):
        law = next(
            g for g in source.gains if (g.circuit, g.head, g.layer) == (each.circuit, each.head, each.layer)
        ).law()
        for side, gains in enumerate((each.rows, each.cols)):
            for drawn in gains.by_channel(each.num_heads, width):
                np.testing.assert_allclose(np.sort(drawn), law.log_gains(side, width), atol=4e-3)
    assert verify_init(model, init="fitted", params=source, gains="quantiles").passed


def test_another_depth_gets_the_law_interpolated_between_layers(source):
    model = network(4, depth=3)
    requests = source.for_model(model, "quantiles")
    laws = [g.law().values for g in source.gains if (g.circuit, g.head) == ("ov", "all")]
    np.testing.assert_allclose(requests[1].ov_gains.values, (laws[0] + laws[1]) / 2)
    np.testing.assert_allclose(requests[2].ov_gains.values, laws[1])
    everywhere = source.model_copy(update={"per": "model"}).for_model(model, "quantiles")
    np.testing.assert_allclose(everywhere[0].ov_gains.values, (laws[0] + laws[1]) / 2)


@pytest.mark.parametrize(
    "sizes",
    [{"embed_dim": 87}, {"num_heads": 2}, {"num_heads": 2, "embed_dim": 58}, {"depth": 3}],
)
def test_channels_are_refused_where_they_are_not_the_sources(source, sizes):
    with pytest.raises(UsageError, match="pass gains='quantiles'") as caught:
        init_(network(**sizes), "fitted", params=source, gains="channels")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("per", ["layer", "model"])
def test_channels_are_refused_of_parameters_that_are_not_by_head(source, per):
    with pytest.raises(UsageError, match="pass gains='quantiles'"):
        init_(network(), "fitted", params=source.model_copy(update={"per": per}), gains="channels")


def test_several_models_give_the_mean_of_their_laws_and_no_channels():
    both = fit_params(trained(1), trained(2))
    with pytest.raises(UsageError, match="pass gains='quantiles'"):
        init_(network(), "fitted", params=both, gains="channels")
    request = both.for_model(network(), "quantiles")[1]
    laws = [g.law().values for g in both.gains if (g.circuit, g.head, g.layer) == ("qk", "each", 1)]
    np.testing.assert_allclose(request.qk_gains.values, np.mean(laws, 0))
    init_(network(), "fitted", params=both, gains="quantiles")


def test_single_value_heads_have_gains_of_their_own(source):
    model = network(2)
    init_(model, "fitted", params=source, gains="channels", ov="head", seed=4)
    found = fit_params(model)
    for wanted, have in pairs(source, found, "ov", "each"):
        assert have.alpha == pytest.approx(wanted.alpha, rel=1e-5)
    for layer in range(DEPTH):
        for wanted, have in zip(logs(source, "ov", "each", layer), logs(found, "ov", "each", layer), strict=True):
            np.testing.assert_allclose(have, wanted, atol=4e-3)


def test_a_file_of_balanced_products_is_drawn_with_gains_alone(source):
    balanced = fit_params(trained(), fold="balanced")
    assert balanced.gains == source.gains
    with pytest.raises(UsageError, match="are of balanced products: pass gains='channels' or 'quantiles'"):
        init_(network(), "fitted", params=balanced)
    one, other = network(), network()
    init_(one, "fitted", params=balanced, gains="channels", seed=2)
    init_(other, "fitted", params=source, gains="channels", seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_seed_determines_the_draw(source):
    models = [network(5), network(5), network(5)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        init_(model, "fitted", params=source, gains="quantiles", seed=seed)
    first, same, other = (model.blocks[0].attn.qkv.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@torch.no_grad()
def test_dead_channels_stay_dead():
    model = trained()
    for block in model.blocks:
        block.attn.qkv.weight[:, [5, 11]] = 0
    params = fit_params(model)
    fresh = network(3)
    init_(fresh, "fitted", params=params, gains="channels")
    assert not fresh.blocks[0].attn.qkv.weight[:, [5, 11]].any()
    for wanted, found in pairs(params, fit_params(fresh), "qk", "each"):
        assert found.alpha == pytest.approx(wanted.alpha, rel=0.05)
    init_(fresh, "fitted", params=params, gains="quantiles")
    dead = ~fresh.blocks[0].attn.qkv.weight[:D].any(0)
    assert dead.sum() in (0, 1, 2)
    report = verify_init(fresh, init="fitted", params=params, gains="quantiles")
    assert report.passed, [check.problem for check in report.checks if check.problem]


# Its parts.


def test_the_product_is_the_drawn_one_balanced_and_seen_through_the_gains():
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal((2, 31, 7))
    rows, cols = (gains_of(0.4 * generator.standard_normal(31)) for _ in range(2))
    made = with_gains(Factors(left, right), rows, cols, 0.3, float("nan"))
    gains = balance(FactoredProduct(*made))
    np.testing.assert_allclose(gains.rows, rows, rtol=1e-7)
    np.testing.assert_allclose(gains.cols, cols, rtol=1e-7)
    N = (made.left / rows[:, None]) @ (made.right / cols[:, None]).T
    off = N[~np.eye(31, dtype=bool)]
    assert np.sqrt(31 * np.mean(off**2)) == pytest.approx(0.3)
    own = balance(FactoredProduct(left, right))
    before = left @ right.T / np.outer(own.rows, own.cols)
    np.testing.assert_allclose(N, before * N[0, 1] / before[0, 1], rtol=1e-9)


@pytest.mark.parametrize("share", [0.5, 1.5, 2.0])
def test_channels_change_places_until_the_tails_are_those_asked_for(share):
    generator = np.random.default_rng(1)
    N = generator.standard_normal((61, 61))
    rows, cols = np.exp(0.6 * generator.standard_normal((2, 61)))
    wanted = share * offdiagonal_tails(N, rows, cols)
    order = placed(N, rows, cols, wanted)
    assert sorted(order) == list(range(61))
    M = rows[:, None] * N[np.ix_(order, order)] * cols
    off = M[~np.eye(61, dtype=bool)]
    assert np.mean(off**4) / np.mean(off**2) ** 2 - 3 == pytest.approx(wanted, rel=0.06)


def test_dead_channels_keep_their_places():
    generator = np.random.default_rng(1)
    N = generator.standard_normal((31, 31))
    rows, cols = np.exp(0.6 * generator.standard_normal((2, 31)))
    rows[[3, 4]] = cols[7] = 0
    order = placed(N, rows, cols, 40.0)
    assert (order != np.arange(31)).any()
    np.testing.assert_array_equal(order[[3, 4, 7]], [3, 4, 7])


def test_the_law_of_a_dead_share_leaves_so_many_channels_without_a_gain():
    values = np.concatenate([np.linspace(-1, 1, len(LEVELS)), np.zeros(len(LEVELS)), [0, 0, 0.2, 0, 0, 0]])
    rows, cols = GainLaw(values).draw(2, 35, np.random.default_rng(0))
    np.testing.assert_array_equal((rows == 0).sum(1), [7, 7])
    np.testing.assert_allclose(cols, 1.0)


# Verification: every part of what is drawn.


def other_gains(source, change):
    """Return the source's parameters with the gains of every circuit changed."""
    return source.model_copy(update={"gains": [change(each) for each in source.gains]})


def with_channels(each: CircuitGains, rows, cols):
    changed = [type(each.rows).of(side) for side in (rows, cols)]
    return each.model_copy(update=dict(zip(("rows", "cols"), changed, strict=True)))


def channels_of(each: CircuitGains):
    return [side.by_channel(each.num_heads, each.embed_dim) for side in (each.rows, each.cols)]


def in_another_order(each):
    rows, cols = channels_of(each)
    return with_channels(each, np.roll(rows, 1, -1), np.roll(cols, 1, -1))


def wider(each):
    rows, cols = channels_of(each)
    return with_channels(each, 1.1 * rows, cols)


def against(each):
    return each.model_copy(update={"correlation": -0.95 if each.correlation > 0 else 0.95})


def heavier(each):
    return each.model_copy(update={"kurtosis": [None if k is None else 1.5 * k for k in each.kurtosis]})


@pytest.mark.parametrize(
    ("gains", "change", "message"),
    [
        ("channels", in_another_order, "log r of channel"),
        ("channels", wider, "log r of channel"),
        ("quantiles", wider, "log r of rank"),
        ("quantiles", against, "r and c correlate by"),
        ("channels", heavier, "excess kurtosis before balancing is"),
        ("quantiles", heavier, "excess kurtosis before balancing is"),
    ],
)
def test_gains_or_tails_that_are_not_the_files_fail(source, gains, change, message):
    model = network(6)
    init_(model, "fitted", params=other_gains(source, change), gains=gains, seed=3)
    report = verify_init(model, init="fitted", params=source, gains=gains)
    assert not report.passed
    assert any(check.problem.startswith(message) for check in report.checks), [c.problem for c in report.checks]


def test_products_without_gains_fail(source):
    model = network(6)
    init_(model, "fitted", params=source, seed=3)
    assert not verify_init(model, init="fitted", params=source, gains="channels").passed


@pytest.mark.parametrize("size", [1.01, 0.99])
@torch.no_grad()
def test_an_alpha_one_percent_off_fails(source, size):
    model = network(6)
    init_(model, "fitted", params=source, gains="channels", seed=3)
    assert verify_init(model, init="fitted", params=source, gains="channels").passed
    model.blocks[0].attn.qkv.weight[:D] *= size
    problems = [
        c.problem for c in verify_init(model, init="fitted", params=source, gains="channels").checks if c.problem
    ]
    assert len(problems) == HEADS
    assert all(problem.startswith("alpha is") for problem in problems)


@torch.no_grad()
def test_another_split_between_the_factors_fails(source):
    model = network(6)
    init_(model, "fitted", params=source, gains="channels", seed=3)
    model.blocks[1].attn.qkv.weight[:D] *= 8
    model.blocks[1].attn.qkv.weight[D : 2 * D] /= 8
    report = verify_init(model, init="fitted", params=source, gains="channels")
    assert [(c.layer, c.head) for c in report.mistakes["unbalanced split"]] == [(1, head) for head in range(HEADS)]


def test_a_diagonal_of_the_other_sign_fails():
    model = trained()
    params = fit_params(model)
    turned = [e.model_copy(update={"request_beta": -e.request_beta}) for e in params.entries]
    init_(model, "fitted", params=params.model_copy(update={"entries": turned}), gains="channels", seed=3)
    report = verify_init(model, init="fitted", params=params, gains="channels")
    assert report.mistakes["sign"]


FALSE_ALARMS = {
    "small": {},
    "narrow heads": {"num_heads": 13},
    "wide": {"embed_dim": 132, "num_heads": 3},
    "no LayerScale": {"init_values": None},
}


@pytest.mark.parametrize("gains", ["channels", "quantiles"])
@pytest.mark.parametrize("sizes", FALSE_ALARMS)
def test_what_is_drawn_passes_with_and_without_its_seed(gains, sizes):
    params = fit_params(trained(1, **FALSE_ALARMS[sizes]))
    for made in range(3):
        for ov in ("layer", "head"):
            given = {"params": params, "gains": gains, "ov": ov}
            model = network(3, **FALSE_ALARMS[sizes])
            init_(model, "fitted", seed=made + 7, **given)
            for seed in (made + 7, None):
                report = verify_init(model, init="fitted", seed=seed, **given)
                assert report.passed, [c.problem for c in report.checks if c.problem]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_pass_at_their_own_rounding(source, dtype):
    model = network(6)
    init_(model, "fitted", params=source, gains="channels", seed=3)
    assert verify_init(model.to(dtype), init="fitted", params=source, gains="channels").passed


# The commands.


def test_the_commands_draw_gains_and_check_them(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("fit-params", "--figures", "f", "-o", "p.json")[0] == 0
    assert run("init", "--params", "p.json", "--gains", "channels", "-o", "m.safetensors")[0] == 0
    for more in ((), ("--params", "p.json"), ("--params", "p.json", "--gains", "channels")):
        code, out, _ = run("verify-init", "m.safetensors", *more)
        assert code == 0
        assert "seed 0: balanced products, whole" in out
    assert run("verify-init", "m.safetensors", "--gains", "none")[0] == 1


def test_gains_without_parameters_are_told_in_one_line(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("init", "--gains", "channels")
    assert code == 2
    assert "has no option 'gains'" in err


# Real weights.


@pytest.mark.weights
def test_every_product_of_a_real_network_comes_back_with_its_gains(dinov2_file):
    params = fit_params("vit_small_patch14_dinov2", checkpoint=dinov2_file)
    model = timm.create_model("vit_small_patch14_dinov2", img_size=56, init_values=1.0)
    report = init_(model, "fitted", params=params, gains="channels", seed=1)
    now = fit_params(model)
    for circuit, head, count in (("qk", "each", 72), ("ov", "all", 12)):
        both = pairs(params, now, circuit, head)
        assert len(both) == count
        assert all(wanted.alpha_low <= found.alpha <= wanted.alpha_high for wanted, found in both)
        assert np.mean([wanted.beta_low <= found.beta <= wanted.beta_high for wanted, found in both]) >= 0.9
        for layer in range(12):
            for wanted, found in zip(logs(params, circuit, head, layer), logs(now, circuit, head, layer), strict=True):
                np.testing.assert_allclose(found, wanted, atol=4e-3)
    assert len([row for row in report.products if row.circuit == "ov"]) == 12
    assert attnlens.verify_init(model, init="fitted", params=params, gains="channels").passed
    init_(model, "fitted", params=params, gains="quantiles", seed=1)
    assert attnlens.verify_init(model, init="fitted", params=params, gains="quantiles").passed
