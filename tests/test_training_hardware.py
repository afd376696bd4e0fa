"""Precision, attention, compilers, devices and memory: what is chosen where, and what is said when it is not there."""

import json
import os
import shutil
from contextlib import nullcontext

import pytest
import torch

from attnlens.cli import main
from attnlens.errors import UsageError
from attnlens.memory import fits_on
from attnlens.training import comparison, hardware, stack_size
from attnlens.training.data import images as image_data
from attnlens.training.data.images import Images, ResidentImages
from attnlens.training.data.on_device import Chunked
from attnlens.training.data.sources import load_dataset
from attnlens.training.distributed import Spread
from attnlens.training.engine import LossScale, Stack
from attnlens.training.hardware import (
    attention_on,
    compiles_on,
    device_named,
    fixed_attention,
    precision_on,
    why_not_compiled,
)
from attnlens.training.networks.base import PLAIN
from attnlens.training.trainer import OutOfMemoryError, Session
from tests.training_setup import SHAPE, compare, config, small, write_source

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source"))


def test_precision_is_what_the_device_computes_with(monkeypatch):
    assert precision_on(CPU, "auto") == "float32"
    for native, expected in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda found=native, **_how: found)
        assert precision_on(CUDA, "auto") == expected
    for device, wanted in ((CPU, "float32"), (CPU, "bfloat16"), (CUDA, "float16"), (CUDA, "float32")):
        assert precision_on(device, wanted) == wanted
    with pytest.raises(UsageError, match="precision float16 needs a CUDA device"):
        precision_on(CPU, "float16")
    with pytest.raises(UsageError, match="precision half is not known: choose auto, float32, bfloat16, float16"):
        precision_on(CPU, "half")


def test_bfloat16_on_a_cpu_is_a_condition_and_trains(source, tmp_path):
    found = compare(source, tmp_path / "out", options=small(source, precision="bfloat16", seeds=1, epochs=1))
    assert found.findings.complete
    assert json.loads((tmp_path / "out" / "config.json").read_text())["precision"] == "bfloat16"
    assert "| engine | bfloat16, eager" in found.report
    with pytest.raises(UsageError, match="precision is 'float32', was 'bfloat16'"):
        compare(source, tmp_path / "out", options=small(source, seeds=1, epochs=1), resume=True)


def test_nothing_is_tried_where_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(hardware, "why_not_compiled", lambda _device: pytest.fail("it compiled"))
    assert not compiles_on(CPU, None)
    assert not compiles_on(CUDA, wanted=False)


def test_without_a_compiler_training_is_eager_with_a_note_or_refused_where_it_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(hardware, "why_not_compiled", lambda _device: "Failed to find C compiler.")
    assert not compiles_on(CUDA, None)
    assert capsys.readouterr().err == (
        "note: the training step is not compiled, which is slower: Failed to find C compiler.\n"
    )
    with pytest.raises(
        UsageError, match=r"compiled=True: torch cannot compile for cuda here \(Failed to find C compiler"
    ):
        compiles_on(CUDA, wanted=True)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="there is no C++ compiler here")
def test_a_missing_compiler_is_found_although_an_earlier_one_left_its_work_in_the_cache(monkeypatch):
    assert not why_not_compiled(CPU)
    kept = {name: os.environ.get(name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    from torch._inductor import config as inductor
    from torch._inductor import cpp_builder

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    for cached in ("get_cpp_compiler", "get_compiler_version_info"):
        getattr(getattr(cpp_builder, cached, None), "cache_clear", lambda: None)()
    assert why_not_compiled(CPU)
    assert {name: os.environ.get(name) for name in kept} == kept


def test_torch_without_a_compiler_of_its_own_is_found(monkeypatch):
    def missing(*_args, **_how):
        raise RuntimeError("\n  Cannot find a working triton installation.\nMore here")

    monkeypatch.setattr(torch, "compile", missing)
    assert why_not_compiled(CPU) == "Cannot find a working triton installation."


def test_attention_is_the_first_kernel_that_trains_every_wiring(monkeypatch):
    tried, refused = [], {"flash"}
    real = hardware._trains

    def trains(settings, wiring, _device):
        tried.append(settings.attention)
        return settings.attention not in refused and real(settings, wiring, torch.device("cpu"))

    monkeypatch.setattr(hardware, "_trains", trains)
    assert attention_on(config(), [PLAIN], CPU) == ""
    assert not tried
    assert attention_on(config(), [PLAIN, PLAIN], CUDA) == "efficient"
    assert tried == ["flash", "efficient"]
    refused |= {"efficient", "math"}
    with pytest.raises(UsageError, match="no attention of torch runs on cuda:0 in float32"):
        attention_on(config(), [PLAIN], CUDA)


def test_the_attention_of_a_configuration_alone_is_allowed_and_given_back():
    def allowed():
        backends = torch.backends.cuda
        return backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled()

    before = allowed()
    for name, expected in (("flash", (True, False, False)), ("math", (False, False, True)), ("", before)):
        with fixed_attention(config(attention=name)):
            assert allowed() == expected
        assert allowed() == before
    assert config(attention="").sha256() == config().sha256()


def test_more_processes_than_devices_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for local_rank in range(4):
        with pytest.raises(
            UsageError, match=r"torchrun started 4 processes.*has 2 CUDA devices: pass --nproc-per-node 2"
        ):
            device_named("cuda", Spread(local_rank, 4, local_rank, 4))
    assert device_named("auto", Spread(5, 8, 1, 2)) == torch.device("cuda", 1)
    assert device_named("cpu", Spread(3, 4, 3, 4)) == CPU


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_wrong_usage_under_torchrun_is_told_once_a_host(local_rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr("sys.argv", ["attnlens", "train-compare", "--precision", "float16", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if "--precision" in line] == said[-1:] * lines


def test_each_model_scales_its_own_loss():
    scaler = LossScale(3, CPU)
    gradient = torch.tensor([[2.0, -4.0], [torch.inf, 1.0], [3.0, torch.nan]]) * LossScale.FIRST
    scaler.unscale(gradient)
    torch.testing.assert_close(gradient, torch.tensor([[2.0, -4.0], [0.0, 0.0], [0.0, 0.0]]))
    assert scaler.scale.tolist() == [2.0**16, 2.0**15, 2.0**15]
    for _ in range(LossScale.PATIENCE - 1):
        scaler.unscale(torch.ones(3, 2))
    assert scaler.scale.tolist() == [2.0**17, 2.0**15, 2.0**15]  # the others began to count one step later
    scaler.unscale(torch.ones(3, 2))
    assert scaler.scale.tolist() == [2.0**17, 2.0**16, 2.0**16]


def test_scaled_losses_train_as_unscaled_ones_do_and_a_resumed_stack_keeps_its_factors(monkeypatch):
    monkeypatch.setattr(Stack, "_precision", lambda _self: nullcontext())
    states = [SHAPE.build(seed).state_dict() for seed in range(2)]
    images = torch.randint(0, 256, (1, 6, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, where, ends = torch.arange(6)[None], torch.zeros(2, dtype=torch.long), []
    for precision in ("float32", "float16"):
        stack = Stack(config(precision=precision), 2, CPU)
        stack.load(states, [1e-3] * 2, 10)
        for _ in range(4):
            stack.step(images, labels, where)
        ends.append(stack.buffer.detach().clone())
    torch.testing.assert_close(*ends)  # a power of two times a number keeps its digits
    stack.scaler.state[0, 1] = 8.0
    again = Stack(config(precision="float16"), 2, CPU)
    again.load(states, [1e-3] * 2, 10)
    again.restore(stack.snapshot())
    assert again.scaler.scale.tolist() == [2.0**16, 8.0]


@pytest.fixture
def crowded(monkeypatch):
    """Let nothing larger than two models fit, in a comparison whose stacks nobody asked for."""
    real = Stack.step

    def step(self, *given):
        if self.models > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(self, *given)

    monkeypatch.setattr(Stack, "step", step)
    monkeypatch.setattr(comparison, "Session", lambda *given, **named: Session(*given, **{**named, "automatic": True}))


@pytest.mark.usefixtures("crowded")
def test_a_stack_nobody_asked_for_is_halved_when_memory_ends_and_stays_halved(source, tmp_path, capsys):
    options = small(source, stack=4)
    found = compare(source, tmp_path / "out", options=options)
    assert found.findings.complete
    assert (
        capsys.readouterr().err == "note: cpu ran out of memory with 4 models of batch 40: going on with stacks of 2\n"
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert {line["models_in_stack"] for line in lines} == {2}
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (stored["stack"], stored["stack_limit"]) == (4, 2)
    assert "| engine | float32, eager, stacks of at most 4, trained in 2 |" in found.report
    (tmp_path / "out" / "runs" / "mimetic-1.json").unlink()
    compare(source, tmp_path / "out", options=options, resume=True)  # its default-1 is not trained again
    assert capsys.readouterr().err == ""
    halves = compare(source, tmp_path / "two", options=small(source, stack=2))
    assert halves.summary.to_csv() == found.summary.to_csv()


def test_a_stack_limit_that_is_no_number_is_refused(source, tmp_path):
    compare(source, tmp_path / "out", options=small(source, seeds=1, epochs=1))
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "stack_limit": "many"}))
    with pytest.raises(UsageError, match="stack_limit is 'many', no number of models: remove it"):
        compare(source, tmp_path / "out", options=small(source, seeds=1, epochs=1), resume=True)


def test_a_data_set_without_room_on_the_device_gets_advice_of_its_own(source, tmp_path, monkeypatch):
    def resident(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Images, "resident", resident)
    with pytest.raises(OutOfMemoryError, match=r"cpu ran out of memory with the data of digits: train on fewer"):
        compare(source, tmp_path / "out")


def test_stacks_are_measured_on_the_comparisons_own_data(monkeypatch):
    seen = []

    def seconds(_stack, kind, data):
        seen.append((kind.models, kind.sets, kind.wiring, data.count))
        if kind.models > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {1: 1.0, 2: 0.6, 4: 0.1}[kind.models]

    monkeypatch.setattr(stack_size, "_step_seconds", seconds)
    settings = config(seeds=4, train_items=30)
    data = load_dataset("digits").limited(30, 10)
    assert stack_size.fastest_stack(settings, dict.fromkeys(settings.arms, PLAIN), data, CPU) == 4
    assert seen == [(1, 1, PLAIN, 30), (2, 1, PLAIN, 30), (4, 2, PLAIN, 30), (8, 4, PLAIN, 30)]


def test_a_step_of_every_size_is_timed_on_as_many_sets_as_it_trains_on():
    settings = config(seeds=2, network=SHAPE, train_items=30)
    data = load_dataset("digits").limited(30, 10).resident(settings, CPU)
    for models, sets in ((1, 1), (4, 2)):
        kind = stack_size._Kind(models, sets, PLAIN)
        assert stack_size._step_seconds(Stack(settings, models, CPU), kind, data) > 0


def test_data_that_would_fill_a_gpu_stays_in_the_hosts_memory_and_gives_the_same_epochs(monkeypatch):
    assert fits_on(CPU, 10**15)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 2000))
    assert fits_on(CUDA, 500)
    assert not fits_on(CUDA, 501)
    settings, data = config(recipe={"augment": "flip-randaugment"}), load_dataset("digits").limited(30, 10)
    whole = ResidentImages(data, settings, CPU)
    monkeypatch.setattr(image_data, "fits_on", lambda _device, size: size < data.train.nbytes)
    monkeypatch.setattr(image_data, "BLOCK", 7 * data.train[:1].nbytes)
    parts = ResidentImages(data, settings, CPU)
    expected, found = whole.epoch(3, 1), parts.epoch(3, 1)
    assert isinstance(found.inputs, Chunked)
    assert found.stream == expected.stream
    assert torch.equal(found.inputs.part(0, 30), expected.inputs)
    assert torch.equal(parts.test_inputs[None, 2:9], whole.test_inputs[None, 2:9])
