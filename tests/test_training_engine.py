"""The stacked engine against timm's modules, arms against what they promise, and structure against `inspect`."""

import math
import os
import shutil

import numpy as np
import pytest
import torch
from timm.layers import set_fused_attn
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import cross_entropy

from attnlens import inspect
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.models.architecture import describe_module
from attnlens.training.arms import initial_state
from attnlens.training.engine import Stack
from attnlens.training.networks.vit import ViT, forward, patches_of
from attnlens.training.source import Source
from attnlens.training.structure import measure_structure, structure_of
from tests.training_setup import SHAPE, config, write_source

CPU = torch.device("cpu")


@pytest.fixture
def _double():
    """Compute in float64, where two ways to the same number differ by rounding alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def random_networks(count):
    """Build networks whose every weight, biases and gains included, is random."""
    found = []
    for seed in range(count):
        network = SHAPE.build(seed).to(torch.get_default_dtype())
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in network.parameters():
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
        found.append(network)
    return found


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("fused", [False, True])
def test_a_stacks_logits_are_those_of_timms_modules(fused):
    networks = random_networks(3)
    weights = {name: torch.stack([n.state_dict()[name] for n in networks]) for name in networks[0].state_dict()}
    weights["pos_embed"] = weights["pos_embed"][:, 0]
    images = torch.randint(0, 256, (3, 5, 1, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.3]), torch.tensor([0.4])
    found = forward(weights, patches_of(images, mean, std, SHAPE.patch_size), SHAPE, fused=fused)
    for network, own, logits in zip(networks, images, found, strict=True):
        expected = network.eval()((own.double() / 255 - 0.3) / 0.4)
        torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)


def separately(network, settings, images, labels, lr):
    """Train one timm module with timm's optimizer and schedule and torch's own clipping."""
    set_fused_attn(False)
    recipe, steps = settings.recipe, len(images)
    optimizer = create_optimizer_v2(network, "adamw", lr=lr, weight_decay=recipe.weight_decay)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=steps,
        lr_min=recipe.min_lr,
        warmup_t=round(recipe.warmup * steps),
        warmup_lr_init=recipe.min_lr,
        t_in_epochs=False,
    )
    network.train()
    losses = []
    for step, (batch, answer) in enumerate(zip(images, labels, strict=True)):
        loss = cross_entropy(network((batch.to(torch.get_default_dtype()) / 255 - 0.3) / 0.4), answer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        optimizer.step()
        schedule.step_update(step + 1)
        losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("_double")
def test_a_stack_trains_like_separate_modules_of_timm():
    """Three models, two data sets between them, three learning rates, clipping that bites, twenty steps."""
    settings = config(recipe={"clip_norm": 0.7, "weight_decay": 0.3, "warmup": 0.2})
    networks, steps, rates = random_networks(3), 20, [1e-3, 3e-3, 2e-3]
    generator = torch.Generator().manual_seed(9)
    images = torch.randint(0, 256, (2, steps, 6, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (2, steps, 6), generator=generator)
    where = torch.tensor([0, 1, 0])
    stack = Stack(settings, 3, CPU)
    stack.load([network.state_dict() for network in networks], rates, steps)
    losses = []
    for step in range(steps):
        stack.step(images[:, step], labels[:, step], where)
        losses.append(stack.take_losses(1))
    for number, network in enumerate(networks):
        start = {name: value.clone() for name, value in network.state_dict().items()}
        data = where[number]
        expected = separately(network, settings, images[data], labels[data], rates[number])
        np.testing.assert_allclose([row[number] for row in losses], expected, rtol=1e-9)
        ours = stack.state(number)
        for name, value in network.state_dict().items():
            assert ours[name].shape == value.shape
            torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-9)
        assert not torch.allclose(start["head.weight"], ours["head.weight"])
        assert torch.equal(start["pos_embed"], ours["pos_embed"])


def test_a_model_does_not_see_the_others_in_its_stack():
    settings, networks = config(), random_networks(3)
    images = torch.randint(0, 256, (1, 6, 1, 8, 8), dtype=torch.uint8)
    labels = torch.randint(0, 10, (1, 6))
    states = [network.state_dict() for network in networks]
    broken = {name: torch.full_like(value, float("nan")) for name, value in states[1].items()}
    found = []
    for middle in (states[1], broken):
        stack = Stack(settings, 3, CPU)
        stack.load([states[0], middle, states[2]], [1e-3] * 3, 5)
        for _ in range(5):
            stack.step(images, labels, torch.zeros(3, dtype=torch.long))
        found.append([stack.state(0), stack.state(2)])
    for healthy, beside_nan in zip(*found, strict=True):
        assert all(torch.equal(healthy[name], beside_nan[name]) for name in healthy)
    assert not torch.isfinite(stack.state(1)["head.weight"]).any()


def test_loading_again_in_place_forgets_the_run_before():
    settings, (network,) = config(), random_networks(1)
    images, labels = torch.randint(0, 256, (1, 6, 1, 8, 8), dtype=torch.uint8), torch.randint(0, 10, (1, 6))
    stack, found = Stack(settings, 1, CPU), []
    place = stack.buffer.data_ptr()
    for _ in range(2):
        stack.load([network.state_dict()], [1e-3], 4)
        for _ in range(4):
            stack.step(images, labels, torch.zeros(1, dtype=torch.long))
        found.append(stack.state(0))
    assert stack.buffer.data_ptr() == place
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler here")
def test_a_compiled_bf16_stack_trains_like_an_eager_one():
    """On a CPU; the compiler and the casts are those of the GPU, the kernels are not."""
    shape = SHAPE.model_copy(update={"depth": 1})
    states = [shape.build(seed).state_dict() for seed in range(2)]
    images = torch.randint(0, 256, (1, 6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, where, found = torch.arange(6)[None], torch.zeros(2, dtype=torch.long), []
    for settings in (config(network=shape), config(network=shape, precision="bfloat16", compiled=True)):
        stack = Stack(settings, 2, CPU)
        for _ in range(2):  # loading anew must not compile anew
            stack.load(states, [1e-3] * 2, 6)
            for _ in range(6):
                stack.step(images, labels, where)
            losses = stack.take_losses(6)
        found.append(losses)
    assert found[0] == pytest.approx(found[1], rel=0.02)


def test_one_batch_overfits():
    settings = config(recipe={"lr": 3e-3})
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 6, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (1, 6), generator=generator)
    stack = Stack(settings, 2, CPU)
    stack.load([SHAPE.build(seed).state_dict() for seed in range(2)], [3e-3] * 2, 200)
    for _ in range(200):
        stack.step(images, labels, torch.zeros(2, dtype=torch.long))
    accuracies, losses, _ = stack.evaluate(images[0], labels[0])
    assert accuracies == [1.0, 1.0]
    assert max(losses) < 0.05


def test_scores_are_sklearns_whatever_the_classes_sizes():
    from sklearn.metrics import accuracy_score, log_loss, recall_score

    stack = Stack(config(recipe={"batch_size": 5}), 3, CPU)
    generator = torch.Generator().manual_seed(2)
    states = [SHAPE.build(seed).state_dict() for seed in range(3)]
    for state in states:
        state["head.weight"].normal_(generator=generator)  # logits that tell items apart
    stack.load(states, [1e-3] * 3, 10)
    images = torch.randint(0, 256, (37, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.tensor([0] * 20 + [3] * 11 + [9] * 6)
    scores = stack.evaluate(images, labels)
    where = torch.arange(3)
    with torch.no_grad():
        logits = stack.forward(stack.weights, images.expand(3, *images.shape), where, training=False).double()
    for model in range(3):
        guessed = logits[model].argmax(-1)
        assert scores.accuracy[model] == pytest.approx(accuracy_score(labels, guessed))
        recalls = recall_score(labels, guessed, labels=[0, 3, 9], average=None, zero_division=0)
        assert scores.balanced[model] == pytest.approx(recalls.mean())
        assert scores.loss[model] == pytest.approx(
            log_loss(labels, logits[model].softmax(-1).numpy(), labels=list(range(10))), rel=1e-5
        )
    assert scores.balanced != scores.accuracy


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return Source.of(str(write_source(tmp_path_factory.mktemp("source"))))


ATTENTION = ("attn.qkv", "attn.proj")


@pytest.mark.parametrize(
    "arm",
    ["mimetic", "fitted", "norm-matched", "norm-matched-mimetic", "qk-only", "ov-positive", "pretrained-attention"],
)
def test_arms_differ_from_the_default_in_attention_alone(source, arm):
    default, state = initial_state("default", 3, SHAPE, source), initial_state(arm, 3, SHAPE, source)
    changed = {name for name in default if not torch.equal(default[name], state[name])}
    assert changed
    assert all(any(part in name for part in ATTENTION) for name in changed)
    again = initial_state(arm, 3, SHAPE, source)
    assert all(torch.equal(state[name], again[name]) for name in state)
    if arm != "pretrained-attention":
        other = initial_state(arm, 4, SHAPE, source)
        assert not torch.equal(state["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])


@pytest.mark.parametrize(("arm", "of"), [("norm-matched", "fitted"), ("norm-matched-mimetic", "mimetic")])
def test_controls_keep_the_singular_values_of_their_arm(source, arm, of):
    control, original = (initial_state(name, 0, SHAPE, source) for name in (arm, of))
    for circuit in (qk_product, ov_product):
        values = [torch.linalg.svdvals(circuit(state)) for state in (control, original)]
        torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(qk_product(control), qk_product(original), atol=1e-2)


def qk_product(state):
    """Return W_Q W_K^T of the first head of the first layer."""
    q, k, _ = state["blocks.0.attn.qkv.weight"].view(3, 2, 12, 24)[:, 0]
    return q.T @ k


def ov_product(state):
    """Return W_V W_O of the first layer."""
    return state["blocks.0.attn.qkv.weight"][48:].T @ state["blocks.0.attn.proj.weight"].T


def test_the_pretrained_arm_computes_what_its_source_does_where_sizes_agree(tmp_path):
    """Same grid and patch: only the classifier is new, so the features in front of it are the source's."""
    path = write_source(tmp_path)
    shape = SHAPE.model_copy(update={"image_size": 16, "channels": 3})
    state = initial_state("pretrained", 0, shape, Source.of(str(path)))
    ours = shape.build(0)
    ours.load_state_dict(state)
    from safetensors.torch import load_file

    theirs = shape.model_copy(update={"classes": 7}).build(0)
    theirs.load_state_dict(load_file(path))
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        found = ours.forward_head(ours.forward_features(images), pre_logits=True)
    torch.testing.assert_close(found, expected)
    assert torch.equal(state["head.weight"], shape.build(0).head.weight)


def test_layer_scale_and_prefix_tokens_are_folded_or_left_behind():
    import timm

    from attnlens.fit.fit_params import fit_params

    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2, img_size=32, patch_size=8, init_values=0.5,
        num_classes=3, reg_tokens=2, mlp_ratio=2.0,
    )  # fmt: skip
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(tensor.shape))))
    from attnlens.models.open import open_model

    shape = SHAPE.model_copy(update={"image_size": 32, "patch_size": 8, "channels": 3})
    source = Source("model", ViT, {}, fit_params(model), opened=open_model(model, None))
    state = initial_state("pretrained", 0, shape, source)
    ours = shape.build(0)
    ours.load_state_dict(state)
    torch.testing.assert_close(state["pos_embed"], model.pos_embed[:, 3:].detach())
    x = torch.randn(2, 16, 24)
    with torch.no_grad():
        torch.testing.assert_close(ours.blocks(x), model.blocks(x))


def test_sources_that_are_no_plain_vit_are_refused():
    import timm

    from attnlens.fit.fit_params import fit_params
    from attnlens.models.open import open_model

    model = timm.create_model("vit_tiny_patch16_224", embed_dim=24, depth=2, num_heads=2, qk_norm=True)
    source = Source("model", ViT, {}, fit_params(model), opened=open_model(model, None))
    with pytest.raises(UnsupportedAttentionError, match=r"is no plain ViT .it holds blocks.0.attn.q_norm.weight"):
        initial_state("pretrained", 0, SHAPE.model_copy(update={"mlp_ratio": 4.0}), source)


def test_unknown_arms_are_refused_by_name(source):
    with pytest.raises(UsageError, match="arms names mimtic, which is no arm: choose from default"):
        initial_state("mimtic", 0, SHAPE, source)


def test_structure_is_what_inspect_reports():
    network = random_networks(1)[0]
    tensors = {name: value.numpy() for name, value in network.state_dict().items()}
    found = measure_structure(describe_module(network).indexed(), tensors)
    stats = inspect(network, fold="both").stats
    rows = [dict(zip(stats.columns, row, strict=True)) for row in stats.rows]
    for fold in ("raw", "effective"):
        for layer in range(SHAPE.depth):
            mine = [row for row in rows if (row["fold"], row["layer"]) == (fold, layer)]
            heads = [row["beta"] for row in mine if row["circuit"] == "qk"]
            total = next(row for row in mine if row["circuit"] == "ov" and row["head"] == "all")
            assert found[fold]["qk_beta"][layer] == pytest.approx(np.mean(heads), rel=1e-5)
            assert found[fold]["ov_beta"][layer] == pytest.approx(total["beta"], rel=1e-5)
            assert found[fold]["ov_alpha"][layer] == pytest.approx(total["alpha"], rel=1e-5)
    assert found["raw"]["qk_beta"] != found["effective"]["qk_beta"]


def test_operation_and_byte_counts_give_the_documented_bounds():
    shape = SHAPE.model_copy(update={"embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0, "image_size": 32})
    for patch, gflop, bound in ((2, 10.27, 24_000), (4, 2.17, 96_000)):
        one = shape.model_copy(update={"patch_size": patch})
        assert one.training_flops / 1e9 == pytest.approx(gflop, rel=0.002)
        assert 3.0e12 / one.training_bytes == pytest.approx(bound, rel=0.01)


def test_gradients_are_clipped_at_the_norm_that_is_named_and_left_alone_below_it():
    """Adam divides by the gradient's own size, so that a wrong norm shows in what it is given alone."""
    images = torch.randint(0, 256, (1, 6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([[0, 1, 2, 3, 4, 5]])
    found = {}
    for clip_norm in (0.05, 1e6):
        stack = Stack(config(recipe={"clip_norm": clip_norm}), 2, CPU)
        stack.load([network.state_dict() for network in random_networks(2)], [1e-3, 1e-3], 5)
        stack.step(images, labels, torch.tensor([0, 0]))
        found[clip_norm] = stack.gradient.clone()
    free, clipped = found[1e6], found[0.05]
    norms = free.norm(dim=1, keepdim=True)
    assert (norms > 0.1).all()
    torch.testing.assert_close(clipped.norm(dim=1), torch.full((2,), 0.05), rtol=1e-4, atol=0)
    torch.testing.assert_close(clipped, free * 0.05 / norms, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e16])
def test_weights_of_a_run_that_diverged_are_no_numbers_to_measure(value):
    (network,) = random_networks(1)
    specs, tensors = describe_module(network).indexed(), {n: v.numpy() for n, v in network.state_dict().items()}
    assert structure_of(specs, tensors) == measure_structure(specs, tensors)
    tensors[specs[-1][1].q.tensor][0, 0] = value
    assert structure_of(specs, tensors) is None
