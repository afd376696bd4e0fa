"""The ladder: what each rung's start keeps of the source, which contrasts are declared, and what is told of them."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from attnlens.circuits import layer_ov, qk_circuit
from attnlens.errors import CheckpointError, UsageError
from attnlens.layouts import read_heads
from attnlens.models.architecture import describe_module
from attnlens.statistics.diagonal import fit_diagonal
from attnlens.training.arms import default_contrasts, initial_state, named_arms
from attnlens.training.data.sources import load_dataset
from attnlens.training.ladder import ATTENTION, ladder_of, steps
from attnlens.training.networks.vit import ViT
from attnlens.training.report import render_report
from attnlens.training.results import summarise
from attnlens.training.seen import Seen, meet, read, written
from attnlens.training.source import Source
from attnlens.training.statistics import contrasts
from attnlens.training.waterfall import draw_waterfall
from tests.training_setup import compare, small, write_source

HEADS, HEAD_DIM, DEPTH = 5, 20, 3
NETWORK = ViT(
    image_size=14,
    patch_size=2,
    channels=1,
    classes=11,
    embed_dim=HEADS * HEAD_DIM,
    depth=DEPTH,
    num_heads=HEADS,
    mlp_ratio=2.0,
)
ARMS = tuple(rung.arm for rung in ATTENTION)
SEED = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a source with a diagonal, uneven channels and biases, of other images and classes."""
    shape = NETWORK.model_copy(update={"channels": 3, "classes": 7})
    model = shape.build(5)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            q, k, _ = block.attn.qkv.weight.view(3, HEADS, HEAD_DIM, -1)
            k += 0.3 * (number + 1) * q
            block.norm1.weight.copy_(0.5 + torch.rand(shape.embed_dim, generator=generator))
            block.attn.qkv.bias.normal_(generator=generator)
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path, shape.exported())
    return Source.of(str(path))


@pytest.fixture(scope="module")
def states(source):
    return {arm: initial_state(arm, SEED, NETWORK, source) for arm in ARMS}


def products(state):
    """Return every layer's QK ``[head, d, d]`` and OV ``[d, d]`` of a drawn state, dense and effective."""
    arrays = {name: value.numpy() for name, value in state.items()}
    specs = describe_module(NETWORK.build(0)).indexed()
    read = [read_heads(spec, arrays, layer) for layer, spec in specs]
    return [(qk_circuit(one, "effective").dense(), layer_ov(one, "effective").dense()) for one in read]


@pytest.fixture(scope="module")
def theirs(source):
    found = [source.opened.heads(layer) for layer in range(DEPTH)]
    return [(qk_circuit(one, "effective").dense(), layer_ov(one, "effective").dense()) for one in found]


def both(state, theirs):
    for mine, wanted in zip(products(state), theirs, strict=True):
        yield from zip(mine, wanted, strict=True)


def test_scale_keeps_every_norm_and_no_other_singular_value(states, theirs):
    for mine, wanted in both(states["scale"], theirs):
        norms = [np.linalg.norm(one, axis=(-2, -1)) for one in (mine, wanted)]
        np.testing.assert_allclose(*norms, rtol=1e-5)
        rank = HEAD_DIM if mine.ndim == 3 else HEADS * HEAD_DIM
        values = np.linalg.svd(mine, compute_uv=False)[..., :rank]
        np.testing.assert_allclose(values, np.broadcast_to(values.mean(-1, keepdims=True), values.shape), rtol=1e-4)


def test_spectrum_keeps_all_singular_values_of_every_head_and_layer(states, theirs):
    for mine, wanted in both(states["spectrum"], theirs):
        values = [np.linalg.svd(one, compute_uv=False) for one in (mine, wanted)]
        np.testing.assert_allclose(*values, atol=2e-6)
        assert not np.allclose(mine, wanted, atol=1e-2)


@pytest.mark.parametrize("arm", ["fitted", "fitted-gains"])
def test_fitted_rungs_keep_alpha_and_beta_within_what_draws_of_this_size_have(states, theirs, arm):
    def fits(product):
        d = product.shape[-1]
        beta = np.trace(product, axis1=-2, axis2=-1) / d
        alpha = np.sqrt(((product - beta[..., None, None] * np.eye(d)) ** 2).sum((-2, -1)) / d)
        return np.atleast_1d(alpha), np.atleast_1d(beta)

    for mine, wanted in both(states[arm], theirs):
        (alpha, beta), (alpha_wanted, beta_wanted) = fits(mine), fits(wanted)
        d = mine.shape[-1]
        np.testing.assert_allclose(alpha, alpha_wanted, rtol=0.15)
        assert (np.abs(beta - beta_wanted) < 6 * alpha_wanted / d).all()


def test_fitted_gains_keeps_the_gains_of_every_channel_and_alpha_of_the_balanced_products(states, source):
    arrays = {name: value.numpy() for name, value in states["fitted-gains"].items()}
    for layer, spec in describe_module(NETWORK.build(0)).indexed():
        mine, theirs = read_heads(spec, arrays, layer), source.opened.heads(layer)
        for circuit in (qk_circuit, layer_ov):
            found, wanted = (circuit(one, "balanced") for one in (mine, theirs))
            for side in ("rows", "cols"):
                logs = [np.log(getattr(one.gains, side)) for one in (found, wanted)]
                np.testing.assert_allclose(*logs, rtol=2**-10, atol=1e-4)  # the parameters hold them in float16
            fits = [fit_diagonal(product, None) for product in (found, wanted)]
            np.testing.assert_allclose(fits[0].alpha, fits[1].alpha, rtol=1e-4)
            limit = 6 * np.max(fits[1].alpha) / NETWORK.embed_dim
            assert np.abs(np.asarray(fits[0].beta) - fits[1].beta).max() < limit


def test_permuted_keeps_every_product_up_to_one_permutation_a_layer_on_both_sides(states, theirs):
    orders = []
    for (qk, ov), (qk_wanted, ov_wanted) in zip(products(states["permuted"]), theirs, strict=True):
        found, wanted = (np.linalg.norm(one[0], axis=1) for one in (qk, qk_wanted))
        order = np.abs(found[:, None] - wanted).argmin(1)
        assert sorted(order) == list(range(len(order)))
        np.testing.assert_allclose(qk, qk_wanted[:, order][:, :, order], atol=2e-6)
        np.testing.assert_allclose(ov, ov_wanted[order][:, order], atol=2e-6)
        orders.append(tuple(order))
    assert len(set(orders)) == DEPTH


def test_pretrained_attention_keeps_every_product_where_it_is(states, theirs):
    for mine, wanted in both(states["pretrained-attention"], theirs):
        np.testing.assert_allclose(mine, wanted, atol=2e-6)


def test_pretrained_keeps_every_weight_but_the_classifier(states, source):
    state = states["pretrained"]
    for name, value in state.items():
        if name.startswith("blocks.") or name in ("fc_norm.weight", "pos_embed"):
            np.testing.assert_allclose(value.numpy(), source.opened.checkpoint[name], atol=1e-6, err_msg=name)
    assert torch.equal(state["head.weight"], states["default"]["head.weight"])


@pytest.mark.parametrize("arm", ARMS[1:-1])
def test_rungs_differ_from_the_default_in_attention_alone_and_the_seed_determines_them(source, states, arm):
    default, state = states["default"], states[arm]
    changed = {name for name in default if not torch.equal(default[name], state[name])}
    assert changed
    assert all(".attn.qkv." in name or ".attn.proj." in name for name in changed)
    again, other = (initial_state(arm, seed, NETWORK, source) for seed in (SEED, SEED + 1))
    assert all(torch.equal(state[name], again[name]) for name in state)
    same = torch.equal(state["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert same == (arm == "pretrained-attention")


def test_the_word_ladder_stands_for_every_rung_and_declares_the_steps_and_each_against_the_default(source):
    assert named_arms(["ladder", "mimetic", "default"], ViT) == [*ARMS, "mimetic"]
    found = default_contrasts(ARMS, source)
    assert found == steps(ARMS)
    assert found[: len(ARMS) - 1] == list(zip(ARMS[1:], ARMS, strict=False))
    assert set(found[len(ARMS) - 1 :]) == {(arm, "default") for arm in ARMS[2:]}
    assert len(set(found)) == len(found) == 13


def test_steps_add_up_to_the_last_rung_and_what_is_left_goes_to_zero():
    generator = np.random.default_rng(0)
    values = {
        arm: {seed: 0.3 + 0.05 * n + generator.normal(0, 0.01) for seed in range(7)} for n, arm in enumerate(ARMS)
    }
    ladder = ladder_of(ViT.ladder, values, contrasts(values, steps(ARMS)))
    assert [step.arm for step in ladder] == list(ARMS[1:])
    total = np.mean(list(values["pretrained"].values())) - np.mean(list(values["default"].values()))
    assert sum(step.step.difference.mean for step in ladder) == pytest.approx(total)
    for step in ladder:
        assert step.from_start.difference.mean + step.left.mean == pytest.approx(total)
        paired = [values["pretrained"][seed] - values[step.arm][seed] for seed in range(7)]
        assert step.left.mean == pytest.approx(np.mean(paired))
    assert [step.arm for step in ladder if not step.nested] == ["fitted", "fitted-gains", "permuted"]
    without = {arm: scores for arm, scores in values.items() if arm != "scale"}
    assert not ladder_of(ViT.ladder, without, contrasts(without, steps([arm for arm in ARMS if arm != "scale"])))


@pytest.fixture(scope="module")
def climbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ladder")
    trained = compare(
        write_source(folder),
        folder / "source",
        options=small(
            write_source(folder), arms=("default",), seeds=1, classes="even", train_images=90, test_images=50
        ),
        save_weights=True,
    )
    path = trained.folder / "weights" / "default-0.safetensors"
    given = small(path, arms=("ladder",), classes="odd", train_images=100, test_images=50, epochs=1)
    return compare(path, folder / "out", options=given, save_weights=True), path, given


def test_report_summary_and_figure_say_what_each_step_is_worth(climbed):
    found, _, _ = climbed
    assert "## What each step of the ladder is worth" in found.report
    assert "| spectrum | all singular values" in found.report
    assert "| fitted (other) | " in found.report
    assert "fitted over spectrum, fitted-gains over fitted and permuted over fitted-gains keep other" in found.report
    assert "was trained on other classes of this data set, 0, 2, 4, 6, 8." in found.report.split("##")[0]
    assert "**" not in found.report.split("\n\n")[2]
    data = json.loads((found.folder / "summary.json").read_text())
    assert [step["arm"] for step in data["ladder"]] == list(ARMS[1:])
    assert data["ladder"][0]["step"]["difference"]["n"] == 2
    assert "waterfall.png" in data["files"]
    assert set(found.figures()) == {"curves", "structure", "waterfall"}
    assert found.figure("waterfall", style="paper", width="page").get_figwidth() == 6.75
    config = json.loads((found.folder / "config.json").read_text())
    assert config["classes"] == ["1", "3", "5", "7", "9"]
    assert config["starts"]["permuted"].startswith("keeps of default-0: attention with one random permutation")


def test_the_waterfall_names_every_rung_and_step_and_hatches_those_that_go_back(climbed):
    found, _, _ = climbed
    summary = found.findings
    ladder = ladder_of(summary.config.network.ladder, summary.finished, summary.contrasts)
    figure = draw_waterfall(summary, ladder)
    (axes,) = figure.axes
    assert [label.get_text().removesuffix("†") for label in axes.get_yticklabels()] == list(ARMS)
    for step, bar in zip(ladder, axes.patches, strict=True):
        assert bar.get_width() == pytest.approx(100 * step.step.difference.mean)
        assert bool(bar.get_hatch()) == (step.step.difference.mean <= 0)
    figure.canvas.draw()
    renderer, box = figure.canvas.get_renderer(), figure.bbox
    for text in (*figure.texts, *axes.texts, *axes.get_yticklabels(), axes.xaxis.label):
        extent = text.get_window_extent(renderer)
        assert extent.x0 >= 0
        assert extent.x1 <= box.x1, text.get_text()


def test_saved_weights_say_what_they_were_trained_on_with_what_their_start_had_seen(climbed):
    found, path, _ = climbed
    whole = load_dataset("digits").sha256()
    even, odd = (Seen(dataset="digits", sha256=whole, classes=tuple(names)) for names in ("02468", "13579"))

    def stated(arm):
        return read(safe_open(found.folder / "weights" / f"{arm}-0.safetensors", "pt").metadata()["trained_on"])

    assert read(safe_open(path, "pt").metadata()["trained_on"]) == (even,)
    assert stated("fitted") == stated("spectrum") == (odd,)
    assert stated("pretrained") == stated("permuted") == stated("pretrained-attention") == (even, odd)


DIGITS = Seen(dataset="digits", sha256="a", classes=tuple("0123456789"))


@pytest.mark.parametrize(
    ("seen", "shared", "words"),
    [
        ((DIGITS,), True, "was trained on the training images of this data set: an arm"),
        ((DIGITS.model_copy(update={"classes": tuple("0213")}),), True, "in the classes 0, 2: an arm"),
        ((DIGITS.model_copy(update={"classes": tuple("13579")}),), False, "other classes of this data set, 1, 3, 5"),
        ((DIGITS.model_copy(update={"sha256": "b", "classes": ("4", "x")}),), None, "classes of the same names (4)"),
        ((DIGITS.model_copy(update={"sha256": "b", "classes": ("x",)}),), "none", ""),
        (None, None, "is not stated"),
        ((), "none", ""),
    ],
)
def test_whether_a_source_has_seen_the_data_is_told_also_where_only_classes_overlap(seen, shared, words):
    here = DIGITS.model_copy(update={"classes": tuple("02468")})
    met = meet("vit", seen, here)
    if shared == "none":
        assert met is None
    else:
        assert met.shared is shared
        assert words in met.words


def test_what_a_file_states_is_read_back_and_anything_else_is_not_known():
    assert read(written((DIGITS,))) == (DIGITS,)
    assert read([DIGITS.model_dump()]) == (DIGITS,)
    for broken in ("", "{", '[{"dataset": 1}]', None, 3, "null"):
        assert read(broken) is None


def test_a_source_that_has_seen_the_data_is_named_before_anything_else(climbed, tmp_path):
    _, path, given = climbed
    options = {**given, "arms": ("default", "pretrained"), "seeds": 1, "classes": "even", "train_images": 90}
    report = compare(path, tmp_path / "out", options=options).report
    assert report.split("\n\n")[2].startswith("**Source: default-0 was trained on the training images of this data set")
    drawn = compare(path, tmp_path / "drawn", options={**options, "arms": ("default", "spectrum")}).report
    assert "trained on the training images" not in drawn


def test_the_shipped_model_states_its_data_and_digits_are_others():
    shipped = Source.of(None)
    (seen,) = shipped.seen
    assert (seen.dataset, len(seen.sha256), len(seen.classes)) == ("cifar10-jpeg75", 64, 10)
    assert meet(shipped.name, shipped.seen, Seen.of(load_dataset("digits"))) is None


def test_a_ladder_without_a_source_is_refused_by_its_first_rung(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 400)
    with pytest.raises(UsageError, match="arms ladder starts from a pre-trained source, and gpt-tiny has no weights"):
        compare(None, tmp_path / "out", options={"dataset": f"text:{text}", "arms": ("ladder",)})


def committed(folder, into):
    """Copy what is committed of a results folder: no checkpoints, no weights, no runs that have not ended."""
    into.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path.name != ".lock":
            (into / path.name).write_bytes(path.read_bytes())
    return into


def test_a_folder_that_was_committed_without_its_checkpoints_is_gone_on_with(climbed, tmp_path, monkeypatch):
    found, path, given = climbed
    wanted = {
        file.stem: json.loads(file.read_text())["records"][-1]["accuracy"] for file in (found.folder / "runs").iterdir()
    }
    stopped = compare(path, tmp_path / "first", options=given, time_budget=0.0, checkpoint_seconds=0)
    assert stopped.stopped
    folder = committed(found.folder, tmp_path / "second")
    lines = (folder / "results.jsonl").read_text().splitlines()
    kept = [line for line in lines if json.loads(line)["run"] in ("default-0", "scale-1")]
    (folder / "results.jsonl").write_text("\n".join(kept) + "\n")
    (folder / "summary.json").unlink()
    trained = []
    from attnlens.training import comparison

    original = comparison.run_units
    monkeypatch.setattr(
        comparison,
        "run_units",
        lambda session, units, workers: (trained.extend(units), original(session, units, workers)),
    )
    again = compare(path, folder, options=given, resume=True)
    assert {run.name for unit in trained for run in unit} == set(wanted) - {"default-0", "scale-1"}
    assert {f"{run['arm']}-{run['seed']}": run["accuracy"] for run in again.runs.records()} == wanted


def test_digits_cut_to_some_classes_are_those_classes_under_new_labels():
    whole, odd = load_dataset("digits"), load_dataset("digits").only("odd")
    assert odd.classes == tuple("13579")
    assert set(odd.train_labels) == set(range(5))
    old = whole.train_labels[np.isin(whole.train_labels, [1, 3, 5, 7, 9])]
    np.testing.assert_array_equal(2 * odd.train_labels + 1, old)
    np.testing.assert_array_equal(odd.train, whole.train[whole.train_labels % 2 == 1])
    np.testing.assert_array_equal(odd.test, whole.test[whole.test_labels % 2 == 1])
    assert odd.sha256() != whole.sha256()
    assert odd.whole() == odd.limited(50, 20).whole() == whole.whole() == whole.sha256()
    named = whole.only(["7", "3"])
    assert named.classes == ("3", "7")
    assert {tuple(whole.only("even").classes), odd.classes} == {tuple("02468"), tuple("13579")}
    for wrong in ("evn", ["3"], ["3", "x"], []):
        with pytest.raises(UsageError, match="classes"):
            whole.only(wrong)


def test_classes_of_a_text_are_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh " * 400)
    with pytest.raises(UsageError, match=r"classes even is about images, and text:text\.txt is text"):
        compare(None, tmp_path / "out", options={"dataset": f"text:{text}", "classes": "even"})


def test_the_report_of_a_ladder_is_made_again_from_its_records(climbed):
    found, _, _ = climbed
    records = found.findings
    assert render_report(records) == found.report
    assert summarise(records.config, {}).finished == {arm: {} for arm in ARMS}


@pytest.fixture(scope="module")
def filtered(tmp_path_factory):
    """Return a ConvMixer's source, trained on even digits, and the network of the odd ones."""
    folder = tmp_path_factory.mktemp("filters")
    given = {"dataset": "digits", "model": "convmixer-tiny", "patch_size": 2, "epochs": 1, "batch_size": 20}
    given |= {"train_images": 40, "test_images": 20, "device": "cpu", "seeds": 1, "arms": ("default",)}
    even = compare(None, folder / "even", options={**given, "classes": "even"}, save_weights=True)
    path = even.folder / "weights" / "default-0.safetensors"
    ladder = {**given, "classes": ["1", "3", "5"], "arms": ("ladder",), "checkpoint": path, "seeds": 2}
    return compare(path, folder / "odd", options=ladder), Source.of("convmixer-tiny", path)


def filters_of(state):
    return [value.numpy()[:, 0] for name, value in sorted(state.items()) if value.ndim == 4 and value.shape[2] == 5]


def test_rungs_of_filters_keep_norms_every_filter_or_all_weights(filtered):
    found, source = filtered
    network = found.findings.config.network
    assert network.classes == 3
    theirs = filters_of({name: torch.as_tensor(source.opened.checkpoint[name]) for name in network.build(0).state_dict()
                         if "num_batches" not in name})  # fmt: skip
    states = {arm: initial_state(arm, SEED, network, source) for arm in found.findings.config.arms}
    orders = []
    for layer, wanted in enumerate(theirs):
        mine = {arm: filters_of(state)[layer] for arm, state in states.items()}
        flat = wanted.reshape(len(wanted), -1)
        np.testing.assert_allclose(np.linalg.norm(mine["scale"], axis=(1, 2)), np.linalg.norm(flat, axis=1), rtol=1e-5)
        assert not np.allclose(mine["scale"], wanted, atol=1e-2)
        order = np.abs(mine["permuted"].reshape(len(flat), 1, -1) - flat).sum(2).argmin(1)
        assert sorted(order) == list(range(len(order)))
        np.testing.assert_array_equal(mine["permuted"], wanted[order])
        np.testing.assert_array_equal(mine["pretrained-filters"], wanted)
        np.testing.assert_array_equal(mine["pretrained"], wanted)
        orders.append(tuple(order))
    assert len(set(orders)) == len(theirs)
    changed = {
        name for name, value in states["default"].items() if not torch.equal(value, states["pretrained-filters"][name])
    }
    assert changed
    assert all(".0.fn.0." in name for name in changed)
    for name, value in states["pretrained"].items():
        if not name.startswith("head.") and value.is_floating_point():
            assert torch.equal(value, torch.as_tensor(source.opened.checkpoint[name])), name


def test_a_ladder_of_filters_says_what_its_rungs_keep(filtered):
    found, _ = filtered
    assert found.findings.config.arms == ["default", "scale", "fitted", "permuted", "pretrained-filters", "pretrained"]
    assert "| fitted (other) | the covariance of every layer's filters" in found.report
    assert "fitted over scale keeps other things of the source, not more" in found.report
    assert "| pre-trained source | model default-0 (convmixer-tiny), sha256 " in found.report
    assert "was trained on other classes of this data set, 0, 2, 4, 6, 8." in found.report.split("##")[0]


def test_weights_of_another_kind_of_network_are_refused(filtered, tmp_path):
    _, source = filtered
    path = write_source(tmp_path)
    with pytest.raises(
        UsageError, match="holds no weights of convmixer-tiny as `attnlens train-compare --save-weights`"
    ):
        Source.of("convmixer-tiny", path)
    assert source.sha256


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"depth": 3000}, "more than 20000 modules"),
        ({"context": 60_000}, "pos_embed is not there"),
        ({"context": "x"}, "states sizes that no Gpt has"),
        ({"embed_dim": 10**12, "num_heads": 1}, "states sizes that no Gpt has"),
    ],
)
def test_sizes_that_a_file_states_are_held_against_its_weights_before_they_are_built(sizes, said, tmp_path):
    stated = {"context": 128, "embed_dim": 96, "depth": 1, "num_heads": 3} | sizes
    about = {"network": "attnlens.gpt.GPT", "sizes": json.dumps(stated)}
    save_file({"a": torch.ones(2, 2)}, tmp_path / "weights.safetensors", about)
    with pytest.raises(CheckpointError, match=said):
        Source.of("gpt-tiny", tmp_path / "weights.safetensors")


def test_a_language_ladder_starts_from_saved_weights_and_says_that_they_have_seen_the_text(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + (i * i + 7 * i) % 23) for i in range(4000)))
    given = {"dataset": f"text:{text}", "model": "gpt-tiny", "epochs": 1, "batch_size": 10, "train_images": 10}
    given |= {"test_images": 5, "context": 13, "device": "cpu", "seeds": 1}
    first = compare(None, tmp_path / "a", options={**given, "arms": ("default",)}, save_weights=True)
    path = first.folder / "weights" / "default-0.safetensors"
    found = compare(None, tmp_path / "b", options={**given, "arms": ("ladder",), "checkpoint": path})
    assert tuple(found.findings.config.arms) == ARMS
    assert found.report.split("\n\n")[2].startswith("**Source: default-0 (gpt-tiny) was trained on this text")
    network, source = found.findings.config.network, Source.of("gpt-tiny", path)
    state, permuted = (initial_state(arm, 0, network, source) for arm in ("pretrained", "permuted"))
    theirs = source.teacher["teacher"].state_dict()
    assert all(torch.equal(state[name], theirs[name]) for name in state)
    assert not all(torch.equal(permuted[name], theirs[name]) for name in state)
