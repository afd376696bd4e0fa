"""What only a GPU can show: streams and augmentation as on the CPU, compiled steps, every family, no wait in the loop.

Tests marked ``numbers`` read what kernels computed. All others hold on anything torch takes for a CUDA device.
"""

import json
import warnings
from contextlib import contextmanager

import pytest
import torch

from attnlens.models.architecture import describe_module
from attnlens.training import trainer
from attnlens.training.arms import WIRINGS
from attnlens.training.data.augment import augmented, draw_epoch
from attnlens.training.data.images import Images
from attnlens.training.data.sources import load_dataset
from attnlens.training.engine import Stack
from attnlens.training.hardware import why_not_compiled
from attnlens.training.networks.base import PLAIN
from attnlens.training.networks.convmixer import ConvMixer
from attnlens.training.networks.convnext import ConvNeXt
from attnlens.training.networks.gpt import Gpt
from attnlens.training.structure import measure_structure
from attnlens.training.trainer import OutOfMemoryError, epochs_of
from tests.training_setup import SHAPE, compare, config, small, write_source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
CUDA = torch.device("cuda", 0)
CONV = ConvMixer(image_size=8, patch_size=2, channels=1, classes=10, dim=7, depth=2, kernel_size=3)
NEXT = ConvNeXt(image_size=16, patch_size=1, channels=1, classes=10, entry="test_convnext")
GPT = Gpt(context=8, embed_dim=24, depth=2, num_heads=3)
FAMILIES = [
    *(pytest.param(network, PLAIN, id=type(network).__name__) for network in (SHAPE, CONV, NEXT, GPT)),
    *(pytest.param(SHAPE, wiring, id=arm) for arm, wiring in WIRINGS.items()),
]


@contextmanager
def waits(mode):
    """Let torch raise (``error``) or note (``warn``) wherever the host waits; yield what was noted."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode(mode)  # which warns that it is a prototype
        noted.clear()
        try:
            yield noted
        finally:
            torch.cuda.set_sync_debug_mode("default")


def batch_of(network, sets=1):
    parts = [network.example(6, torch.Generator().manual_seed(seed)) for seed in range(sets)]
    return tuple(torch.stack(part).cuda() for part in zip(*parts, strict=True))


def loaded(network, models, wiring=PLAIN, **changes):
    images = network.reads == "images"
    moments = {} if images else {"mean": [], "std": []}
    settings = config(network=network, device="cuda", **{"precision": "bfloat16", **moments, **changes})
    stack = Stack(settings, models, CUDA, wiring=wiring)
    stack.load([dict(network.build(seed, wiring).state_dict()) for seed in range(models)], [1e-3] * models, 20)
    return stack, torch.zeros(models, dtype=torch.long, device=CUDA)


@pytest.mark.numbers
def test_augmentation_is_the_same_on_both_devices():
    images = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fill = torch.tensor([10, 200, 77], dtype=torch.uint8)
    for flavour in ("flip-shift", "flip-randaugment"):
        draws = draw_epoch(flavour, 0, 0, 500, 32)
        on_cpu = augmented(images, draws, fill).int()
        on_gpu = augmented(images.cuda(), draws, fill.cuda()).cpu().int()
        assert (on_cpu - on_gpu).abs().max() <= 1  # the last bit of a sine may move a truncation
        assert (on_cpu == on_gpu).double().mean() > 0.9999


@pytest.mark.numbers
@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_compiled_losses_in_half_precision_are_close_to_the_cpus(models, precision):
    states = [SHAPE.build(seed).state_dict() for seed in range(models)]
    images = torch.randint(0, 256, (1, 6, 1, 8, 8), dtype=torch.uint8)
    labels, where = torch.randint(0, 10, (1, 6)), torch.zeros(models, dtype=torch.long)
    found = []
    for device, computed, compiled in (("cpu", "float32", False), ("cuda", precision, True)):
        stack = Stack(config(device=device, precision=computed, compiled=compiled), models, torch.device(device))
        stack.load(states, [1e-3] * models, 5)
        losses = []
        for _ in range(5):
            stack.step(images.to(device), labels.to(device), where.to(device))
            losses.append(stack.take_losses(1))
        found.append(torch.tensor(losses))
    torch.testing.assert_close(*found, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize(("network", "wiring"), FAMILIES)
def test_steps_of_every_family_never_wait_for_the_device(network, wiring, models):
    stack, where = loaded(network, models, wiring)
    batch = batch_of(network)
    stack.step(*batch, where)
    with waits("error"):
        for _ in range(3):
            stack.step(*batch, where)
            stack.tally(batch[0][0], batch[1][0])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_compiled_steps_never_wait_for_the_device(precision):
    if reason := why_not_compiled(CUDA):
        pytest.skip(f"torch cannot compile here: {reason}")
    stack, where = loaded(SHAPE, 2, compiled=True, precision=precision)
    batch = batch_of(SHAPE)
    for _ in range(3):
        stack.step(*batch, where)
    with waits("error"):
        for _ in range(5):
            stack.step(*batch, where)


@pytest.mark.parametrize(("flavour", "moved"), [("none", 1), ("flip-shift", 3), ("flip-randaugment", 6)])
def test_an_epoch_waits_once_for_each_array_of_draws_and_once_at_its_end(flavour, moved):
    stack, where = loaded(SHAPE, 2, recipe={"augment": flavour})
    data = load_dataset("digits").limited(30, 10).resident(stack.config, CUDA)
    batch, seeds = stack.config.recipe.batch_size, [4, 5]
    with waits("warn") as noted:
        inputs, targets, _ = epochs_of(data, seeds, 0)
        assert len(noted) == moved * len(seeds)
        for step in range(30 // batch):
            part = slice(step * batch, (step + 1) * batch)
            stack.step(inputs[:, part], targets[:, part], where)
        assert len(noted) == moved * len(seeds)
        stack.take_losses(30 // batch)
    assert len(noted) == moved * len(seeds) + 1


@pytest.fixture
def _structure_unread(monkeypatch):
    """Give every run the structure of weights on the CPU, so that nothing reads those that kernels left."""
    specs = describe_module(SHAPE.build(0)).indexed()
    known = measure_structure(specs, {name: value.numpy() for name, value in SHAPE.build(0).state_dict().items()})
    monkeypatch.setattr(trainer, "measure_structure", lambda *_given: known)


@pytest.mark.numbers
def test_a_comparison_begins_where_it_does_on_the_cpu(tmp_path):
    source, found = write_source(tmp_path), []
    for device, precision in (("cpu", "float32"), ("cuda", "float32")):
        how = {"device": device, "precision": precision, "seeds": 1, "epochs": 1, "compiled": False, "stack": 1}
        compare(source, tmp_path / device, options=small(source, **how))
        lines = [json.loads(line) for line in (tmp_path / device / "results.jsonl").read_text().splitlines()]
        found.append([line for line in lines if line["epoch"] == 0])
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert on_gpu["structure"] == on_cpu["structure"]
        assert on_gpu["test_loss"] == pytest.approx(on_cpu["test_loss"], rel=1e-3)


@pytest.mark.parametrize("flavour", ["none", "flip-shift", "flip-randaugment"])
def test_order_and_augmentation_are_drawn_as_on_the_cpu(flavour):
    settings = config(recipe={"augment": flavour})
    streams = [
        [epochs_of(load_dataset("digits").resident(settings, device), [3, 4], epoch).streams for epoch in range(2)]
        for device in (torch.device("cpu"), CUDA)
    ]
    assert streams[0] == streams[1]


@pytest.mark.numbers  # a run whose loss is no number has fewer epochs
def test_streams_are_those_of_the_cpu(tmp_path):
    source = write_source(tmp_path)
    streams = []
    for device in ("cpu", "cuda"):
        how = {"device": device, "seeds": 1, "stack": 1, "compiled": False}
        compare(source, tmp_path / device, options=small(source, **how))
        lines = [json.loads(line) for line in (tmp_path / device / "results.jsonl").read_text().splitlines()]
        streams.append([(line["run"], line["streams"]) for line in lines])
    assert streams[0] == streams[1]


@pytest.mark.usefixtures("_structure_unread")
def test_a_stack_nobody_asked_for_is_measured_and_stands_in_the_configuration_before_training(tmp_path):
    source = write_source(tmp_path)
    compare(source, tmp_path / "out", options=small(source, device="cuda", compiled=False))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["stack"] in (1, 2, 4)
    assert stored["attention"] in ("flash", "efficient", "math")
    assert stored["precision"] in ("bfloat16", "float16")


def test_running_out_of_memory_names_a_smaller_batch(tmp_path):
    source = write_source(tmp_path)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(7e7 / torch.cuda.get_device_properties(0).total_memory)
    asked = {"device": "cuda", "stack": 128, "seeds": 64, "batch_size": 120, "compiled": False}
    try:
        with pytest.raises(OutOfMemoryError, match="batch_size"):
            compare(source, tmp_path / "out", options=small(source, **asked))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_data_set_of_large_images_is_augmented_in_little_memory():
    """Shifts take 6.2 times what they move, RandAugment more: of 64 MB at a time, not of all there is."""
    pixels = torch.zeros(900, 3, 224, 224, dtype=torch.uint8).numpy()  # 135 MB
    labels = torch.zeros(900, dtype=torch.long).numpy()
    data = Images("large", pixels, labels, pixels[:8], labels[:8], ("a", "b"))
    for flavour in ("flip-shift", "flip-randaugment"):
        settings = config(device="cuda", mean=[0.5] * 3, std=[0.2] * 3, recipe={"augment": flavour, "batch_size": 60})
        resident = data.resident(settings, CUDA)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        inputs = resident.epoch(0, 0).inputs
        for start in range(0, 900, 60):
            inputs.part(start, start + 60)
        assert torch.cuda.max_memory_allocated() - before < 16 * 2**26
