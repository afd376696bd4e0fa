"""fit_params: what it measures in live networks and real weights, and the commands over it."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_model

import attnlens
from attnlens.circuits import layer_ov, qk_circuit
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.fit.params import InitParams
from attnlens.inits import init_
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.statistics.inference import infer
from attnlens.statistics.inverse import realised, request
from attnlens.statistics.verdicts import corrected
from tests.test_inspect import SMALL, small_vit

DINOV2 = "vit_small_patch14_dinov2"


def vit(seed=0, **more):
    """Make a ViT as timm initialises it, small but for what is given."""
    torch.manual_seed(seed)
    return timm.create_model("vit_tiny_patch16_224", **{**SMALL, **more})


@pytest.fixture(scope="module")
def dinov2(dinov2_file):
    return attnlens.fit_params(DINOV2, checkpoint=dinov2_file)


# What is in the entries.


def test_entries_hold_the_fit_and_inference_of_every_circuit_in_both_folds():
    model = small_vit(init_values=0.1)
    params, found = attnlens.fit_params(model), attnlens.inspect(model)
    for fold in ("raw", "effective"):
        for layer in range(3):
            for circuit, head, product in (
                ("qk", "each", qk_circuit(found.heads(layer), fold)),
                ("ov", "all", layer_ov(found.heads(layer), fold)),
            ):
                entries = params.select(circuit, head, layer, fold)
                fit, inference = fit_diagonal(product, None), infer(product)
                for name in ("alpha", "beta"):
                    expected = np.ravel(getattr(fit, name))
                    np.testing.assert_allclose([getattr(entry, name) for entry in entries], expected, rtol=1e-12)
                intervals = ("alpha_low", "alpha_high", "beta_stderr", "beta_low", "beta_high")
                for name in (*intervals, "null_sd", "share_low_rank"):
                    expected = np.ravel(getattr(inference, name))
                    np.testing.assert_allclose([getattr(entry, name) for entry in entries], expected, rtol=1e-12)
                alone = [entry.p_value_alone for entry in entries]
                np.testing.assert_allclose(alone, np.ravel(inference.p_value), rtol=1e-12)
    assert {entry.depth for entry in params.entries} == {0.0, 0.5, 1.0}


def test_p_values_are_corrected_over_all_circuits_of_a_model_and_fold():
    params = attnlens.fit_params(small_vit(), small_vit(1), fold="raw")
    for source in (0, 1):
        entries = [entry for entry in params.entries if entry.source == source]
        assert len(entries) == 3 * (3 + 3 + 1)
        expected = corrected(np.array([entry.p_value_alone for entry in entries]))
        np.testing.assert_allclose([entry.p_value for entry in entries], expected)


def test_requests_realise_the_fit_or_are_marked_as_the_nearest():
    model = small_vit()
    with torch.no_grad():  # q and k alike: W_Q W_K^T of head 0 is a projection, beyond what a noisy draw realises
        qkv = model.blocks[0].attn.qkv.weight
        basis = torch.linalg.qr(torch.randn(39, 13))[0].T
        qkv[:13] = basis
        qkv[39:52] = basis
    entries = attnlens.fit_params(model, fold="raw").entries
    for entry in entries:
        found = realised(entry.request_alpha, entry.request_beta, entry.head_dim, entry.embed_dim)
        if entry.reachable:
            assert found == pytest.approx((entry.alpha, entry.beta), rel=1e-9)
    (nearest,) = [entry for entry in entries if not entry.reachable]
    assert (nearest.layer, nearest.circuit, nearest.head) == (0, "qk", 0)
    found = realised(nearest.request_alpha, nearest.request_beta, 13, 39)
    assert found.beta == pytest.approx(nearest.beta)
    assert found.beta / math.hypot(*found) == pytest.approx(0.99 * math.sqrt(13 / 39))


def test_a_zero_product_has_no_shares_and_no_identity():
    model = small_vit()
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.zero_()
    params = attnlens.fit_params(model)
    (entry,) = params.select("ov", "all", 1)
    assert (entry.alpha, entry.beta, entry.request_alpha, entry.request_beta) == (0, 0, 0, 0)
    assert (entry.share_identity, entry.offdiagonal_kurtosis, entry.verdict) == (None, None, "none")
    assert InitParams.parse(params.to_json()) == params


def test_layers_that_are_not_fitted_and_what_is_left_out_are_said():
    torch.manual_seed(0)
    (source,) = attnlens.fit_params(timm.create_model("xcit_nano_12_p16_224", depth=1, cls_attn_layers=1)).sources
    assert source.not_read == ["blocks.0.attn is channel attention: its product never acts between tokens"]
    assert source.left_out["only the class token is a query"] == [1]
    without = timm.create_model("xcit_nano_12_p16_224", depth=1, cls_attn_layers=0)
    found = attnlens.fit_params(without)  # its depthwise filters are left
    assert (found.entries, len(found.filters)) == ([], 2)
    without.blocks[0].local_mp = torch.nn.Identity()
    with pytest.raises(UnsupportedAttentionError, match=r"blocks\.0\.attn is channel attention: its product never"):
        attnlens.fit_params(without)


def test_a_checkpoint_goes_with_one_model():
    with pytest.raises(UsageError, match="a checkpoint belongs to one model"):
        attnlens.fit_params("vit_tiny_patch16_224", "vit_small_patch16_224", checkpoint="a.safetensors")


def test_pooled_models_show_the_spread_between_them():
    first, second = small_vit(), small_vit(1)
    with torch.no_grad():
        for block in second.blocks:
            block.attn.qkv.weight[:78] *= math.sqrt(3)  # q and k: the QK product is three times as large
    params = attnlens.fit_params(first, second, fold="raw")
    pooled = next(p for p in params.pooled if p.circuit == "qk")
    alone = [np.mean([e.request_alpha for e in params.select("qk", "each") if e.source == source]) for source in (0, 1)]
    assert alone[1] == pytest.approx(3 * alone[0], rel=0.2)
    assert pooled.alpha.n == 18
    assert pooled.alpha.mean == pytest.approx(np.mean(alone))
    assert pooled.alpha.between_model_sd == pytest.approx(np.std(alone, ddof=1))
    one = next(p for p in attnlens.fit_params(first).pooled if p.circuit == "qk")
    assert one.alpha.between_model_sd is None


def test_layer_summaries_are_means_over_heads():
    params = attnlens.fit_params(small_vit())
    for summary in params.layers:
        betas = [e.beta for e in params.select(summary.circuit, summary.head, summary.layer)]
        assert (summary.beta_mean, summary.n) == (pytest.approx(np.mean(betas)), len(betas))
        assert summary.beta_sd == pytest.approx(np.std(betas, ddof=1) if len(betas) > 1 else 0.0)


# Networks whose parameters are known.


@pytest.mark.parametrize("wanted", [(0.718, 0.395), (0.5, 0.15)])
def test_a_network_initialised_with_a_request_has_the_realised_parameters_in_its_intervals(wanted):
    model = vit(embed_dim=96, depth=12, num_heads=3)
    asked = request(*wanted, 32, 96)
    init_(model, "mimetic", seed=0, alpha_qk=asked.alpha, beta_qk=asked.beta, alpha_ov=0.4, beta_ov=-0.4)
    params = attnlens.fit_params(model, fold="raw")
    heads, sums = params.select("qk", "each"), params.select("ov", "all")
    assert len(heads) == 36
    for entries, truth, least in ((heads, wanted, 31), (sums, (0.4, -0.4), 9)):  # binomial(n, 0.95): fewer is under 2%
        assert sum(e.alpha_low < truth[0] < e.alpha_high for e in entries) >= least
        assert sum(e.beta_low < truth[1] < e.beta_high for e in entries) >= least
    assert {entry.verdict for entry in heads} == {"identity"}
    assert {entry.verdict for entry in sums} == {"negative identity"}
    means = np.mean([[e.request_alpha, e.request_beta] for e in heads], axis=0)
    np.testing.assert_allclose(means, asked, rtol=0.02)


@pytest.mark.parametrize("per", ["head", "layer", "model"])
def test_a_network_initialised_from_a_fit_has_that_fit(per):
    teacher = vit(embed_dim=96, depth=3, num_heads=3)
    init_(teacher, "mimetic", seed=1)
    params = attnlens.fit_params(teacher, per=per, fold="raw")
    student = vit(seed=2, embed_dim=96, depth=3, num_heads=3)
    init_(student, "fitted", seed=3, params=params)
    again = attnlens.fit_params(student, fold="raw")
    for layer in range(3):
        was, now = (
            np.array([(e.alpha, e.beta) for e in found.select("qk", "each", layer)]) for found in (params, again)
        )
        np.testing.assert_allclose(now, was, atol=0.03)
        (was,), (now,) = (found.select("ov", "all", layer) for found in (params, again))
        assert (now.alpha, now.beta) == pytest.approx((was.alpha, was.beta), abs=0.03)


def test_a_network_as_timm_initialises_it_has_nothing_but_noise():
    """20 networks would show a corrected p below 0.05 about once: docs/verdicts.md gives the measured rate."""
    torch.manual_seed(0)
    params = attnlens.fit_params(timm.create_model(DINOV2, pretrained=False, img_size=28))
    for fold in ("raw", "effective"):
        entries = [entry for entry in params.entries if entry.fold == fold]
        assert len(entries) == 12 * 13
        assert min(entry.p_value for entry in entries) > 0.05
        assert {entry.verdict for entry in entries} == {"none"}


def test_fresh_networks_pass_the_corrected_test_at_its_level():
    smallest = [
        min(entry.p_value for entry in attnlens.fit_params(vit(seed, embed_dim=48), fold="raw").entries)
        for seed in range(30)
    ]
    assert sum(p < 0.05 for p in smallest) <= 4  # binomial(30, 0.05): more with probability 1.6%


# Real weights.


@pytest.mark.weights
def test_the_summed_ov_of_dinov2_is_a_negative_identity_once_layer_scale_is_folded_in(dinov2):
    sums = dinov2.select("ov", "all")
    assert [entry.verdict for entry in sums] == ["negative identity"] * 11 + ["identity"]
    assert all(entry.beta_high < 0 for entry in sums[:11])
    raw = dinov2.select("ov", "all", fold="raw")
    assert sum(entry.verdict == "negative identity" for entry in raw) < 6


@pytest.mark.weights
def test_early_qk_of_dinov2_is_a_positive_identity(dinov2):
    for layer in (1, 2):
        words = [entry.verdict for entry in dinov2.select("qk", "each", layer)]
        assert words.count("identity") >= 4
        assert "negative identity" not in words
    assert all(entry.beta > 0 for layer in range(3) for entry in dinov2.select("qk", "each", layer))


@pytest.mark.weights
def test_dinov2_has_none_exactly_where_the_null_is_not_rejected(dinov2):
    assert {entry.verdict for entry in dinov2.entries} == {
        "identity",
        "negative identity",
        "identity + low rank",
        "negative identity + low rank",
        "mixed diagonal",
        "none",
        "not described by this model",
    }
    for entry in dinov2.entries:
        if entry.verdict == "none":
            assert entry.p_value >= 0.05
        elif "identity" in entry.verdict:
            assert entry.p_value < 0.05
            assert entry.beta_low > 0 or entry.beta_high < 0
            assert (entry.beta > 0) == (not entry.verdict.startswith("negative"))
    assert any(entry.verdict == "none" for entry in dinov2.select("qk", "each"))


# The commands.


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    paths = []
    for seed, name in enumerate(("first", "second")):
        path = tmp_path_factory.mktemp(name)
        (path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "model_args": SMALL}))
        save_model(small_vit(seed), path / "model.safetensors")
        paths.append(path)
    return paths


def test_fit_params_prints_tables_and_writes_file_and_figures(run, folders, tmp_path):
    code, out, err = run("fit-params", f"local-dir:{folders[0]}", "--output", "made.json")
    assert code == 0
    assert "effective products, M ~ α Z + β I" in out
    assert "Pooled requests" in out
    assert [line.split()[0] for line in out.splitlines()[4:7]] == ["0", "1", "2"]
    assert "wrote made.json" in err
    params = InitParams.load(tmp_path / "made.json")
    assert (params.per, params.fold, params.level) == ("head", "effective", 0.95)
    made = {path.name for path in (tmp_path / "figures" / folders[0].name).iterdir()}
    assert made == {"fit_profile.png", "realised_requested.png", "tails.png", ".attnlens.json"}


def test_the_file_says_where_every_number_came_from(run, folders, tmp_path):
    assert run("fit-params", *folders, "--figures", "f")[0] == 0
    data = json.loads((tmp_path / "params.json").read_text())
    assert (data["schema"], data["schema_version"]) == ("attnlens.params", 4)
    assert set(data["created"]) == {"versions", "time", "command"}
    assert data["created"]["command"].startswith("attnlens fit-params ")
    assert set(data["created"]["versions"]) >= {"python", "attnlens", "numpy", "scipy", "timm"}
    hashes = [source["provenance"]["sha256"] for source in data["sources"]]
    assert len(set(hashes)) == 2
    assert all(len(value) == 64 for value in hashes)
    assert all(pooled["alpha"]["between_model_sd"] is not None for pooled in data["pooled"])


def test_options_reach_the_file_and_json_on_stdout_is_the_file(run, folders, tmp_path):
    arguments = ("--per", "layer", "--fold", "raw", "--level", "0.9", "--json", "--figures", "f", "--format", "svg")
    code, out, _ = run("fit-params", folders[0], *arguments)
    assert code == 0
    assert out == (tmp_path / "params.json").read_text()
    params = InitParams.load(tmp_path / "params.json")
    assert (params.per, params.fold, params.level) == ("layer", "raw", 0.9)
    assert {entry.fold for entry in params.entries} == {"raw"}
    wide = attnlens.fit_params(folders[0], fold="raw").entries[0]
    assert wide.beta_low < params.entries[0].beta_low < params.entries[0].beta_high < wide.beta_high
    assert (tmp_path / "f" / "tails.svg").is_file()


def test_a_checkpoint_gives_the_weights_of_a_named_model(run, folders, tmp_path):
    file = folders[1] / "model.safetensors"
    assert run("fit-params", folders[0], "--checkpoint", file, "--figures", "f")[0] == 0
    expected = attnlens.fit_params(folders[1]).entries
    assert InitParams.load(tmp_path / "params.json").entries == expected


def test_without_a_model_the_shipped_one_is_fitted(run, tmp_path):
    code, out, _ = run("fit-params", "--figures", "f")
    assert code == 0
    assert out.startswith("embedded: effective products")
    assert len(InitParams.load(tmp_path / "params.json").sources) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("fit-params", "vit_bas_patch16_224"), 1, "did you mean vit_base_patch16_224"),
        (("fit-params", "a", "b", "--checkpoint", "c.safetensors"), 2, "a checkpoint belongs to one model"),
        (("compare", "vit_tiny_patch16_224"), 2, "compare needs at least two models"),
        (("compare", "a", "b", "-c", "c.safetensors"), 2, "1 checkpoint for 2 models"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(run, tmp_path, arguments, code, message):
    found, out, err = run(*arguments)
    assert (found, out) == (code, "")
    assert err.startswith("attnlens: ")
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_options_that_are_not_known_exit_2(run):
    assert run("fit-params", "--per", "neuron")[0] == 2
    assert run("fit-params", "--fold", "both")[0] == 2
    assert run("fit-params", "--level", "1.5")[0] == 2


def test_compare_prints_distances_and_draws_the_profiles(run, folders, tmp_path):
    code, out, _ = run("compare", *folders, "--figures", "f")
    assert code == 0
    assert "Distance between effective structures" in out
    assert [path.name for path in (tmp_path / "f").iterdir()] == ["comparison.png"]
    _, out, _ = run("compare", *folders, "--figures", "f", "--json", "--fold", "raw")
    data = json.loads(out)
    assert data["fold"] == "raw"
    assert [row["circuit"] for row in data["distances"]] == ["qk", "ov"]
    assert all(0 < row["identity_share"] < 2 for row in data["distances"])


def test_a_known_architecture_is_fitted_without_torch_or_timm(folders, tmp_path):
    attnlens.fit_params(folders[0])  # describes the architecture where it is not yet described
    code = (
        "import sys; sys.argv = ['attnlens', 'fit-params', *sys.argv[1:]]\n"
        "from attnlens.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'timm', 'pandas', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    options = ["--output", str(tmp_path / "p.json"), "--figures", str(tmp_path / "f")]
    command = [sys.executable, "-c", code, str(folders[0]), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import attnlens, sys; assert 'fit_params' in dir(attnlens)\n"
        "print(sorted({'numpy', 'scipy', 'pydantic', 'torch', 'timm', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_a_bare_file_is_fitted_by_its_names(tmp_path, run):
    save_model(small_vit(), tmp_path / "bare.safetensors")
    code, _, err = run("fit-params", "bare.safetensors", "--num-heads", "3", "-o", "params.json")
    assert code == 0, err
    assert InitParams.load(tmp_path / "params.json").sources[0].num_heads == [3, 3, 3]
    assert run("fit-params", "bare.safetensors").code == 2


@pytest.mark.parametrize("command", [["fit-params", "test_vit"], ["compare", "test_vit", "test_vit2"]])
def test_offline_goes_to_no_network(run, hub, command):
    code, _, err = run(*command, "--offline")
    assert code == 1
    assert "offline" in err
    assert hub.log == []
