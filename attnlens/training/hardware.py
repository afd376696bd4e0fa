"""What the device at hand can do: its precision, its attention kernels, whether it can compile."""

from __future__ import annotations

import gc
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from attnlens.errors import AttnlensError, UsageError
from attnlens.printable import printable
from attnlens.training.config import Attention, Config, Precision, Recipe
from attnlens.words import counted

if TYPE_CHECKING:
    import torch

    from attnlens.training.distributed import Spread
    from attnlens.training.networks.base import Wiring

_CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class OutOfMemoryError(AttnlensError):
    """The device's memory does not hold what is put on it."""


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the host, has run out."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error)  # the CPU allocator raises a plain RuntimeError


def free_again(device: torch.device) -> None:
    """Give back what nothing holds any more, so that something smaller finds room."""
    import torch

    gc.collect()
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def room_for(what: str, advice: str, device: torch.device) -> Iterator[None]:
    """Say in a line what did not find room on a device. Raises `OutOfMemoryError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        raise OutOfMemoryError(f"{device} ran out of memory {what}: {advice}") from error


def device_named(name: str, process: Spread) -> torch.device:
    """Return the device of ``--device`` for one of the processes. Raises `UsageError` where there is none for it."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device {name} is not known: choose cpu, cuda or auto")
    if name == "cpu":
        return torch.device(name)
    if not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device. Use --device cpu")
    devices = torch.cuda.device_count()
    if process.local_world > devices:
        raise UsageError(
            f"torchrun started {process.local_world} processes on this host, which has "
            f"{counted(devices, 'CUDA device')}: pass --nproc-per-node {devices}"
        )
    return torch.device(name, process.local_rank)


def precision_on(device: torch.device, wanted: str) -> Precision:
    """Return the precision of matrix products: ``auto`` is float32 on a CPU, a GPU's native half precision otherwise.

    bfloat16 where the GPU computes with it, float16 where it would only be imitated. Raises `UsageError`.
    """
    import torch

    if wanted == "auto":
        if device.type == "cpu":
            return "float32"
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if wanted == "float16" and device.type == "cpu":
        raise UsageError("--precision float16 needs a CUDA device: choose float32 or bfloat16 on a CPU")
    known: tuple[Precision, ...] = get_args(Precision)
    for precision in known:
        if precision == wanted:
            return precision
    raise UsageError(f"--precision {wanted} is not known: choose auto, {', '.join(known)}")


def compiles_on(device: torch.device, wanted: bool | None) -> bool:
    """Return whether the training step is compiled: where nothing is wanted, on a GPU that can.

    A note on stderr says why it cannot. Raises `UsageError` where it is wanted and cannot be.
    """
    if wanted is False or (wanted is None and device.type == "cpu"):
        return False
    reason = why_not_compiled(device)
    if reason and wanted:
        raise UsageError(f"--compile: torch cannot compile for {device.type} here ({reason}): use --no-compile")
    if reason:
        sys.stderr.write(f"note: the training step is not compiled, which is slower: {printable(reason)}\n")
    return not reason


def why_not_compiled(device: torch.device) -> str:
    """Return why `torch.compile` does not work for a device, in a line; empty where it does.

    Compiles a small function into empty caches: what an earlier run left there needs no compiler.
    """
    import torch

    try:
        with _fresh_caches():
            compiled = torch.compile(lambda values: (values * 2 + 1).sum(), dynamic=False)
            compiled(torch.ones(97, device=device))
    except Exception as error:  # noqa: BLE001  # whatever a missing compiler, header, triton or driver raises
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return first.strip()
    finally:
        torch.compiler.reset()
    return ""


@contextmanager
def _fresh_caches() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _CACHES}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ.update(dict.fromkeys(_CACHES, folder))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name)
                else:
                    os.environ[name] = value


def attention_on(config: Config, wirings: Iterable[Wiring], device: torch.device) -> Attention:
    """Return the kernels of fused attention that train a network on a CUDA device, the first that run in every wiring.

    Empty on a CPU, where scores are formed, and for a network without attention. Torch would choose among them anew for
    each shape and version; here one is taken, and written down.
    """
    from attnlens.models.architecture import describe_module

    if device.type == "cpu" or not any(True for _ in describe_module(config.network.build(0)).indexed()):
        return ""
    kernels: tuple[Attention, ...] = ("flash", "efficient", "math")
    plain = Recipe(epochs=1, batch_size=2, lr=config.recipe.lr)
    with room_for("with one model and two items", "free memory on it, or take a smaller network", device):
        for name in kernels:
            tried = config.model_copy(update={"attention": name, "compiled": False, "recipe": plain})
            if all(_trains(tried, wiring, device) for wiring in dict.fromkeys(wirings)):
                return name
    raise UsageError(f"no attention of torch runs on {device} in {config.precision}: choose another --precision")


def _trains(config: Config, wiring: Wiring, device: torch.device) -> bool:
    """Whether a step of the network runs with the attention a configuration names."""
    import torch

    from attnlens.training.engine import Stack

    items = config.network.example(2, torch.Generator().manual_seed(0))
    inputs, targets = (part[None].to(device) for part in items)
    where = torch.zeros(1, dtype=torch.long, device=device)
    stack = Stack(config, 1, device, wiring=wiring)
    stack.load([dict(config.network.build(0, wiring).state_dict())], [config.recipe.lr], 10)
    try:
        with warnings.catch_warnings(), fixed_attention(config):
            warnings.simplefilter("ignore")  # torch warns why a kernel was not used
            stack.step(inputs, targets, where)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


@contextmanager
def fixed_attention(config: Config) -> Iterator[None]:
    """Let torch use the attention kernels of a configuration alone, in every thread."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    kernels = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
    }
    if not config.attention:
        yield
        return
    with sdpa_kernel(kernels[config.attention]):
        yield


def describe_device(device: torch.device) -> str:
    """Name the GPU, or the processor and its cores."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{named[1] if named else platform.machine()}, {counted(os.cpu_count() or 1, 'core')}"
