"""Recipe options: each changes training as timm's own does, on one model and on each of a stack."""

import json

import numpy as np
import pytest
import torch
from timm.data.mixup import FastCollateMixup, mixup_target
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from attnlens.errors import UsageError
from attnlens.training.config import check_config
from attnlens.training.data import mixing
from attnlens.training.data.images import Images, ResidentImages
from attnlens.training.engine import Stack
from attnlens.training.networks.convmixer import ConvMixer
from attnlens.training.networks.vit import ViT
from attnlens.training.optimizers import check_optimizer, known_optimizers
from tests.training_setup import SHAPE, compare, config, small, write_source

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(autouse=True)
def _double():
    """Compute in float64, where two ways to the same number differ by rounding alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def networks(count=2):
    found = []
    for seed in range(count):
        network = SHAPE.build(seed).double()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in network.parameters():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        found.append(network)
    return found


def batches():
    generator = torch.Generator().manual_seed(9)
    images = torch.randint(0, 256, (STEPS, 6, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return images, torch.randint(0, 10, (STEPS, 6), generator=generator)


def normalised(images):
    return (images.double() / 255 - 0.3) / 0.4


def schedule_of(optimizer, recipe):
    return CosineLRScheduler(
        optimizer, t_initial=STEPS, lr_min=recipe.min_lr, warmup_t=round(recipe.warmup * STEPS),
        warmup_lr_init=recipe.min_lr, t_in_epochs=False,
    )  # fmt: skip


def alone(network, settings, lr, loss_of, after=lambda _updates: None):
    """Train one of timm's modules with timm's optimizer and schedule; ``loss_of(step)`` is its loss."""
    recipe = settings.recipe
    optimizer = create_optimizer_v2(network, recipe.optimizer, lr=lr, weight_decay=recipe.weight_decay)
    schedule = schedule_of(optimizer, recipe)
    network.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(step).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step_update(step + 1)
        after(step + 1)


def stacked(settings, models, rates, targets=None):
    """Train the same networks as a stack on the same batches; return it."""
    images, labels = batches()
    targets = labels if targets is None else targets
    stack = Stack(settings, len(models), CPU)
    stack.load([model.state_dict() for model in models], rates, STEPS)
    for step in range(STEPS):
        stack.step(images[step][None], targets[step][None], torch.zeros(len(models), dtype=torch.long))
    return stack


def assert_same(stack, models, **tolerance):
    for number, model in enumerate(models):
        ours = stack.state(number)
        for name, value in model.state_dict().items():
            pairs = [ours[name], value]
            if name.endswith("attn.qkv.bias"):  # nothing depends on the keys' bias: its gradient is rounding noise, of
                pairs = [one.unflatten(0, (3, -1))[::2] for one in pairs]  # which some optimizers take the sign
            torch.testing.assert_close(*pairs, **(tolerance or {"rtol": 1e-8, "atol": 1e-9}))


def cross_entropy(network, **how):
    images, labels = batches()
    return lambda step: torch.nn.functional.cross_entropy(network(normalised(images[step])), labels[step], **how)


def changed(settings, plain=None):
    """Return how far training under some settings ends from training under the plain ones."""
    first, second = (stacked(one, networks(1), [1e-3]).state(0) for one in (settings, plain or config()))
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.mark.parametrize("name", ["sgd", "nadamw", "lamb", "muon", "adafactor", "adan"])
def test_every_model_of_a_stack_is_trained_as_timms_optimizer_trains_it_alone(name):
    """Two models, one of which learns a hundred times as fast: nothing of one may reach the other."""
    settings = config(recipe={"optimizer": name, "weight_decay": 0.1, "clip_norm": 0.7})
    models, rates = networks(), [1e-4, 1e-2]
    stack = stacked(settings, models, rates)
    for model, lr in zip(models, rates, strict=True):
        before = model.head.weight.detach().clone()
        alone(model, settings, lr, cross_entropy(model))
        assert not torch.equal(before, model.head.weight)
    assert_same(stack, models, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", known_optimizers())
def test_from_the_same_gradients_every_optimizer_of_timm_makes_the_same_steps(name):
    """The gradients are the stack's own, so that no rounding of noise decides what a sign or a mask is."""
    settings = config(recipe={"optimizer": name, "weight_decay": 0.1, "warmup": 0.5})
    models, rates = networks(), [1e-4, 1e-2]
    stack, seen = Stack(settings, 2, CPU), []
    stack.load([model.state_dict() for model in models], rates, STEPS)
    step = stack.optimizer.step

    def noted():
        seen.append(stack.gradient.clone())
        step()

    stack.optimizer.step = noted
    images, labels = batches()
    for number in range(STEPS):
        stack.step(images[number][None], labels[number][None], torch.zeros(2, dtype=torch.long))

    for row, (model, lr) in enumerate(zip(models, rates, strict=True)):
        recipe = settings.recipe
        optimizer = create_optimizer_v2(model, name, lr=lr, weight_decay=recipe.weight_decay)
        schedule = schedule_of(optimizer, recipe)
        for number, gradients in enumerate(seen):
            start = 0
            for each in stack.trained:
                parameter = model.get_parameter(each)
                stop = start + parameter.numel()
                parameter.grad = gradients[row, start:stop].view(parameter.shape).clone()
                start = stop
            optimizer.step()
            schedule.step_update(number + 1)
    for number, model in enumerate(models):
        ours = stack.state(number)
        for each, value in model.state_dict().items():
            torch.testing.assert_close(ours[each], value, rtol=1e-10, atol=1e-12)


def test_optimizers_that_a_stack_cannot_train_with_are_refused_by_name():
    for name, reason in (
        ("fusedlamb", "needs apex"),
        ("bnbadamw8bit", "needs bitsandbytes"),
        ("adahessian", "needs second derivatives"),
        ("kron", "needs random numbers of its own"),
    ):
        with pytest.raises(UsageError, match=f"optimizer {name} {reason}"):
            check_optimizer(name)
    with pytest.raises(UsageError, match="optimizer adamww is none of timm's: choose from adabelief, "):
        check_optimizer("adamww")
    for name in known_optimizers():
        check_optimizer(name)


def test_label_smoothing_is_timms():
    from timm.loss import LabelSmoothingCrossEntropy

    settings = config(recipe={"label_smoothing": 0.2})
    models = networks()
    stack = stacked(settings, models, [1e-3, 2e-3])
    images, labels = batches()
    loss = LabelSmoothingCrossEntropy(0.2)
    for model, lr in zip(models, (1e-3, 2e-3), strict=True):
        alone(model, settings, lr, lambda step, model=model: loss(model(normalised(images[step])), labels[step]))
    assert_same(stack, models)
    assert changed(settings) > 1e-4


def test_the_average_that_is_measured_is_timms():
    settings = config(recipe={"ema": 0.6})
    models = networks()
    stack = stacked(settings, models, [1e-3, 2e-3])
    averages = []
    for model, lr in zip(models, (1e-3, 2e-3), strict=True):
        average = ModelEmaV3(model, decay=0.6)
        alone(
            model, settings, lr, cross_entropy(model),
            lambda updates, average=average, model=model: average.update(model, step=updates),
        )  # fmt: skip
        averages.append(average.module)
        assert not torch.allclose(average.module.head.weight, model.head.weight)
    assert_same(stack, averages)
    images, labels = batches()
    with torch.no_grad():
        expected = [
            (one.eval()(normalised(images[0])).argmax(1) == labels[0]).double().mean().item() for one in averages
        ]
        losses = [torch.nn.functional.cross_entropy(one(normalised(images[0])), labels[0]).item() for one in averages]
    scores = stack.evaluate(images[0], labels[0])
    assert scores.accuracy == pytest.approx(expected)
    assert scores.loss == pytest.approx(losses)


def test_warm_up_is_over_the_share_of_the_steps_that_is_named():
    settings = config(recipe={"warmup": 0.5})
    (model,) = networks(1)
    stack = stacked(settings, [model], [1e-3])
    alone(model, settings, 1e-3, cross_entropy(model))
    assert_same(stack, [model])
    assert changed(settings, config(recipe={"warmup": 0.0})) > 1e-4


def test_stochastic_depth_drops_what_timms_drops_at_timms_rates():
    """timm's DropPath modules say the rates; the draws are ours, and are put in their place."""
    rate, models = 0.5, networks()
    settings = config(recipe={"drop_path": rate})
    drawn = [mixing.draw_kept(SHAPE.drop_rates(rate), 3, step, 6) for step in range(STEPS)]
    labels = batches()[1]
    targets = torch.stack([mixing.packed(labels[step], drawn[step], 6).double() for step in range(STEPS)])
    stack = stacked(settings, models, [1e-3, 2e-3], targets)

    import timm

    expected = timm.create_model("vit_tiny_patch16_224", **SHAPE.model_args(), drop_path_rate=rate)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) or 0.0 for block in expected.blocks]
    assert rates == pytest.approx(SHAPE.drop_rates(rate))
    step_now = [0]

    class Drawn(torch.nn.Module):
        def __init__(self, branch, rate):
            super().__init__()
            self.branch, self.rate = branch, rate

        def forward(self, x):
            kept = torch.from_numpy(drawn[step_now[0]]["keep"][:, self.branch] > 0).double()
            return x * (kept / (1 - self.rate))[:, None, None]

    for model, lr in zip(models, (1e-3, 2e-3), strict=True):
        for layer, block in enumerate(model.blocks):
            block.drop_path1, block.drop_path2 = Drawn(2 * layer, rates[layer]), Drawn(2 * layer + 1, rates[layer])
        plain = cross_entropy(model)

        def loss_of(step, plain=plain):
            step_now[0] = step
            return plain(step)

        alone(model, settings, lr, loss_of)
    assert_same(stack, models, rtol=1e-6, atol=1e-7)
    assert changed(config()) == 0
    keep = mixing.draw_kept([0.0, 0.5], 0, 0, 4000)["keep"]
    assert (keep[:, :2] == 1).all()
    assert set(np.unique(keep[:, 2:])) == {0.0, 2.0}
    assert keep[:, 2:].mean() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_batches_and_their_loss_are_timms(monkeypatch, mixup, cutmix, smoothing):
    """timm's collation is handed our draws; pixels must agree to the bit, losses to rounding."""
    settings = config(recipe={"mixup": mixup, "cutmix": cutmix, "label_smoothing": smoothing})
    rng, batch, size = np.random.default_rng(0), 6, 8
    images = rng.integers(0, 256, (12 * batch, 3, size, size)).astype(np.uint8)
    labels = rng.integers(0, 10, 12 * batch)
    draws = mixing.draw_mixing(settings.recipe, 5, 2, 12, size)
    found = mixing.mixed(torch.from_numpy(images), draws, batch)
    targets = mixing.packed(torch.from_numpy(labels), draws, batch)
    own = mixing.unpacked(targets.view(12, batch, -1), settings.recipe)
    collate = FastCollateMixup(mixup or 1.0, cutmix or 1.0, label_smoothing=smoothing, num_classes=10)
    cut = draws["box"][1] > draws["box"][0]
    assert (cut.any(), (~cut).any()) == (cutmix > 0, mixup > 0)
    for step in range(12):
        share, box = float(draws["share"][step]), draws["box"][:, step]
        monkeypatch.setattr(collate, "_params_per_batch", lambda share=share, step=step: (share, bool(cut[step])))
        monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *_, box=box, share=share, **__: (box, share))
        part = slice(step * batch, (step + 1) * batch)
        expected, soft = collate([(image, int(label)) for image, label in zip(images[part], labels[part], strict=True)])
        assert torch.equal(found[part], expected)
        logits = torch.from_numpy(rng.normal(size=(batch, 10)))
        how = {"label_smoothing": smoothing, "reduction": "none"}
        mine = torch.nn.functional.cross_entropy(logits, own.labels[step], **how)
        other = torch.nn.functional.cross_entropy(logits, own.labels[step].flip(0), **how)
        loss = mine.lerp(other, 1 - own.share[step].double()).mean()
        torch.testing.assert_close(loss, SoftTargetCrossEntropy()(logits, soft.double()), rtol=1e-5, atol=1e-6)


def test_a_stack_trains_on_mixed_labels_as_timms_loss_does():
    settings, models = config(recipe={"mixup": 0.8, "label_smoothing": 0.1}), networks()
    images, labels = batches()
    draws = mixing.draw_mixing(settings.recipe, 1, 0, STEPS, 8)
    targets = mixing.packed(labels.flatten(), draws, 6).double().view(STEPS, 6, -1)
    stack = stacked(settings, models, [1e-3, 2e-3], targets)
    loss = SoftTargetCrossEntropy()
    for model, lr in zip(models, (1e-3, 2e-3), strict=True):

        def loss_of(step, model=model):
            share = float(np.float32(draws["share"][step]))
            return loss(model(normalised(images[step])), mixup_target(labels[step], 10, share, 0.1).double())

        alone(model, settings, lr, loss_of)
    assert_same(stack, models, rtol=1e-6, atol=1e-7)


def test_the_sides_of_cutmixs_box_and_the_shares_are_distributed_as_timms():
    recipe = config(recipe={"cutmix": 1.0}).recipe
    ours = mixing.draw_mixing(recipe, 0, 0, 4000, 32)["share"]
    collate = FastCollateMixup(0.0, 1.0)
    np.random.seed(0)  # noqa: NPY002  # timm draws from the global generator
    from timm.data.mixup import cutmix_bbox_and_lam

    theirs = [cutmix_bbox_and_lam((3, 32, 32), collate._params_per_batch()[0])[1] for _ in range(4000)]
    grid = np.linspace(0.05, 0.95, 10)
    assert np.quantile(ours, grid) == pytest.approx(np.quantile(theirs, grid), abs=0.04)


def images_of(count=24):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 1, 8, 8)).astype(np.uint8)
    return Images("x", pixels, np.arange(count) % 10, pixels, np.arange(count) % 10, tuple("0123456789"))


def test_what_is_drawn_is_a_function_of_seed_and_epoch_alone_and_in_the_hash():
    all_on = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.3}
    torch.set_default_dtype(torch.float32)
    data, plain = (ResidentImages(images_of(), config(recipe=recipe), CPU) for recipe in (all_on, {}))
    first, again, later, other = data.epoch(0, 0), data.epoch(0, 0), data.epoch(0, 1), data.epoch(1, 0)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    assert len({first.stream, later.stream, other.stream, plain.epoch(0, 0).stream}) == 4
    assert first.stream == again.stream
    assert plain.epoch(0, 0).targets.tolist() == first.targets[:, 0].long().tolist()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


EVERYTHING = {
    "warmup": 0.3, "optimizer": "lamb", "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "drop_path": 0.2,
    "ema": 0.5,
}  # fmt: skip


def test_every_option_stands_in_configuration_records_and_report_and_arms_stay_paired(source, tmp_path):
    torch.set_default_dtype(torch.float32)
    found = compare(None, tmp_path / "out", options=small(source, seeds=1, **EVERYTHING))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["recipe"]
    assert EVERYTHING.items() <= stored.items()
    (line, *_) = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert EVERYTHING.items() <= json.loads(line)["recipe"].items()
    assert "timm's lamb" in found.report
    assert "linear warm-up over 30% of the steps" in found.report
    assert (
        "label smoothing 0.1, Mixup with alpha 0.8, CutMix with alpha 1, stochastic depth up to 0.2, measured: the "
        "weights' moving average with decay 0.5"
    ) in found.report
    assert found.findings.streams == {0: 2}


@pytest.mark.parametrize("optimizer", ["adan", "muon", "adafactor"])
def test_a_resumed_run_ends_bit_for_bit_where_the_whole_one_does(source, tmp_path, monkeypatch, optimizer):
    torch.set_default_dtype(torch.float32)
    options = small(source, arms=("default",), seeds=1, **{**EVERYTHING, "optimizer": optimizer})
    whole = compare(None, tmp_path / "whole", options=options, save_weights=True)
    step, taken = Stack.step, []

    def counted(self, *args):
        taken.append(1)
        return step(self, *args)

    monkeypatch.setattr(Stack, "step", counted)
    monkeypatch.setattr("attnlens.training.stop.Control.stopping", lambda self: len(taken) >= 5 or bool(self.reason))
    compare(None, tmp_path / "cut", options=options, save_weights=True)
    assert len(taken) == 5
    monkeypatch.undo()
    compare(None, tmp_path / "cut", options=options, save_weights=True, resume=True)
    from safetensors.torch import load_file

    first, second = (load_file(tmp_path / name / "weights" / "default-0.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole.findings.finished == compare(None, tmp_path / "cut", options=options, resume=True).findings.finished


def test_configurations_without_the_new_options_keep_their_hash():
    dumped = json.loads(config().model_dump_json())
    new = set(EVERYTHING) - {"warmup"}
    assert not new & set(dumped["recipe"])
    assert "tune_epochs" not in dumped
    assert {"ema"} <= set(json.loads(config(recipe={"ema": 0.9}).model_dump_json())["recipe"])


def test_what_does_not_go_with_a_network_is_refused():
    mixer = ConvMixer(image_size=8, patch_size=4, channels=1, classes=10, dim=8, depth=2, kernel_size=3)
    with pytest.raises(UsageError, match="drop_path is for the plain ViT, and this is ConvMixer"):
        check_config(config(network=mixer, recipe={"drop_path": 0.1}))
    with pytest.raises(UsageError, match="tune_epochs=2 is about tune_lr: name rates to try, or leave it out"):
        check_config(config(tune_epochs=2))


def test_sizes_without_a_checkpoint_train_a_drawn_vit(tmp_path):
    torch.set_default_dtype(torch.float32)
    options = small(None, embed_dim=24, depth=2, num_heads=3, arms=None, seeds=1, epochs=1)
    del options["model"]
    found = compare(None, tmp_path / "out", options=options)
    network = found.findings.config.network
    assert isinstance(network, ViT)
    assert (network.embed_dim, network.depth, network.num_heads) == (24, 2, 3)
    assert found.findings.config.arms == ["default", "mimetic", "norm-matched-mimetic"]
    assert "every arm starts from drawn weights" in found.report
    with pytest.raises(UsageError, match="arms names pretrained, and a plain ViT, drawn has no pre-trained weights"):
        compare(None, tmp_path / "other", options={**options, "arms": ("default", "pretrained")})
    with pytest.raises(UsageError, match="embed_dim and model='convmixer-tiny': sizes are those of the model"):
        compare(None, tmp_path / "other", options={**options, "model": "convmixer-tiny"})


def test_rates_are_tuned_in_as_many_epochs_as_are_named(source, tmp_path):
    torch.set_default_dtype(torch.float32)
    options = small(source, seeds=1, arms=("default",), epochs=4, tune_lr=[1e-3, 3e-3], tune_seeds=1, tune_epochs=2)
    found = compare(None, tmp_path / "out", options=options)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    last = {line["run"]: line["epoch"] for line in lines if line["status"] == "finished"}
    assert last == {"tune-default-0.001-0": 2, "tune-default-0.003-0": 2, "default-0": 4}
    assert "chosen per arm in runs of 2 epochs" in found.report
