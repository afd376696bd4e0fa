"""What only a GPU can show: streams and augmentation as on the CPU, compiled bf16 steps, no wait in the loop."""

import json

import pytest
import torch

from attnlens.training.data.augment import augmented, draw_epoch
from attnlens.training.engine import Stack
from attnlens.training.trainer import OutOfMemoryError
from tests.training_setup import SHAPE, compare, config, small, write_source

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


def test_augmentation_is_the_same_on_both_devices():
    images = torch.randint(0, 256, (500, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    fill = torch.tensor([10, 200, 77], dtype=torch.uint8)
    for flavour in ("flip-shift", "flip-randaugment"):
        draws = draw_epoch(flavour, 0, 0, 500, 32)
        on_cpu = augmented(images, draws, fill).int()
        on_gpu = augmented(images.cuda(), draws, fill.cuda()).cpu().int()
        assert (on_cpu - on_gpu).abs().max() <= 1  # the last bit of a sine may move a truncation
        assert (on_cpu == on_gpu).double().mean() > 0.9999


@pytest.mark.parametrize("models", [1, 3])
def test_compiled_bf16_losses_are_close_to_the_cpus(models):
    states = [SHAPE.build(seed).state_dict() for seed in range(models)]
    images = torch.randint(0, 256, (1, 6, 1, 8, 8), dtype=torch.uint8)
    labels, where = torch.randint(0, 10, (1, 6)), torch.zeros(models, dtype=torch.long)
    found = []
    for device, precision, compiled in (("cpu", "float32", False), ("cuda", "bfloat16", True)):
        stack = Stack(config(device=device, precision=precision, compiled=compiled), models, torch.device(device))
        stack.load(states, [1e-3] * models, 5)
        losses = []
        for _ in range(5):
            stack.step(images.to(device), labels.to(device), where.to(device))
            losses.append(stack.take_losses(1))
        found.append(torch.tensor(losses))
    torch.testing.assert_close(*found, rtol=0.03, atol=0.03)


def test_steps_never_wait_for_the_device():
    stack = Stack(config(device="cuda", precision="bfloat16", compiled=True), 2, torch.device("cuda"))
    stack.load([SHAPE.build(seed).state_dict() for seed in range(2)], [1e-3] * 2, 10)
    images = torch.randint(0, 256, (1, 6, 1, 8, 8), dtype=torch.uint8, device="cuda")
    labels, where = torch.randint(0, 10, (1, 6), device="cuda"), torch.zeros(2, dtype=torch.long, device="cuda")
    for _ in range(3):
        stack.step(images, labels, where)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            stack.step(images, labels, where)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_streams_are_those_of_the_cpu(tmp_path):
    source = write_source(tmp_path)
    streams = []
    for device in ("cpu", "cuda"):
        compare(source, tmp_path / device, options=small(source, device=device, seeds=1, stack=1))
        lines = [json.loads(line) for line in (tmp_path / device / "results.jsonl").read_text().splitlines()]
        streams.append([(line["run"], line["streams"]) for line in lines])
    assert streams[0] == streams[1]


def test_running_out_of_memory_names_a_smaller_batch(tmp_path):
    source = write_source(tmp_path)
    torch.cuda.set_per_process_memory_fraction(0.0005)
    try:
        with pytest.raises(OutOfMemoryError, match="--batch-size"):
            compare(source, tmp_path / "out", options=small(source, device="cuda", stack=64, seeds=32, batch_size=120))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
