"""Families of networks: stacks against modules trained plainly, frozen filters, arms that differ in architecture."""

import json
import math

import numpy as np
import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import cross_entropy

from attnlens.errors import ModelNotFoundError, UnsupportedAttentionError, UsageError
from attnlens.layouts.depthwise import filter_parameters
from attnlens.training.arms import WIRINGS, default_contrasts, initial_state, start_of
from attnlens.training.config import Config, Run
from attnlens.training.engine import Stack
from attnlens.training.networks import convmixer
from attnlens.training.networks.base import PLAIN, Wiring
from attnlens.training.networks.convmixer import ConvMixer
from attnlens.training.networks.convnext import ConvNeXt
from attnlens.training.networks.gpt import Gpt
from attnlens.training.source import Source
from attnlens.training.trainer import units_of
from tests.conftest import ROOT
from tests.training_setup import SHAPE, compare, config, small, write_source

CPU = torch.device("cpu")
CONV = ConvMixer(image_size=8, patch_size=2, channels=1, classes=10, dim=7, depth=2, kernel_size=3)
NEXT = ConvNeXt(image_size=16, patch_size=1, channels=1, classes=10, entry="test_convnext")
GPT = Gpt(context=5, embed_dim=12, depth=2, num_heads=3)
CASES = [
    pytest.param(CONV, PLAIN, id="convmixer"),
    pytest.param(NEXT, PLAIN, id="convnext"),
    pytest.param(GPT, PLAIN, id="gpt"),
    pytest.param(GPT, Wiring("shaped", skips=False, norms=False), id="gpt-shaped-skipless"),
    pytest.param(SHAPE, Wiring("e-spa", skips=False, norms=False), id="vit-e-spa-skipless"),
    pytest.param(SHAPE, Wiring(skips=True, norms=False), id="vit-normless"),
]


@pytest.fixture
def _double():
    """Compute in float64, where two ways to the same number differ by rounding alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def _small_convmixer(monkeypatch):
    sizes = {"dim": 6, "depth": 2, "kernel_size": 3, "activation": "relu"}
    monkeypatch.setattr(convmixer, "PRESETS", {**convmixer.PRESETS, "convmixer-test": sizes})


def networks_of(shape, wiring, count):
    """Build networks whose every weight, biases and gains included, is moved at random."""
    found = []
    for seed in range(count):
        network = shape.build(seed, wiring).to(torch.get_default_dtype())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in network.parameters():
                if tensor.requires_grad:
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        found.append(network)
    return found


def batches(shape, sets, steps, items):
    """Return random inputs and targets, ``[set, step, item, ...]``."""
    drawn = shape.example(sets * steps * items, torch.Generator().manual_seed(9))
    return [part.unflatten(0, (sets, steps, items)) for part in drawn]


def read(shape, inputs):
    """Prepare inputs as a reader of the documentation would."""
    return inputs.long() if isinstance(shape, Gpt) else (inputs.double() / 255 - 0.3) / 0.4


def plainly(network, settings, inputs, targets, lr):
    """Train one module with timm's optimizer and schedule and torch's own clipping; its gains do not decay."""
    recipe, steps = settings.recipe, len(inputs)
    vectors = [p for n, p in network.named_parameters() if p.ndim <= 1 or n.endswith((".a", ".b", ".c"))]
    matrices = [p for p in network.parameters() if p.requires_grad and not any(p is v for v in vectors)]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = create_optimizer_v2(groups, "adamw", lr=lr)
    warmup = {"warmup_t": round(recipe.warmup * steps), "warmup_lr_init": recipe.min_lr}
    schedule = CosineLRScheduler(optimizer, t_initial=steps, lr_min=recipe.min_lr, t_in_epochs=False, **warmup)
    network.train()
    losses = []
    for step, (batch, answer) in enumerate(zip(inputs, targets, strict=True)):
        logits = network(read(settings.network, batch))
        loss = cross_entropy(logits.flatten(0, -2), answer.flatten().long())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step_update(step + 1)
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize(("shape", "wiring"), CASES)
def test_a_stack_trains_and_evaluates_like_modules_trained_plainly(shape, wiring, models):
    """Losses, every weight, every running statistic, and the evaluation after eight steps."""
    settings = config(network=shape, recipe={"clip_norm": 0.7, "weight_decay": 0.3, "warmup": 0.2})
    networks, steps, rates = networks_of(shape, wiring, models), 8, [1e-3, 3e-3, 2e-3][:models]
    inputs, targets = batches(shape, 2, steps, 6)
    where = torch.tensor([0, 1, 0])[:models]
    stack = Stack(settings, models, CPU, wiring=wiring)
    stack.load([network.state_dict() for network in networks], rates, steps)
    losses = []
    for step in range(steps):
        stack.step(inputs[:, step], targets[:, step], where)
        losses.append(stack.take_losses(1))
    held, answers = inputs[1, 0], targets[1, 0]
    before = [stack.state(number) for number in range(models)]
    accuracies, test_losses, _ = stack.evaluate(held, answers)
    for number, network in enumerate(networks):
        data = where[number]
        expected = plainly(network, settings, inputs[data], targets[data], rates[number])
        np.testing.assert_allclose([row[number] for row in losses], expected, rtol=1e-8)
        ours, theirs = stack.state(number), network.state_dict()
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name].shape == value.shape
            torch.testing.assert_close(ours[name], value, rtol=1e-7, atol=1e-8, msg=name)
            assert torch.equal(ours[name], before[number][name]), f"evaluation moved {name}"
        with torch.no_grad():
            logits = network.eval()(read(shape, held)).flatten(0, -2)
        flat = answers.flatten().long()
        assert test_losses[number] == pytest.approx(cross_entropy(logits, flat).item(), rel=1e-8)
        assert accuracies[number] == pytest.approx((logits.argmax(-1) == flat).double().mean().item())


def test_running_statistics_are_each_models_own():
    """Two models on different images end with different statistics, neither the fresh ones."""
    stack = Stack(config(network=CONV), 2, CPU)
    state = CONV.build(0).state_dict()
    stack.load([state, state], [1e-3] * 2, 2)
    inputs, targets = batches(CONV, 2, 1, 6)
    stack.step(inputs[:, 0], targets[:, 0], torch.tensor([0, 1]))
    first, second = stack.state(0), stack.state(1)
    for name in ("stem.2.running_mean", "blocks.1.3.running_var"):
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(first[name], state[name])
    assert first["stem.2.num_batches_tracked"] == 1


def test_frozen_filters_get_no_update_and_everything_else_does():
    settings = config(network=CONV, freeze_filters=True, recipe={"weight_decay": 0.3})
    network = CONV.build(0)
    frozen = filter_parameters(network)
    assert len(frozen) == CONV.depth
    stack = Stack(settings, 1, CPU)
    stack.load([network.state_dict()], [1e-2], 3)
    inputs, targets = batches(CONV, 1, 3, 6)
    for step in range(3):
        stack.step(inputs[:, step], targets[:, step], torch.zeros(1, dtype=torch.long))
    start, end = network.state_dict(), stack.state(0)
    same = {name for name in start if torch.equal(start[name], end[name])}
    assert same == set(frozen)


def test_arms_of_a_convmixer_differ_in_depthwise_filters_alone():
    source = Source.of("convmixer-test")
    default = initial_state("default", 3, CONV, source)
    network = CONV.build(3)
    allowed = {*filter_parameters(network), *(n.replace(".weight", ".bias") for n in filter_parameters(network))}
    norms = []
    for arm in ("conv-covariance", "norm-matched"):
        state = initial_state(arm, 3, CONV, source)
        changed = {name for name in default if not torch.equal(default[name], state[name])}
        assert changed
        assert changed <= allowed
        norms.append(torch.stack([state[name].norm() for name in filter_parameters(network)]))
    torch.testing.assert_close(*norms)


def test_rewired_arms_share_what_is_not_rewired():
    source = Source.of("gpt-tiny")
    default = initial_state("default", 2, GPT, source)
    state = initial_state("e-spa-no-skips-no-norms", 2, GPT, source)
    for name in ("embed.weight", "pos_embed", "head.weight"):
        assert torch.equal(default[name], state[name])
    assert not state["blocks.0.attn.qkv.weight"][:12].any()  # W_Q = 0
    again = initial_state("e-spa-no-skips-no-norms", 2, GPT, source)
    assert all(torch.equal(state[name], again[name]) for name in state)


def test_a_stack_holds_one_architecture_whatever_its_size():
    runs = [Run(arm, seed, 1e-3) for seed in range(3) for arm in ("default", "value-skipinit", "mimetic")]
    source = Source.of("gpt-tiny")
    for size in (1, 2, 4, 9):
        units = units_of(runs, size, lambda run: start_of(run.arm, source).wiring)
        assert sorted(run for unit in units for run in unit) == sorted(runs)
        assert max(map(len, units)) <= size
        for unit in units:
            assert len({start_of(run.arm, source).wiring for run in unit}) == 1
    assert [run.arm for unit in units_of(runs, 2, lambda run: run.arm == "value-skipinit")[:2] for run in unit] == [
        *("default", "mimetic"),
        *("value-skipinit", "value-skipinit"),
    ]


def images(**changes):
    return small(None, **{"patch_size": 2, "train_images": 80, "test_images": 30, **changes})


FROZEN = {"model": "convmixer-test", "arms": ("default", "conv-covariance", "norm-matched"), "freeze_filters": True}


def test_a_convmixer_comparison_resumes_bit_for_bit_and_says_that_filters_were_frozen(tmp_path):
    options = images(**FROZEN, epochs=2, stack=3)
    whole = compare(None, tmp_path / "once", options=options, save_weights=True)
    folder = tmp_path / "often"
    taken, step = [], Stack.step

    def counted(self, *args):
        taken.append(1)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stack, "step", counted)
        with pytest.raises(KeyboardInterrupt):
            compare(None, folder, options=options, save_weights=True, checkpoint_seconds=0.0)
    found = compare(None, folder, options=options, save_weights=True, resume=True)
    from safetensors.torch import load_file

    for path in (tmp_path / "once" / "weights").iterdir():
        mine, theirs = load_file(path), load_file(folder / "weights" / path.name)
        assert "stem.2.running_var" in mine
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert found.findings.finished == whole.findings.finished
    assert not (folder / "structure.png").exists()
    assert not (folder / "params.json").exists()
    report = (folder / "report.md").read_text()
    assert "depthwise filters frozen" in report.splitlines()[0]
    assert "norm-matched of=conv-covariance" in report
    assert "what the covariance adds to the scale" in report
    assert json.loads((folder / "config.json").read_text())["freeze_filters"] is True
    start, end = (
        initial_state("conv-covariance", 0, whole.findings.config.network, Source.of("convmixer-test")),
        load_file(folder / "weights" / "conv-covariance-0.safetensors"),
    )
    name = "blocks.0.0.fn.0.weight"
    assert torch.equal(start[name], end[name])


def test_configurations_of_the_first_comparisons_keep_their_hash():
    data = json.loads((ROOT / "benchmarks" / "results" / "digits_cpu" / "config.json").read_text())
    sha256 = data.pop("sha256")
    settings = Config.model_validate(data)
    assert settings.sha256() == sha256
    assert settings.model_copy(update={"freeze_filters": True}).sha256() != sha256


def test_sizes_come_from_timms_own_entries():
    assert ConvMixer.sizes_of("convmixer_768_32") == {
        "dim": 768,
        "depth": 32,
        "kernel_size": 7,
        "activation": "relu",
    }
    with pytest.raises(ModelNotFoundError, match="no ConvMixer is named 'convmixer-tny': choose from convmixer-tiny"):
        ConvMixer.sizes_of("convmixer-tny")


def test_a_convnext_is_timms_entry_at_another_patch_size_and_its_arms_differ_in_depthwise_filters():
    assert ConvNeXt.sizes_of("convnext_atto") == {"entry": "convnext_atto"}
    network = ConvNeXt(image_size=32, patch_size=2, channels=3, classes=5, entry="convnext_atto")
    network.check("photos")
    module = network.build(0)
    assert module.stem[0].stride == (2, 2)
    assert module.head.fc.out_features == 5
    filters = set(filter_parameters(module))
    assert len(filters) == 12
    assert all(module.get_parameter(name).shape[2:] == (7, 7) for name in filters)
    assert "depthwise filters 7 x 7, LayerNorm2d, patch 2 of 32 px" in network.describe()
    default, start = (
        initial_state(arm, 0, network, Source.of("convnext_atto")) for arm in ("default", "conv-covariance")
    )
    assert {name for name in default if not torch.equal(default[name], start[name])} == filters


def test_a_convnext_that_does_not_fit_is_refused():
    with pytest.raises(ModelNotFoundError, match="no ConvNeXt is named 'convnext_ato': choose from convnext_atto"):
        ConvNeXt.sizes_of("convnext_ato")
    with pytest.raises(UsageError, match="convnext_atto_ols has no patches"):
        ConvNeXt.sizes_of("convnext_atto_ols")
    sizes = {"image_size": 32, "channels": 3, "classes": 5, "entry": "convnext_atto"}
    with pytest.raises(UsageError, match=r"a grid of 4 x 4 of photos, .* halves it 3 times: .* multiple of 8"):
        ConvNeXt(patch_size=4, **{**sizes, "image_size": 16}).check("photos")
    with pytest.raises(UsageError, match="does not divide the images of photos"):
        ConvNeXt(patch_size=5, **sizes).check("photos")
    with pytest.raises(UsageError, match=r"a grid of 4 x 4 of photos, and convnext_atto halves it 4 times"):
        ConvNeXt(patch_size=2, **{**sizes, "image_size": 8}).check("photos")  # at patch 2 every stage halves


def test_the_plain_arms_of_a_vit_and_rewired_ones_train_side_by_side(tmp_path):
    source = write_source(tmp_path)
    arms = ("default", "e-spa-no-norms", "value-skipinit")
    options = small(source, arms=arms, epochs=1, train_images=80, test_images=20)
    separate = compare(source, tmp_path / "one", options=options)
    stacked = compare(source, tmp_path / "many", options=small(source, **{**options, "stack": 6}))
    assert separate.findings.complete
    for folder in ("one", "many"):
        starts = json.loads((tmp_path / folder / "config.json").read_text())["starts"]
        assert starts == {arm: f"as rewired, {WIRINGS[arm].describe()}" for arm in arms[1:]}
    for arm, curves in separate.findings.curves.items():
        for seed, curve in curves.items():
            np.testing.assert_allclose(stacked.findings.curves[arm][seed], curve, atol=0.051)  # a test image of twenty
    losses = [
        {
            line["run"]: line["train_loss"]
            for line in map(json.loads, (tmp_path / name / "results.jsonl").read_text().splitlines())
        }
        for name in ("one", "many")
    ]
    assert losses[0].keys() == losses[1].keys()
    assert all(math.isclose(losses[0][run], losses[1][run], abs_tol=1e-4) for run in losses[0])


def test_default_contrasts_of_drawn_networks_hold_each_arm_against_its_control():
    found = default_contrasts(["default", "conv-covariance", "norm-matched"], Source.of("convmixer-tiny"))
    assert found == [("conv-covariance", "default"), ("norm-matched", "default"), ("conv-covariance", "norm-matched")]
    arms = Gpt.default_arms
    found = default_contrasts(arms, Source.of("gpt-tiny"))
    assert found[-2:] == [("mimetic", "norm-matched"), ("mimetic", "mimetic-positive")]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"arms": ("default", "fitted")}, UsageError, "arms names fitted, and convmixer-test has no weights"),
        ({"arms": ("pretrained",)}, UsageError, "convmixer-test has no pre-trained weights: leave it out"),
        ({"arms": ("mimetic",)}, UnsupportedAttentionError, "attention"),
        ({"arms": ("value-skipinit",)}, UnsupportedAttentionError, "ConvMixer cannot be rewired"),
        ({"model": "gpt-tiny"}, UsageError, "model gpt-tiny reads bytes: name a text, as in dataset='text:FILE'"),
        ({"model": "gpt-tiy"}, ModelNotFoundError, "no language model is named 'gpt-tiy': choose from gpt-tiny"),
        ({"context": 8}, UsageError, "context is about text, and digits holds images"),
        ({"arms": ("spectrum",)}, UsageError, "arms names spectrum, which is no arm: choose from default, "),
        ({"arms": ("fitted-gains",)}, UsageError, "arms names fitted-gains, which is no arm"),
        ({"arms": ("permuted",)}, UsageError, "arms names permuted, and convmixer-test has no pre-trained weights"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as raised:
        compare(None, tmp_path / "out", options=images(**{"model": "convmixer-test", "arms": ("default",), **changes}))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_filters_of_a_network_without_any_cannot_be_frozen(tmp_path):
    source = write_source(tmp_path)
    with pytest.raises(UsageError, match="freeze_filters=True: the network has no depthwise filters"):
        compare(source, tmp_path / "out", options=small(source, freeze_filters=True))


def test_the_gains_of_value_skipinit_start_at_one_and_zero(tmp_path):
    state = initial_state("value-skipinit", 0, SHAPE, Source.of(str(write_source(tmp_path))))
    for layer in range(SHAPE.depth):
        assert torch.equal(state[f"blocks.{layer}.attn.a"], torch.ones(2, 1, 1))
        assert torch.equal(state[f"blocks.{layer}.attn.b"], torch.zeros(2, 1, 1))
