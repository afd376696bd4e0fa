"""The parameter file: exact round trips, errors that name the field, versions, and the transfer rule."""

import json

import numpy as np
import pytest
import timm
import torch

import attnlens
from attnlens.errors import AttnlensError, OutputError, ParamsError
from attnlens.fit import params as params_module
from attnlens.fit.params import InitParams
from attnlens.statistics.depth import Trend, relative_depth
from tests.test_inspect import SMALL, small_vit


@pytest.fixture(scope="module")
def fitted():
    return attnlens.fit_params(small_vit(init_values=0.1), command="attnlens fit-params small")


@pytest.fixture(scope="module")
def pooled():
    return attnlens.fit_params(small_vit(), small_vit(1), fold="raw")


def vit(**more):
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **more})


def asked(params, circuit, head, layer, source=0):
    entries = [entry for entry in params.select(circuit, head, layer) if entry.source == source]
    return np.array([[entry.request_alpha, entry.request_beta] for entry in entries])


def under(params, per):
    return params.model_copy(update={"per": per})


# The file.


def test_a_saved_file_loads_to_the_same_parameters(fitted, pooled, tmp_path):
    for params in (fitted, pooled):
        path = params.save(tmp_path / "params.json")
        assert InitParams.load(path) == params
        assert InitParams.load(path).to_json() == path.read_text()


def test_the_file_is_plain_json_with_schema_version_and_provenance(fitted):
    data = json.loads(fitted.to_json())
    assert (data["schema"], data["schema_version"], data["per"], data["fold"]) == (
        "attnlens.params",
        4,
        "head",
        "effective",
    )
    assert data["created"]["command"] == "attnlens fit-params small"
    assert data["sources"][0]["num_layers"] == 3
    assert data["sources"][0]["num_heads"] == [3, 3, 3]
    assert len(data["entries"]) == 3 * 3 * (3 + 3 + 1)


def changed(params, change):
    data = json.loads(params.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["entries"][4].update(alpha=-1), "entries.4.alpha: Input should be greater than or equal to 0"),
        (lambda d: d["entries"][0].update(circuit="kq"), "entries.0.circuit: Input should be 'qk' or 'ov'"),
        (lambda d: d["entries"][2].pop("beta_low"), "entries.2.beta_low: Field required"),
        (lambda d: d["entries"][1].update(beta="much"), "entries.1.beta: Input should be a valid number"),
        (lambda d: d["sources"][0].update(gamma=1), "sources.0.gamma: Extra inputs are not permitted"),
        (lambda d: d["entries"][3].update(verdict="yes"), "entries.3.verdict: Input should be 'identity', 'negative"),
        (lambda d: d["entries"][3].update(p_value=1.5), "entries.3.p_value: Input should be less than or equal to 1"),
        (lambda d: d["entries"][5].update(source=7), "entries.5.source is 7, but there is 1 source"),
        (lambda d: d.update(per="neuron"), "per: Input should be 'head', 'layer' or 'model'"),
        (lambda d: d.update(entries=[]), "entries and filters are both empty"),
        (lambda d: d["pooled"][0]["log_alpha_trend"].update(coefficients=[]), "pooled.0.log_alpha_trend.coeff"),
    ],
)
def test_a_wrong_field_is_named_with_its_place(fitted, tmp_path, change, message):
    (tmp_path / "params.json").write_text(changed(fitted, change))
    with pytest.raises(ParamsError) as caught:
        InitParams.load(tmp_path / "params.json")
    assert str(tmp_path / "params.json") in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, AttnlensError)


@pytest.mark.parametrize("word", ["NaN", "Infinity"])
def test_numbers_that_are_not_finite_are_refused(fitted, word):
    text = changed(fitted, lambda data: data["entries"][0].update(beta="PLACE")).replace('"PLACE"', word)
    with pytest.raises(ParamsError, match=f"{word} is no JSON"):
        InitParams.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"is not JSON .* write it with `attnlens fit-params`"),
        ("[]", "its field 'schema' is not 'attnlens.params'"),
        ('{"schema": "attnlens.stats"}', "its field 'schema' is not 'attnlens.params'"),
    ],
)
def test_another_file_is_refused(tmp_path, text, message):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ParamsError, match=message):
        InitParams.load(tmp_path / "other.json")


def test_a_file_that_cannot_be_read_or_written_is_one_line(fitted, tmp_path):
    with pytest.raises(ParamsError, match=r"cannot read .*absent\.json"):
        InitParams.load(tmp_path / "absent.json")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OutputError, match="cannot write"):
        fitted.save(tmp_path / "file" / "params.json")


@pytest.mark.parametrize("version", [0, 5, -1, "2", None, True, 1.5])
def test_a_version_that_is_not_known_is_refused(fitted, version):
    with pytest.raises(ParamsError, match=r"has schema_version .*this attnlens reads \[1, 2, 3, 4\]: update attnlens"):
        InitParams.parse(changed(fitted, lambda data: data.update(schema_version=version)))


def test_an_older_version_is_migrated_step_by_step(fitted, monkeypatch):
    """Before version 1 there was none: two made-up ones show that a file passes through every step in order."""
    old = json.loads(fitted.to_json())
    old.update(schema_version=-1, product=old.pop("fold"))
    old["kind"] = old.pop("per")

    def from_first(data):
        return {**{k: v for k, v in data.items() if k != "product"}, "fold": data["product"], "schema_version": 0}

    def from_second(data):
        assert "fold" in data
        return {**{k: v for k, v in data.items() if k != "kind"}, "per": data["kind"], "schema_version": 1}

    monkeypatch.setattr(params_module, "MIGRATIONS", {-1: from_first, 0: from_second, **params_module.MIGRATIONS})
    assert InitParams.parse(json.dumps(old)) == fitted
    old["schema_version"] = -2
    with pytest.raises(ParamsError, match=r"schema_version -2; this attnlens reads \[-1, 0, 1, 2, 3, 4\]"):
        InitParams.parse(json.dumps(old))


# The transfer rule.


def test_the_same_network_gets_its_own_requests_head_by_head(fitted):
    requests = fitted.for_model(vit())
    assert [request.layer for request in requests] == [0, 1, 2]
    for layer, request in enumerate(requests):
        np.testing.assert_array_equal(request.qk, asked(fitted, "qk", "each", layer))
        np.testing.assert_array_equal(request.ov, asked(fitted, "ov", "all", layer)[0])
        np.testing.assert_array_equal(request.ov_heads, asked(fitted, "ov", "each", layer))


@pytest.mark.parametrize("shape", [{"embed_dim": 44, "num_heads": 4}, {"embed_dim": 35, "num_heads": 5}])
def test_another_head_count_gets_the_layers_mean_for_every_head(fitted, shape):
    for layer, request in enumerate(fitted.for_model(vit(**shape))):
        mean = asked(fitted, "qk", "each", layer).mean(0)
        np.testing.assert_allclose(request.qk, np.tile(mean, (shape["num_heads"], 1)))
        np.testing.assert_array_equal(request.ov, asked(fitted, "ov", "all", layer)[0])


def test_another_width_or_head_dim_changes_no_request(fitted):
    for here, wide in zip(fitted.for_model(vit()), fitted.for_model(vit(embed_dim=87)), strict=True):
        np.testing.assert_array_equal(here.qk, wide.qk)
        np.testing.assert_array_equal(here.ov, wide.ov)


def at(pooled, t):
    return np.exp(np.polyval(pooled.log_alpha_trend.coefficients[::-1], t)), pooled.beta_trend(t)


@pytest.mark.parametrize("per", ["head", "layer"])
def test_another_depth_gets_the_depth_trend(fitted, per):
    params = under(fitted, per)
    trend = {(p.circuit, p.head): p for p in params.pooled}
    requests = params.for_model(vit(depth=7))
    for layer, request in enumerate(requests):
        t = layer / 6
        np.testing.assert_allclose(request.qk, np.tile(at(trend["qk", "each"], t), (3, 1)))
        np.testing.assert_allclose(request.ov, at(trend["ov", "all"], t))


def test_the_trend_is_the_least_squares_parabola_of_relative_depth(fitted):
    entries = fitted.select("qk", "each")
    expected = np.polyfit([e.depth for e in entries], [e.request_beta for e in entries], 2)[::-1]
    trend = next(p for p in fitted.pooled if p.circuit == "qk").beta_trend
    np.testing.assert_allclose(trend.coefficients, expected, rtol=1e-6)
    residual = [e.request_beta - trend(e.depth) for e in entries]
    assert trend.residual_sd == pytest.approx(np.std(residual))


def test_the_trend_of_alpha_is_that_of_its_logarithm_and_never_asks_for_less_than_no_noise(fitted):
    entries = fitted.select("qk", "each")
    expected = np.polyfit([e.depth for e in entries], np.log([e.request_alpha for e in entries]), 2)[::-1]
    trend = next(p for p in fitted.pooled if p.circuit == "qk").log_alpha_trend
    np.testing.assert_allclose(trend.coefficients, expected, rtol=1e-6)
    falling = fitted.pooled[0].model_copy(update={"log_alpha_trend": Trend(coefficients=[0.0, -9.0], residual_sd=0.0)})
    params = fitted.model_copy(update={"pooled": [falling, *fitted.pooled[1:]]})
    alphas = [request.qk[0, 0] for request in params.for_model(vit(depth=4))]
    assert alphas == pytest.approx(np.exp([0.0, -3.0, -6.0, -9.0]))


def test_a_circuit_without_noise_has_a_trend_that_asks_for_none():
    model = small_vit()
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.qkv.weight)
    requests = attnlens.fit_params(model).for_model(vit(depth=5))
    assert max(request.qk[:, 0].max() for request in requests) < 1e-300


def test_per_layer_draws_every_head_with_the_layers_mean(fitted):
    for layer, request in enumerate(under(fitted, "layer").for_model(vit())):
        np.testing.assert_allclose(request.qk, np.tile(asked(fitted, "qk", "each", layer).mean(0), (3, 1)))


def test_per_model_draws_every_layer_with_the_pooled_mean(fitted):
    summary = {(p.circuit, p.head): (p.alpha.mean, p.beta.mean) for p in fitted.pooled}
    for request in under(fitted, "model").for_model(vit(depth=5)):
        np.testing.assert_allclose(request.qk, np.tile(summary["qk", "each"], (3, 1)))
        np.testing.assert_allclose(request.ov, summary["ov", "all"])


def test_several_models_of_one_depth_give_layer_means_per_layer_and_the_trend_per_head(pooled):
    trend = next(p for p in pooled.pooled if p.circuit == "qk")
    by_layer, by_head = under(pooled, "layer").for_model(vit()), pooled.for_model(vit())
    for layer in range(3):
        both = np.concatenate([asked(pooled, "qk", "each", layer, source) for source in (0, 1)])
        np.testing.assert_allclose(by_layer[layer].qk, np.tile(both.mean(0), (3, 1)))
        t = relative_depth(layer, 3)
        np.testing.assert_allclose(by_head[layer].qk, np.tile(at(trend, t), (3, 1)))


def test_a_network_of_one_layer_stands_in_the_middle():
    assert relative_depth(0, 1) == 0.5
    params = attnlens.fit_params(small_vit(depth=1))
    assert [len(p.log_alpha_trend.coefficients) for p in params.pooled] == [1, 1, 1]
    (request,) = params.for_model(vit(depth=1))
    np.testing.assert_array_equal(request.qk, asked(params, "qk", "each", 0))


def test_a_file_without_a_circuit_asks_nothing_of_it(fitted):
    only_qk = {"entries": fitted.select("qk", "each"), "pooled": [p for p in fitted.pooled if p.circuit == "qk"]}
    for request in fitted.model_copy(update=only_qk).for_model(vit(depth=5)):
        assert request.qk.shape == (3, 2)
        assert (request.ov, request.ov_heads) == (None, None)


def test_a_statistic_of_another_version_is_kept_and_written_back():
    data = json.loads(attnlens.fit_params().to_json())
    data["entries"][0]["statistic_of_tomorrow"] = 0.25
    assert json.loads(InitParams.parse(json.dumps(data)).to_json()) == data


def test_an_entry_without_a_statistic_of_today_is_read():
    data = json.loads(attnlens.fit_params().to_json())
    del data["entries"][0]["share_low_rank"]
    assert InitParams.parse(json.dumps(data)).entries[0].share_low_rank is None
