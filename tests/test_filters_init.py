"""`conv-covariance`: filters have the requested covariance and their own scale, a seed determines them, checks hold."""

import json
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

import attnlens
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.filters.closed_form import Shape, closed_form
from attnlens.filters.trained import trained_shape
from attnlens.inits import create_model, init_, verify_init
from attnlens.inits.random import Streams
from attnlens.layouts.depthwise import filter_parameters
from tests.filter_models import CONVNEXT, both, convmixer, vit

NAME = "conv-covariance"


def filters_of(model):
    state = model.state_dict()
    return [state[name].double().numpy().reshape(len(state[name]), -1) for name in filter_parameters(model)]


def changed_by(model, before):
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# What is drawn.


@pytest.mark.parametrize("options", [{}, {"relative_s": 0.1, "blur": 0.5, "slope": 0.0, "contrast": 0.2}])
def test_the_sample_covariance_is_sigma_within_what_sampling_allows(options):
    """Every entry within five of its standard errors, the whole within three of its expected error; iid is neither."""
    count, kernel = 20_000, (3, 5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(count, count, kernel, groups=count), nn.Conv2d(2, 2, 3, groups=2))
    scale = float((filters_of(model)[0] ** 2).sum(1).mean())
    wanted = closed_form(kernel, trained_shape(strided=False)._replace(**options).at(kernel)) * scale
    stderr = np.sqrt((np.outer(np.diag(wanted), np.diag(wanted)) + wanted**2) / count)

    def away(flat):
        return np.abs(flat.T @ flat / count - wanted) / stderr

    iid = filters_of(model)[0]
    report = init_(model, NAME, seed=3, **options)
    flat = filters_of(model)[0]
    assert away(flat).max() < 5
    assert np.abs(flat.mean(0) / np.sqrt(np.diag(wanted) / count)).max() < 5
    assert away(iid).max() > 50
    row = report.filters[0]
    assert row.covariance_error < 3 * row.expected_error
    assert row.expected_error == pytest.approx(
        math.sqrt((scale**2 + (wanted**2).sum()) / count) / np.linalg.norm(wanted), rel=1e-6
    )
    assert row.relative_error < 1e-7
    tails = (flat**4).mean(0) / (flat**2).mean(0) ** 2
    np.testing.assert_allclose(tails, 3, atol=6 * math.sqrt(96 / count))  # normal: the fourth moment is 3


def test_every_layer_keeps_its_sum_of_squares_and_biases_become_zero():
    model = convmixer()
    before = [float((flat**2).sum()) for flat in filters_of(model)]
    init_(model, NAME)
    for flat, wanted in zip(filters_of(model), before, strict=True):
        assert (flat**2).sum() == pytest.approx(wanted, rel=1e-6)
    assert not any(block[0].fn[0].bias.any() for block in model.blocks)


def test_an_option_holds_for_all_layers_and_what_is_not_given_is_of_the_layers_kind():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(2000, 2000, 5, stride, groups=2000) for stride in (1, 2, (1, 2))))
    init_(model, NAME, relative_s=0.1)
    rows = list(attnlens.inspect(model).filters.stats.records())
    np.testing.assert_allclose([row["relative_s"] for row in rows], 0.1, rtol=0.1)
    for row, strided in zip(rows, (False, True, True), strict=True):
        wanted = trained_shape(strided)[1:]
        np.testing.assert_allclose([row[f"{part}_share"] for part in ("blur", "slope", "contrast")], wanted, atol=0.03)
        assert row["explained_covariances"] > 0.9
    init_(model, NAME, blur=0.2, slope=0.3, contrast=0.1)
    for row in attnlens.inspect(model).filters.stats.records():
        assert (row["blur_share"], row["slope_share"]) == pytest.approx((0.2, 0.3), abs=0.03)


def test_several_filters_a_channel_and_oblong_kernels_are_drawn_alike():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(300, 1200, (1, 7), groups=300))
    init_(model, NAME, relative_s=0.1, blur=0.5, slope=0.2, contrast=0.2)
    flat = filters_of(model)[0]
    S = flat.T @ flat
    np.testing.assert_allclose(S / np.trace(S), closed_form((1, 7), Shape(4.9, 0.5, 0.2, 0.2)), atol=0.03)


# What is left alone.


@pytest.mark.parametrize("name", [NAME, "norm-matched"])
def test_nothing_but_depthwise_layers_changes_and_the_seed_determines_it(name):
    given = {"of": NAME} if name == "norm-matched" else {}
    state = torch.get_rng_state()
    made = [both(), both(), both()]
    before = copied(made[0])
    state = torch.get_rng_state()
    for model, seed in zip(made, (4, 4, 5), strict=True):
        init_(model, name, seed=seed, **given)
    assert torch.equal(torch.get_rng_state(), state)
    assert changed_by(made[0], before) == {"mix.weight", "mix.bias", "widen.weight"}
    assert not changed_by(made[1], copied(made[0]))
    assert changed_by(made[2], copied(made[0])) == {"mix.weight", "widen.weight"}


def test_attention_rules_leave_filters_alone_and_a_seed_means_what_it_meant():
    model, before = both(), copied(both())
    init_(model, "qk-only", seed=1)
    assert changed_by(model, before) == {"attention.in_proj_weight"}
    # the first entry of the first QK stream, as it was before filters had streams
    start = int(np.random.SeedSequence(1).generate_state(1)[0])
    expected = torch.Generator().manual_seed((start + (1 * 8 + 0) * 4096 + 2) % 2**32).initial_seed()
    assert Streams(1).generator("qk", 1, 2).initial_seed() == expected


def test_no_stream_of_filters_is_one_of_attention():
    streams = Streams(0)
    attention = {streams.generator(p, layer).initial_seed() for p in ("qk", "padding") for layer in range(100)}
    filters = {streams.generator(p, layer).initial_seed() for p in ("filters", "directions") for layer in range(100)}
    assert len(attention | filters) == 400


def test_a_layers_draw_depends_on_nothing_but_its_place():
    """The same seed gives a layer of a deeper network the same draw."""
    short, long = convmixer(depth=2), convmixer(depth=5)
    for model in (short, long):
        init_(model, NAME, seed=2)
    one, other = filters_of(short)[1], filters_of(long)[1]
    np.testing.assert_allclose(one / np.linalg.norm(one), other / np.linalg.norm(other), atol=1e-7)
    assert abs(np.vdot(filters_of(long)[0], filters_of(long)[1])) < 0.3 * np.vdot(one, one)


def test_half_precision_is_written_in_its_own_type_and_twice_is_once():
    model = convmixer().bfloat16()
    report = init_(model, NAME)
    assert model.blocks[0][0].fn[0].weight.dtype == torch.bfloat16
    assert 1e-4 < report.worst_error < 4e-3
    single, twice = convmixer(), convmixer()
    for times, network in ((1, single), (2, twice)):
        for _ in range(times):
            init_(network, NAME)
    for one, other in zip(filters_of(single), filters_of(twice), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


# Controls.


def test_norm_matched_filters_have_the_norms_of_the_other_and_no_covariance():
    ours, control = convmixer(dim=600), convmixer(dim=600)
    init_(ours, NAME, seed=1)
    report = init_(control, "norm-matched", of=NAME, seed=1)
    for one, other in zip(filters_of(ours), filters_of(control), strict=True):
        norms = np.linalg.norm(one, axis=1)
        np.testing.assert_allclose(np.linalg.norm(other, axis=1), norms, rtol=1e-5)
        cosines = (one * other).sum(1) / norms**2
        assert abs(cosines.mean()) < 5 / math.sqrt(25 * 600)
    assert {row["verdict"] for row in attnlens.inspect(control).filters.stats.records()} == {"isotropic"}
    assert all(row.effective_rank > 15 for row in report.filters)


def test_create_model_is_a_function_of_the_seed_and_differs_in_filters_only():
    made = {name: create_model("convnext_tiny", init=name, seed=7, **CONVNEXT) for name in ("default", NAME)}
    torch.manual_seed(7)
    theirs = timm.create_model("convnext_tiny", **CONVNEXT).state_dict()
    assert not changed_by(made["default"], theirs)
    assert changed_by(made[NAME], theirs) == set(filter_parameters(made[NAME]))


# Checks.


def test_what_was_drawn_passes_whole_and_by_its_covariance():
    model = convmixer()
    init_(model, NAME, seed=5)
    whole = verify_init(model, init=NAME, seed=5)
    assert (whole.passed, whole.whole) == (True, True)
    assert [(check.layer, check.circuit) for check in whole.checks[:2]] == [(0, "filters"), (0, "bias")]
    assert verify_init(model, init=NAME).passed
    nn.init.constant_(model.blocks[2][0].fn[0].bias, 0.1)
    failed = [check for check in verify_init(model, init=NAME, seed=5).checks if not check.passed]
    assert [(check.layer, check.circuit) for check in failed] == [(2, "bias")]


def test_other_draws_fail_whole_and_other_covariances_by_statistics():
    model = convmixer(dim=64)
    init_(model, NAME, seed=5)
    assert not verify_init(model, init=NAME, seed=6).passed
    assert not any(check.passed for check in verify_init(model, init="norm-matched", of=NAME).checks)
    assert not any(check.passed for check in verify_init(convmixer(dim=64), init=NAME).checks)
    init_(model, "norm-matched", of=NAME, seed=5)
    assert verify_init(model, init="norm-matched", of=NAME).passed
    assert not verify_init(model, init=NAME).passed


def test_statistics_pass_whatever_the_seed():
    model = convmixer(depth=2)
    for seed in range(12):
        init_(model, NAME, seed=seed)
        assert verify_init(model, init=NAME).passed, seed


def test_a_file_says_itself_what_it_should_be(run):
    arguments = [f"--model-arg={name}={json.dumps(value)}" for name, value in CONVNEXT.items()]
    done = run("init", "convnext_tiny", "--init", NAME, "--seed", "2", "-o", "net.safetensors", *arguments)
    assert done.code == 0, done.err
    assert "filters: 108 in 6 layers" in done.out
    done = run("verify-init", "net.safetensors")
    assert done.code == 0, done.err
    assert "depthwise filters, whole matrices" in done.out
    assert "passed: 12 of 12 checks" in done.out
    others = [f"--option={name}={value}" for name, value in (("blur", 0.8), ("slope", 0.1), ("contrast", 0.0))]
    done = run("verify-init", "net.safetensors", "--init", NAME, *others)
    assert done.code == 1
    assert "the error of the covariance is" in done.out


def test_parameters_go_to_every_initialiser_that_takes_them(run, tmp_path):
    attnlens.fit_params(convmixer()).save(tmp_path / "p.json")
    arguments = [f"--model-arg={name}={json.dumps(value)}" for name, value in CONVNEXT.items()]
    assert run("init", "convnext_tiny", "--init", NAME, "-p", "p.json", "-o", "n.safetensors", *arguments).code == 0
    assert run("verify-init", "n.safetensors", "-p", "p.json", "--init", NAME, "--seed", "0").code == 0
    refused = run("init", "convnext_tiny", "--init", "mimetic", "-p", "p.json")
    assert refused.code == 2
    assert "--params goes with --init fitted, conv-covariance, norm-matched" in refused.err


# Errors.


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"form": "full"}, "needs params"),
        ({"form": "half"}, "'full' or 'parametric'"),
        ({"relative_s": 0}, "above 0 and up to 1"),
        ({"relative_s": 1.5}, "above 0 and up to 1"),
        ({"blur": -0.1}, "at least 0"),
        ({"contrast": 1.1}, "from 0 to 1"),
        ({"blur": 0.9}, "come to 1 at most, name all three"),
        ({"blurr": 1}, "did you mean blur"),
    ],
)
def test_options_that_are_wrong_are_named(options, text):
    with pytest.raises(UsageError, match=text):
        init_(convmixer(), NAME, **options)


def test_widths_and_parameters_exclude_each_other():
    with pytest.raises(UsageError, match="measured in the params"):
        init_(convmixer(), NAME, params=attnlens.fit_params(convmixer()), relative_s=0.1)


def test_a_network_without_layers_of_the_kind_is_refused():
    with pytest.raises(UnsupportedAttentionError, match=r"'conv-covariance' is for depthwise convolution, and .* none"):
        init_(vit(), NAME)
    with pytest.raises(UnsupportedAttentionError, match="'mimetic' is for attention, and ConvMixer has none"):
        init_(convmixer(), "mimetic")
    with pytest.raises(UnsupportedAttentionError, match="'mimetic' is for attention"):
        verify_init(convmixer())


def test_zeros_have_no_scale_to_keep():
    model = convmixer()
    nn.init.zeros_(model.blocks[1][0].fn[0].weight)
    report = init_(model, NAME)
    assert [(item.layer, item.circuit) for item in report.skipped] == [(1, "filters")]
    assert [row.layer for row in report.filters] == [0, 2, 3]
    for name in filter_parameters(model):
        nn.init.zeros_(model.get_parameter(name))
    with pytest.raises(UnsupportedAttentionError, match="holds zeros only"):
        init_(model, NAME)


def test_weights_without_numbers_are_refused():
    with torch.device("meta"):
        model = convmixer()
    with pytest.raises(UsageError, match="meta device"):
        init_(model, NAME)


def test_the_report_is_plain_json():
    report = init_(convmixer(), NAME)
    data = json.loads(json.dumps(report.to_json()))
    assert [row["kernel"] for row in data["filters"]] == [[5, 5]] * 4
    assert data["options"] == {}
    assert "filters: 96 in 4 layers" in str(report)
