"""The speed ladder of training: what each measure of the engine is worth, against timm with a DataLoader.

    python -m benchmarks.train_speed --output benchmarks/results/gpu/speed.json

Every rung trains ViT-Ti (width 192, depth 12, 3 heads) on random 32 px images in float32 or bfloat16 and reports
images/s, the share of the device's bfloat16 peak (MFU, where the peak is known) and of the byte bound (copy bandwidth
measured here over `ViT.training_bytes`, derived and not measured). A rung that has been measured stays in the file:
run again after --time-budget and the rest follows.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from timm.data import create_transform
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from attnlens.atomic import write_text_atomic
from attnlens.provenance import run_provenance
from attnlens.training.config import Config, Recipe
from attnlens.training.data.augment import augmented, draw_epoch
from attnlens.training.engine import Stack
from attnlens.training.hardware import describe_device
from attnlens.training.networks.vit import ARCHITECTURE, ViT

PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second by a word in the device's name, from the makers' data sheets."""
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
STACKS = (2, 4, 12)
POLICY = "rand-m9-mstd0.5-mmax9-inc1"
"""Nearly the engine's flavour, for the DataLoader: at level 10 timm asks Pillow to keep no bit, Pillow 13 refuses."""
Rung = Callable[[], float]


class Pictures(Dataset[Any]):
    """Random 32 px images through timm's CPU transforms: what a DataLoader decodes and augments."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator).numpy()
        self.transform = create_transform(
            (3, 32, 32), is_training=True, auto_augment=POLICY, no_aug=False, scale=(1, 1), ratio=(1, 1)
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.pixels)

    def __getitem__(self, index: int) -> Any:
        """Return an augmented image and a label."""
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), index % 10


def config_of(shape: ViT, batch: int, device: torch.device, *, half: bool, compiled: bool) -> Config:
    return Config(
        dataset="random",
        data_sha256="",
        train_items=batch,
        test_items=1,
        mean=[0.5] * 3,
        std=[0.25] * 3,
        source={},
        params_sha256="",
        network=shape,
        recipe=Recipe(epochs=1, batch_size=batch, lr=1e-3),
        arms=["default"],
        contrasts=[],
        seeds=1,
        data_seed=0,
        init_seed=0,
        target=0.5,
        eval_every=1,
        lr_grid=[],
        tune_seeds=1,
        device="cuda" if device.type == "cuda" else "cpu",
        precision="bfloat16" if half else "float32",
        compiled=compiled,
        stack=1,
    )


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ladder:
    """The rungs, in order, by name."""

    def __init__(self, shape: ViT, batch: int, steps: int, workers: int, device: torch.device) -> None:
        self.shape, self.batch, self.steps, self.workers, self.device = shape, batch, steps, workers, device

    def rungs(self) -> Iterator[tuple[str, Rung]]:
        """Yield what this device can run, slowest first."""
        cuda = self.device.type == "cuda"
        yield "timm + DataLoader, float32", lambda: self.baseline(half=False)
        yield "engine, eager float32, AdamW not fused", lambda: self.engine(fused=False)
        yield "engine, eager float32", self.engine
        yield "augmentation alone, rand-m9-mstd0.5-inc1 on the device", self.augmentation
        if not cuda:
            for models in STACKS[:2]:
                yield f"stack of {models}, eager float32", lambda models=models: self.engine(models=models)
            return
        yield "timm + DataLoader, bf16", lambda: self.baseline(half=True)
        yield "engine, eager bf16", lambda: self.engine(half=True)
        for name, backend in BACKENDS.items():
            yield f"engine, eager bf16, {name} attention", lambda b=backend: self.engine(half=True, backend=b)
        yield "engine, compiled bf16", lambda: self.engine(half=True, compiled=True)
        yield (
            "engine, compiled bf16, CUDA graphs",
            lambda: self.engine(half=True, compiled=True, mode="reduce-overhead"),
        )
        for models in STACKS:
            yield (
                f"stack of {models}, compiled bf16",
                lambda models=models: self.engine(half=True, compiled=True, models=models),
            )

    def engine(
        self,
        *,
        half: bool = False,
        compiled: bool = False,
        models: int = 1,
        fused: bool = True,
        backend: SDPBackend | None = None,
        mode: str = "default",
    ) -> float:
        """Return images/s of the engine's step, over all models of the stack."""
        settings = config_of(self.shape, self.batch, self.device, half=half, compiled=compiled)
        stack = Stack(settings, models, self.device, mode=mode)
        state = dict(self.shape.build(0).state_dict())
        stack.load([state] * models, [1e-3] * models, 10 * self.steps)
        if not fused:
            stack.optimizer = torch.optim.AdamW(stack.optimizer.param_groups, fused=False, foreach=True)
            for group in stack.optimizer.param_groups:
                group.update(fused=False, foreach=True)
        size = (1, self.batch, 3, self.shape.image_size, self.shape.image_size)
        images = torch.randint(0, 256, size, dtype=torch.uint8, device=self.device)
        labels = torch.randint(0, 10, (1, self.batch), device=self.device)
        where = torch.zeros(models, dtype=torch.long, device=self.device)
        chosen: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel(backend)
        with chosen:
            return models * self.rate(lambda: stack.step(images, labels, where))

    def rate(self, step: Callable[[], object]) -> float:
        """Return images/s of one model's step, after a warm-up."""
        for _ in range(max(2, self.steps // 5)):
            step()
        wait(self.device)
        began = time.perf_counter()
        for _ in range(self.steps):
            step()
        wait(self.device)
        return self.batch * self.steps / (time.perf_counter() - began)

    def baseline(self, *, half: bool) -> float:
        """Return images/s of timm's module, AdamW as torch chooses it, and a DataLoader that augments on the CPU."""
        model = timm.create_model(ARCHITECTURE, **self.shape.model_args()).to(self.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        warm = 2
        loader = DataLoader(
            Pictures(self.batch * (self.steps + warm)),
            self.batch,
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )
        began = 0.0
        for step, (images, labels) in enumerate(loader):
            if step == warm:
                wait(self.device)
                began = time.perf_counter()
            images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))  # noqa: PLW2901
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                loss = cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        wait(self.device)
        return self.batch * self.steps / (time.perf_counter() - began)

    def augmentation(self) -> float:
        """Return images/s of augmenting, draws included: shared by all models of a seed."""
        count = self.batch * self.steps
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, device=self.device)
        fill = torch.full((3,), 128, dtype=torch.uint8, device=self.device)
        augmented(images[: self.batch], draw_epoch("flip-randaugment", 0, 0, self.batch, 32), fill)
        wait(self.device)
        began = time.perf_counter()
        augmented(images, draw_epoch("flip-randaugment", 0, 1, count, 32), fill)
        wait(self.device)
        return count / (time.perf_counter() - began)


def bandwidth(device: torch.device) -> float:
    """Return bytes a second of copying, read and write counted."""
    count = 2**30 if device.type == "cuda" else 2**26
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    wait(device)
    began = time.perf_counter()
    for _ in range(10):
        target.copy_(source)
    wait(device)
    return 20 * count / (time.perf_counter() - began)


def main(
    *,
    output: Annotated[Path, typer.Option(help="JSON file; rungs it holds are not measured again.")],
    patch_size: Annotated[int, typer.Option(min=1)] = 4,
    batch_size: Annotated[int, typer.Option(min=1)] = 512,
    steps: Annotated[int, typer.Option(min=2)] = 50,
    workers: Annotated[int, typer.Option(min=0, help="Of the baseline's DataLoader.")] = 8,
    embed_dim: Annotated[int, typer.Option()] = 192,
    depth: Annotated[int, typer.Option(min=1)] = 12,
    num_heads: Annotated[int, typer.Option(min=1)] = 3,
    device: Annotated[str, typer.Option()] = "cuda",
    time_budget: Annotated[float, typer.Option(help="Start no rung after so many seconds.")] = 300,
) -> None:
    """Measure the ladder."""
    began, place = time.monotonic(), torch.device(device)
    shape = ViT(
        image_size=32, patch_size=patch_size, channels=3, classes=10, embed_dim=embed_dim, depth=depth,
        num_heads=num_heads, mlp_ratio=4.0,
    )  # fmt: skip
    title = describe_device(place)
    about = {"device": title, "shape": shape.model_dump(), "batch_size": batch_size, "steps": steps}
    data: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    if {key: data.get(key) for key in about} != about:
        data = {**about, "bytes_per_second": bandwidth(place), "rungs": {}}
    data["versions"] = run_provenance()["versions"]
    peak = next((value for word, value in PEAKS.items() if word in title), None)
    bound = data["bytes_per_second"] / shape.training_bytes
    for name, rung in Ladder(shape, batch_size, steps, workers, place).rungs():
        if name in data["rungs"]:
            continue
        if time.monotonic() - began > time_budget:
            print(f"time budget spent before {name!r}: run again to go on")
            break
        try:
            rate = rung()
        except (RuntimeError, torch.OutOfMemoryError) as error:  # a backend this device lacks is a finding too
            data["rungs"][name] = {"failed": str(error).splitlines()[0]}
        else:
            found: dict[str, Any] = {"images_per_second": round(rate, 1)}
            if not name.startswith("augmentation"):
                found["share_of_byte_bound"] = round(rate / bound, 4)
                found["mfu"] = round(rate * shape.training_flops / peak, 4) if peak else None
            data["rungs"][name] = found
        print(f"{name}: {data['rungs'][name]}", flush=True)
        write_text_atomic(output, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
