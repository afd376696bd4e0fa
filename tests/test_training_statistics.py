"""The statistics against scipy, closed forms and values worked out by hand; the words of the report."""

import json
from itertools import product

import numpy as np
import pytest
from scipy import stats

from attnlens.training.figures import draw_curves
from attnlens.training.metrics import BITS_PER_BYTE
from attnlens.training.report import conclusion, render_report
from attnlens.training.results import PairingError, check_pairing, results_lines, summarise
from attnlens.training.statistics import (
    Mean,
    contrasts,
    epochs_to,
    fieller,
    gap_closed,
    paired_t,
    sign_flip,
    smallest_sign_flip,
)
from tests.training_setup import config

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [2, 3, 6, 11])
def test_the_paired_interval_and_p_value_are_scipys(n):
    mine, theirs = RNG.normal(0.7, 0.02, n), RNG.normal(0.68, 0.02, n)
    (found,) = contrasts({"a": dict(enumerate(mine)), "b": dict(enumerate(theirs))}, [("a", "b")])
    expected = stats.ttest_rel(mine, theirs)
    interval = expected.confidence_interval(0.95)
    assert found.t_p == pytest.approx(expected.pvalue)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    assert found.difference.mean == pytest.approx(mine.mean() - theirs.mean())


def test_half_widths_are_those_stated_for_a_spread_of_a_fifth_of_a_point():
    """sd of the difference of two runs with sd .2 that are paired: .28 each way without correlation."""
    for n, half in ((3, 0.70), (5, 0.35), (10, 0.20), (20, 0.13)):
        values = np.linspace(-1, 1, n)
        values *= 0.2 * np.sqrt(2) / values.std(ddof=1)
        found = Mean.of(values.tolist())
        assert found.high == pytest.approx(half, abs=0.01)


@pytest.mark.parametrize("n", [2, 3, 6, 9])
def test_sign_flips_are_scipys_exact_permutation_test(n):
    values = RNG.normal(0.3, 1, n)
    expected = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    )
    assert sign_flip(values.tolist()) == pytest.approx(expected.pvalue)


def test_sign_flips_count_patterns_one_by_one():
    values = [0.5, -0.25, 1.0, 0.125]
    sums = [abs(sum(s * v for s, v in zip(signs, values, strict=True))) for signs in product((1, -1), repeat=4)]
    assert sign_flip(values) == sum(value >= abs(sum(values)) for value in sums) / 16


def test_sign_flips_cannot_go_under_their_floor():
    assert sign_flip([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip([0.1] * 6) == pytest.approx(0.03125)
    assert sign_flip([0.1] * 18) < 1e-3  # sampled patterns, the observed one among them
    assert sign_flip([0.1] * 18) >= 2**-16
    assert sign_flip([0.0, 0.0, 0.0]) == 1


def test_holm_runs_over_the_declared_contrasts():
    shifts = {"a": 0.03, "b": 0.02, "c": 0.0}
    noise = RNG.normal(0, 0.01, (4, 6))
    accuracies = {
        name: dict(enumerate(0.7 + shift + row)) for (name, shift), row in zip(shifts.items(), noise, strict=False)
    }
    accuracies["base"] = dict(enumerate(0.7 + noise[3]))
    found = contrasts(accuracies, [(name, "base") for name in shifts])
    order = sorted(found, key=lambda one: one.t_p)
    running = 0.0
    for rank, one in enumerate(order):
        running = max(running, min(1.0, (3 - rank) * one.t_p))
        assert one.t_holm == pytest.approx(running)


def test_pairs_without_spread_and_single_pairs():
    for alike in ([0.01, 0.01, 0.01], [0.0, 0.0], [0.700 + 10 / 797 - 0.700, 0.712 + 10 / 797 - 0.712]):
        assert np.isnan(paired_t(alike))
        assert np.isinf(Mean.of(alike).high)
        assert Mean.of(alike).sd == 0
    assert np.isnan(paired_t([0.3]))
    assert np.isinf(Mean.of([0.3]).high)


def test_contrasts_without_a_p_value_stay_in_the_family_that_was_declared():
    base = dict(enumerate([0.5] * 6))
    moved = {s: 0.5 + d for s, d in enumerate([0.02, 0.01, 0.03, 0.02, 0.04, 0.01])}
    alike = dict.fromkeys(range(6), 0.52)
    one, same = contrasts({"a": moved, "b": alike, "c": base}, [("a", "c"), ("b", "c")])
    assert one.t_holm == pytest.approx(2 * one.t_p)
    assert one.sign_flip_holm == pytest.approx(2 * one.sign_flip_p)
    assert all(np.isnan(p) for p in (same.t_p, same.t_holm, same.sign_flip_p, same.sign_flip_holm))


@pytest.mark.parametrize("n", [2, 5, 6, 9, 16])
def test_the_smallest_sign_flip_p_is_that_of_pairs_that_all_agree(n):
    assert smallest_sign_flip(n) == sign_flip([0.1] * n)
    for family in (1, 3, 7):
        values = {"base": dict.fromkeys(range(n), 0.5)}
        values |= {f"arm{i}": {s: 0.6 + 0.01 * i + 0.001 * s for s in range(n)} for i in range(family)}
        found = contrasts(values, [(f"arm{i}", "base") for i in range(family)])
        assert {one.sign_flip_holm for one in found} == {smallest_sign_flip(n, family)}


def test_seven_contrasts_of_six_seeds_cannot_go_under_a_fifth():
    assert smallest_sign_flip(6, 7) == 0.21875
    assert smallest_sign_flip(0, 7) == 1
    assert smallest_sign_flip(18) == 2**-16


def test_seeds_one_arm_did_not_finish_leave_the_pair():
    (found,) = contrasts({"a": {0: 0.5, 1: 0.6, 3: 0.7}, "b": {0: 0.4, 2: 0.9, 3: 0.5}}, [("a", "b")])
    assert found.seeds == (0, 3)
    assert found.differences == pytest.approx((0.1, 0.2))


def arms(mimetic=0.75, default=0.70, pretrained=0.90, spread=0.004, n=8):
    noise = np.random.default_rng(5).normal(0, spread, (3, n))
    centres = {"mimetic": mimetic, "default": default, "pretrained": pretrained}
    return {name: dict(enumerate(centre + row)) for (name, centre), row in zip(centres.items(), noise, strict=True)}


def closed(accuracies):
    return gap_closed(accuracies, "mimetic", baseline="default", pretrained="pretrained")


def test_gap_closed_is_the_ratio_of_mean_differences_with_fiellers_interval():
    accuracies = arms()
    found = closed(accuracies)
    means = {name: np.mean(list(values.values())) for name, values in accuracies.items()}
    assert found.share == pytest.approx(
        (means["mimetic"] - means["default"]) / (means["pretrained"] - means["default"])
    )
    assert found.low < found.share < found.high
    values = {name: np.array(list(column.values())) for name, column in accuracies.items()}
    above, whole = values["mimetic"] - values["default"], values["pretrained"] - values["default"]
    for bound, outwards in ((found.low, -1e-6), (found.high, 1e-6)):  # where scipy's own t test turns
        assert stats.ttest_1samp(above - bound * whole, 0).pvalue == pytest.approx(0.05)
        assert stats.ttest_1samp(above - (bound + outwards) * whole, 0).pvalue < 0.05


@pytest.mark.parametrize(
    ("kind", "above", "whole"),
    [
        ("between", [0.05, 0.06, 0.04, 0.05], [0.10, 0.12, 0.09, 0.11]),
        ("outside", [0.05, 0.06, 0.04, 0.05], [0.02, -0.03, 0.04, 0.01]),
        ("every", [0.01, -0.02, 0.03, 0.00], [0.02, -0.03, 0.04, 0.01]),
    ],
)
def test_fiellers_set_holds_the_ratios_that_a_t_test_does_not_reject(kind, above, whole):
    found = fieller(above, whole)
    assert found.kind == kind
    for ratio in np.tan(np.linspace(-1.57, 1.57, 2001)):  # from -1256 to 1256
        kept = stats.ttest_1samp(np.array(above) - ratio * np.array(whole), 0).pvalue >= 0.05
        assert (
            kept
            == {
                "between": found.low <= ratio <= found.high,
                "outside": ratio <= found.low or ratio >= found.high,
                "every": True,
            }[kind]
        )


def test_gap_closed_is_not_clipped():
    assert closed(arms(mimetic=0.60)).share < 0
    assert closed(arms(mimetic=0.95)).share > 1


def test_gap_closed_is_refused_without_a_gap():
    assert "holds 0" in closed(arms(pretrained=0.701)).refused
    assert "under a point" in closed(arms(pretrained=0.706, spread=0.0005)).refused
    assert "too few" in closed(arms(n=2)).refused
    assert "the same in every seed" in closed(arms(spread=0)).refused


def test_gap_closed_is_refused_where_pretrained_is_worse_and_says_what_cannot_be_left_out():
    assert closed(arms(pretrained=0.6)).refused == "pretrained was not better than default"
    assert np.isnan(closed(arms(pretrained=0.6)).share)
    fewer_bits = gap_closed(
        arms(mimetic=2.9, default=3.0, pretrained=2.5),
        "mimetic",
        baseline="default",
        pretrained="pretrained",
        metric=BITS_PER_BYTE,
    )
    assert fewer_bits.refused == ""
    assert 0.1 < fewer_bits.low < fewer_bits.share < fewer_bits.high < 0.3
    assert "no share is left out" in closed(arms(mimetic=0.7005, pretrained=0.701)).refused
    assert "left out" in closed(arms(mimetic=0.75, pretrained=0.701)).refused


def test_epochs_to_keep_what_was_not_reached_as_censored():
    curves = {
        0: [(0, 0.1), (5, 0.62), (10, 0.58)],
        1: [(0, 0.1), (5, 0.3), (10, 0.6)],
        2: [(0, 0.1), (5, 0.2), (10, 0.3)],
    }
    found = epochs_to("a", 0.6, curves)
    assert found.by_seed == {0: 5, 1: 10, 2: None}
    assert found.reached == 2
    assert found.median == 10
    assert epochs_to("a", 0.61, curves).median is None
    assert epochs_to("a", 0.6, {0: curves[0], 2: curves[2]}).median is None  # between 5 and never


def contrast_of(differences):
    other = dict.fromkeys(range(len(differences)), 0.5)
    return contrasts(
        {"mimetic": {s: 0.5 + d for s, d in enumerate(differences)}, "default": other}, [("mimetic", "default")]
    )[0]


def test_conclusions_say_what_the_interval_allows():
    clear = conclusion(contrast_of([0.05, 0.06, 0.055, 0.05, 0.06, 0.052]), 1)
    assert "mimetic was more accurate: +5.5 points" in clear
    assert "screening" not in clear
    worse = conclusion(contrast_of([-0.05, -0.06, -0.055, -0.05, -0.06, -0.052]), 1)
    assert "mimetic was less accurate" in worse
    nothing = conclusion(contrast_of([0.05, -0.06, 0.01, 0.02, -0.03, 0.01]), 1)
    assert "no difference was shown" in nothing
    assert "more accurate" not in nothing
    assert "screening only, n = 3" in conclusion(contrast_of([0.05, 0.06, 0.055]), 1)
    assert "the difference was the same in every seed (n = 6), +1.0 points" in conclusion(contrast_of([0.01] * 6), 1)
    assert "Nothing can be said" in conclusion(contrast_of([0.05]), 1)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("spread", [0, 1e-6, 0.01])
def test_no_difference_is_called_one_under_six_seeds_and_no_p_value_stands_without_spread(n, spread):
    said = conclusion(contrast_of([0.1 + spread * seed for seed in range(n)]), 1)
    assert f"screening only, n = {n}" in said
    assert "mimetic was more accurate:" not in said
    assert "p <" not in said
    assert "p =" not in said
    assert ("A direction at most" in said) == (spread > 0)


def test_a_difference_that_holm_takes_back_is_only_a_hint():
    hint = contrast_of([0.05, 0.01, 0.03, 0.0, 0.04, 0.005])
    assert hint.difference.low > 0
    corrected = hint.__class__(**{**vars(hint), "t_holm": 0.2})
    assert "does not survive the correction over 7 contrasts" in conclusion(corrected, 7)


def run_records(arm, seed, accuracies, *, streams=None, status="finished", tuning=False):
    structure = {
        fold: {name: [0.1] for name in ("qk_alpha", "qk_beta", "ov_alpha", "ov_beta")} for fold in ("raw", "effective")
    }
    common = {"arm": arm, "seed": seed, "lr": 1e-3, "tuning": tuning, "train_seconds": 2.0, "models_in_stack": 1}
    common["provenance"] = {"versions": {"torch": "x"}, "device": "cpu", "command": "test"}
    lines = []
    for epoch, accuracy in enumerate(accuracies):
        hashes = [] if epoch == 0 else [(streams or {}).get(epoch, f"{seed}-{epoch}")]
        lines.append(
            {
                **common,
                "epoch": epoch,
                "streams": hashes,
                "status": "running",
                "accuracy": accuracy,
                "structure": structure,
            }
        )
    lines[-1]["status"] = status
    return lines


def records_of(seeds=6, **changes):
    found = {}
    for seed in range(seeds):
        found[f"default-{seed}"] = run_records("default", seed, [0.1, 0.3, 0.5 + 0.01 * seed])
        found[f"mimetic-{seed}"] = run_records("mimetic", seed, [0.1, 0.5, 0.6 + 0.012 * seed])
    found.update(changes)
    return found


def test_summary_and_report_hold_the_numbers_of_the_records():
    summary = summarise(config(seeds=6), records_of())
    assert summary.complete
    assert not summary.screening
    assert summary.streams == dict.fromkeys(range(6), 2)
    assert summary.means["mimetic"].mean == pytest.approx(np.mean([0.6 + 0.012 * s for s in range(6)]))
    report = render_report(summary)
    assert "12 of 12 runs finished" in report
    assert "mimetic was more accurate: +10.5 points" in report
    assert "Screening" not in report
    data = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert data["contrasts"][0]["difference"]["mean"] == pytest.approx(0.105)
    rows = [line.split(",") for line in summary.to_csv().splitlines()]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert float(rows[2][rows[0].index("minus_default")]) == pytest.approx(0.105)


def test_few_seeds_and_unfinished_comparisons_say_so():
    summary = summarise(config(seeds=6), records_of(3))
    report = render_report(summary)
    assert "**Screening" in report
    assert "**Unfinished" in report
    assert not summary.complete


def test_a_report_of_one_arm_has_no_table_of_contrasts_and_nothing_to_pair():
    alone = {name: lines for name, lines in records_of(1).items() if name.startswith("default")}
    report = render_report(summarise(config(seeds=1, arms=("default",), contrasts=()), alone))
    assert "1 of 1 run finished; 1 seed an arm" in report
    assert "No contrast was declared." in report
    assert "Declared contrasts" not in report
    assert "one arm: nothing to compare" in report


def test_diverged_runs_stay_in_the_report_and_out_of_the_numbers():
    broken = run_records("mimetic", 5, [0.1, 0.2])
    broken.append({**broken[-1], "epoch": 2, "status": "diverged", "streams": ["5-2"]})
    broken[1]["status"] = "running"
    summary = summarise(config(seeds=6), records_of(6, **{"mimetic-5": broken}))
    assert summary.complete
    assert summary.diverged == (("mimetic", 5, 2),)
    assert summary.contrasts[0].difference.n == 5
    assert "mimetic, seed 5, diverged in epoch 2" in render_report(summary)


@pytest.mark.parametrize("last", ["diverged", "running"])
def test_runs_that_diverged_or_stopped_enter_no_count(last):
    broken = run_records("mimetic", 5, [0.1, 0.95, 0.96], status=last)  # it had reached the target
    summary = summarise(config(seeds=6), records_of(6, **{"mimetic-5": broken}))
    (mimetic,) = (one for one in summary.epochs if one.arm == "mimetic")
    assert set(mimetic.by_seed) == set(range(5))
    assert summary.means["mimetic"].n == summary.contrasts[0].difference.n == 5
    assert "| mimetic | 5 of 5 |" in render_report(summary)
    row = dict(zip(*(line.split(",") for line in summary.to_csv().splitlines()[::2]), strict=True))
    assert (row["arm"], row["n"], row["reached"]) == ("mimetic", "5", "5")
    (axes,) = draw_curves(summary).axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels[1] == ("mimetic (n = 5)" if last == "diverged" else "mimetic (n = 5, 1 not finished)")


def test_the_report_says_how_small_a_p_value_can_get():
    told = render_report(summarise(config(seeds=6), records_of()))
    assert "With n = 6 and 1 contrast the corrected sign-flip p cannot go under .0312." in told
    many = [("mimetic", "default")] * 7
    told = render_report(summarise(config(seeds=6, contrasts=many), records_of()))
    assert "cannot go under .2188: none of these contrasts can go under .05 that way." in told


def test_uneven_classes_are_compared_by_balanced_accuracy_and_the_report_says_so():
    records = records_of(6)
    for lines in records.values():
        for line in lines:
            line["balanced_accuracy"] = line["accuracy"] / 2
    summary = summarise(config(seeds=6, commonest=0.62), records)
    assert summary.config.metric.field == "balanced_accuracy"
    assert summary.means["mimetic"].mean == pytest.approx(np.mean([0.3 + 0.006 * s for s in range(6)]))
    report = render_report(summary)
    assert "the commonest is 62.0% of the test images" in report
    assert "## Balanced test accuracy at the last epoch" in report
    assert config(commonest=None).sha256() == config().sha256()  # what was compared before keeps its hash


def test_unpaired_streams_are_an_error_and_no_footnote():
    broken = {"mimetic-1": run_records("mimetic", 1, [0.1, 0.5, 0.6], streams={2: "other"})}
    with pytest.raises(PairingError, match="seed 1: mimetic and default were trained on different streams"):
        summarise(config(seeds=2), records_of(2, **broken))
    assert check_pairing(list(records_of(2).values())) == {0: 2, 1: 2}


def test_results_hold_a_line_an_evaluation_with_its_configuration():
    settings, records = config(seeds=2), records_of(2)
    lines = [json.loads(line) for line in results_lines(settings, records).splitlines()]
    assert len(lines) == sum(map(len, records.values()))
    assert {line["config_sha256"] for line in lines} == {settings.sha256()}
    assert all({"run", "arm", "seed", "epoch", "provenance", "data_sha256"} <= line.keys() for line in lines)
