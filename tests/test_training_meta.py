"""What a GPU would be made to wait for, without a GPU: steps, evaluations and augmentation on the meta device.

The meta device has shapes and no values. Whatever the host reads (``.item()``, ``.tolist()``, a boolean mask, nonzero)
raises there, and so does a tensor that stayed on the CPU; an operator that sees two devices is counted. Compiled
stacks are held to one graph each, without a dynamic size.
"""

from collections import Counter
from contextlib import nullcontext

import pytest
import timm.optim
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnlens.training import engine
from attnlens.training.arms import WIRINGS
from attnlens.training.data.augment import augmented, draw_epoch
from attnlens.training.engine import Stack
from attnlens.training.networks.base import PLAIN
from attnlens.training.networks.convmixer import ConvMixer
from attnlens.training.networks.convnext import ConvNeXt
from attnlens.training.networks.gpt import Gpt
from attnlens.training.networks.vit import BatchedForward, ViT
from tests.training_setup import config

META = torch.device("meta")
VIT = ViT(image_size=16, patch_size=4, channels=3, classes=10, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0)
MIXER = ConvMixer(image_size=16, patch_size=4, channels=3, classes=10, dim=7, depth=2, kernel_size=3)
NEXT = ConvNeXt(image_size=32, patch_size=2, channels=3, classes=10, entry="test_convnext")
TEXT = Gpt(context=7, embed_dim=24, depth=2, num_heads=3)
CASES = [
    *(pytest.param(network, PLAIN, id=type(network).__name__) for network in (VIT, MIXER, NEXT, TEXT)),
    *(
        pytest.param(network, wiring, id=f"{type(network).__name__} {arm}")
        for network in (VIT, TEXT)
        for arm, wiring in WIRINGS.items()
    ),
]


class Watch(TorchDispatchMode):
    """Count operators, and those that see more than one device."""

    def __init__(self):
        super().__init__()
        self.across, self.count = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.count += 1
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            self.across[str(func)] += 1
        return out


@pytest.fixture(autouse=True)
def _optimizer_with_a_meta_kernel(monkeypatch):
    """Take torch's foreach AdamW for the fused one, which has no kernel here: it reads and writes the same tensors."""
    real = timm.optim.create_optimizer_v2

    def foreach(*args, **how):
        return real(*args, **{**how, "fused": None, "foreach": True})

    monkeypatch.setattr(timm.optim, "create_optimizer_v2", foreach)


def stack_of(network, wiring=PLAIN, models=2, **changes):
    """Return a loaded stack on the meta device with a batch: inputs and targets of two sets, and each model's set."""
    images = network.reads == "images"
    moments = {"mean": [0.5] * 3, "std": [0.2] * 3} if images else {"mean": [], "std": []}
    stack = Stack(config(network=network, device="cuda", **moments, **changes), models, META, wiring=wiring)
    stack.load([dict(network.build(0, wiring).state_dict())] * models, [1e-3] * models, 10)
    sets = [network.example(5, torch.Generator().manual_seed(seed)) for seed in range(2)]
    inputs, targets = (torch.stack(parts).to(META) for parts in zip(*sets, strict=True))
    return stack, inputs, targets, torch.zeros(models, dtype=torch.long, device=META)


def assert_steps_are_free(network, wiring=PLAIN, models=2, **changes):
    """Check that a second step (the first makes the optimizer's state) and an evaluation stay on the device."""
    stack, inputs, targets, where = stack_of(network, wiring, models, **changes)
    stack.step(inputs, targets, where)
    with Watch() as watch:
        stack.step(inputs, targets, where)
        stack.tally(inputs[0], targets[0])
    assert watch.count > 50
    assert not watch.across, f"operators that see two devices: {dict(watch.across)}"
    return stack


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize(("network", "wiring"), CASES)
def test_a_step_and_an_evaluation_neither_read_the_device_nor_mix_devices(network, wiring, models):
    stack = assert_steps_are_free(network, wiring, models)
    with pytest.raises((RuntimeError, NotImplementedError)):  # where training does wait, it is seen
        stack.take_losses(1)


def test_scaling_losses_for_float16_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(Stack, "_precision", lambda _self: nullcontext())  # meta has no autocast
    assert assert_steps_are_free(VIT, precision="float16").scaler is not None


@pytest.mark.parametrize("flavour", ["none", "shift", "flip-shift", "flip-randaugment"])
def test_augmentation_reads_nothing_from_the_device(flavour):
    images = torch.empty(37, 3, 16, 16, dtype=torch.uint8, device=META)
    moved = augmented(images, draw_epoch(flavour, 0, 0, 37, 16), torch.empty(3, dtype=torch.uint8, device=META))
    assert moved.shape == images.shape
    assert moved.device.type == "meta"


REAL = BatchedForward.__call__


def planted(fault):
    """Return a forward pass of `ViT` with a fault in it."""

    def forward(self, *given, **how):
        logits = REAL(self, *given, **how)
        if fault == "item":
            return logits * (1.0 if logits.max().item() < 1e9 else 0.0)
        if fault == "list":
            return logits + len(logits.sum(0).tolist()) * 0
        if fault == "mask":
            return logits + logits[logits > 0].sum()
        if fault == "cpu tensor":
            return logits + torch.zeros(logits.shape[-1])
        if fault == "cpu scalar":
            return logits * torch.tensor(1.0)
        assert fault == "none"
        return logits

    return forward


@pytest.mark.parametrize("fault", ["item", "list", "mask", "cpu tensor", "cpu scalar"])
def test_planted_waits_and_tensors_left_on_the_cpu_are_found(monkeypatch, fault):
    monkeypatch.setattr(BatchedForward, "__call__", planted("none"))
    assert_steps_are_free(VIT)
    monkeypatch.setattr(BatchedForward, "__call__", planted(fault))
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        assert_steps_are_free(VIT)


@pytest.fixture
def graphs(monkeypatch):
    """Let `torch.compile` note whether each graph it makes has a dynamic size, and run it as it is."""
    found, real = [], torch.compile

    def backend(module, inputs):
        sizes = [size for value in inputs for size in (value.shape if isinstance(value, torch.Tensor) else [value])]
        found.append(any(isinstance(size, torch.SymInt) for size in sizes))
        return module

    def noted(step, **how):
        return real(step, **{**how, "mode": None, "backend": backend})

    monkeypatch.setattr(torch, "compile", noted)
    yield found
    torch.compiler.reset()


def compile_stacks(sizes, sets=lambda models: 1 + models % 2):
    network = ViT(image_size=8, patch_size=4, channels=1, classes=10, embed_dim=8, depth=1, num_heads=2, mlp_ratio=1.0)
    state = dict(network.build(0).state_dict())
    for models in sizes:
        stack = Stack(config(network=network, compiled=True), models, torch.device("cpu"))
        stack.load([state] * models, [1e-3] * models, 10)
        images = torch.zeros(sets(models), 3, 1, 8, 8, dtype=torch.uint8)
        labels, where = torch.zeros(sets(models), 3, dtype=torch.long), torch.zeros(models, dtype=torch.long)
        for _ in range(2):
            stack.step(images, labels, where)


def test_every_stack_is_compiled_once_to_a_graph_of_fixed_sizes(graphs):
    sizes = range(1, 11)  # more than torch would compile of one function before it gives up
    compile_stacks(sizes)
    assert graphs == [False] * len(sizes)


def test_planted_dynamic_shapes_are_found(graphs, monkeypatch):
    noted = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **how: noted(step, **{**how, "dynamic": None}))
    monkeypatch.setattr(engine, "own_code", lambda method: method)
    compile_stacks([1, 2, 3])
    assert any(graphs)
