"""Pre-train the small vision transformer that attnlens ships inside its package.

    python scripts/pretrain_embedded.py --data ../shared/data/cifar10-jpeg75.tar.xz --work ../pretrain

Decodes the archive once (``--cache`` keeps the arrays), trains for a fixed number of epochs, writes a timm model folder
with float16 weights, and measures the accuracy of that file on the test images. The model card beside the weights,
attnlens/embedded/README.md, holds what the run gave: accuracy, n, hardware, seconds and versions. A checkpoint after
each epoch lets ``--resume`` continue a run that was stopped.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import platform
import re
import tarfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import timm
import torch
import typer
from PIL import Image
from timm.layers import build_sincos2d_pos_embed, set_fused_attn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 96,
    "depth": 6,
    "num_heads": 3,
    "class_token": False,
    "global_pool": "avg",
}
MEAN, STD = (0.4913, 0.4821, 0.4465), (0.2452, 0.2428, 0.2606)  # of the decoded training images, by channel
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, CLIP_NORM, SHIFT = 128, 2e-3, 0.1, 1.0, 4

log = logging.getLogger("pretrain_embedded")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def decode(data: Path) -> dict[str, np.ndarray]:
    """Decode an archive or a folder to uint8 `[image, row, column, channel]` and integer labels, sorted by path."""
    if data.is_dir():
        files = {path.relative_to(data).as_posix(): path.read_bytes() for path in data.glob("t*/*/*.jpg")}
    else:
        with tarfile.open(data) as archive:  # in stored order: seeking back in xz decompresses it again
            files = {member.name: stream.read() for member in archive if (stream := archive.extractfile(member))}
    paths = sorted(files)
    names = sorted({path.split("/")[1] for path in paths})
    arrays = {"names": np.array(names)}
    for split in ("train", "test"):
        part = [path for path in paths if path.startswith(f"{split}/")]
        if not part:
            raise typer.BadParameter(f"{data} holds no {split}/<class>/*.jpg")
        pixels = [np.asarray(Image.open(io.BytesIO(files[path])).convert("RGB")) for path in part]
        arrays[f"{split}_images"] = np.stack(pixels)
        arrays[f"{split}_labels"] = np.array([names.index(path.split("/")[1]) for path in part])
    return arrays


def load_arrays(data: Path, cache: Path | None) -> dict[str, np.ndarray]:
    """Return the decoded data set, from the cache where it was made from the same archive."""
    source = hashlib.sha256(data.read_bytes()).hexdigest() if data.is_file() else "none, an unpacked folder"
    if cache and cache.exists():
        with np.load(cache) as stored:
            arrays = dict(stored)
        if str(arrays.get("source")) == source:
            return arrays
    arrays = decode(data) | {"source": np.array(source)}
    if cache:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        replace_file(cache, buffer.getvalue())
    return arrays


def build_model(num_classes: int) -> nn.Module:
    """Build the network with timm's default initialisation and a frozen 2-D sin-cos position embedding."""
    model = timm.create_model(ARCHITECTURE, num_classes=num_classes, **MODEL_ARGS)
    positions = build_sincos2d_pos_embed(model.patch_embed.grid_size, dim=model.embed_dim)
    model.pos_embed.requires_grad_(False).copy_(positions)
    return model


def normalise(images: Tensor) -> Tensor:
    """Return uint8 images as float32, each channel of the training set with mean 0 and standard deviation 1."""
    return (images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Flip each image with probability 1/2, shift it at random, return `[image, channel, row, column]`."""
    count, size = images.shape[:2]
    corner = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = corner + torch.arange(size)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    padded = pad(normalise(images), (0, 0, SHIFT, SHIFT, SHIFT, SHIFT))
    image = torch.arange(count)[:, None, None]
    return padded[image, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of images whose largest logit is their label."""
    model.eval()
    predicted = [model(normalise(part).permute(0, 3, 1, 2)).argmax(1) for part in images.split(500)]
    return float((torch.cat(predicted) == labels).double().mean())


def train(
    images: Tensor, labels: Tensor, settings: dict[str, Any], checkpoint: Path, resume: bool
) -> tuple[Any, float]:
    """Return the trained model and the seconds it took, with a checkpoint after each epoch.

    Order and augmentation depend on (seed, epoch) alone, so a resumed run repeats an uninterrupted one.
    """
    seed, epochs = settings["seed"], settings["epochs"]
    steps = len(images) // BATCH_SIZE
    torch.manual_seed(seed)
    model = build_model(int(labels.max()) + 1).train()
    optimizer = create_optimizer_v2(model, "adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    length = {"num_epochs": epochs, "warmup_epochs": epochs // 10, "step_on_epochs": False, "updates_per_epoch": steps}
    scheduler: Any = create_scheduler_v2(optimizer, "cosine", min_lr=1e-5, **length)[0]
    first, seconds = 0, 0.0
    if resume:
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise typer.BadParameter(f"{checkpoint} belongs to {state['settings']}, this run is {settings}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        first, seconds = state["epoch"], state["seconds"]
        scheduler.step_update(first * steps)
    for epoch in range(first, epochs):
        start, loss_sum, correct = time.perf_counter(), 0.0, 0
        epoch_seed = np.random.SeedSequence([seed, epoch]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(epoch_seed))
        batches = torch.randperm(len(images), generator=generator)[: steps * BATCH_SIZE].view(steps, BATCH_SIZE)
        for step, index in enumerate(batches, start=epoch * steps + 1):
            logits = model(augment(images[index], generator))
            loss = cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            scheduler.step_update(step)
            loss_sum += loss.item()
            correct += int((logits.argmax(1) == labels[index]).sum())
        took = time.perf_counter() - start
        seconds += took
        figures = (epoch + 1, epochs, loss_sum / steps, 100 * correct / batches.numel(), took)
        log.info("epoch %d/%d: loss %.4f, train accuracy %.2f%%, %.0f s", *figures)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        buffer = io.BytesIO()
        torch.save(state | {"epoch": epoch + 1, "seconds": seconds, "settings": settings}, buffer)
        replace_file(checkpoint, buffer.getvalue())
    return model, seconds


def write_model(folder: Path, model: nn.Module, names: list[str], facts: dict[str, str]) -> None:
    """Write float16 weights, with facts as their metadata, and the config from which timm rebuilds the network."""
    tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    replace_file(folder / "model.safetensors", safetensors.torch.save(tensors, {"format": "pt", **facts}))
    pretrained = {"input_size": [3, 32, 32], "fixed_input_size": True, "crop_pct": 1.0, "interpolation": "bicubic"}
    pretrained |= {"mean": MEAN, "std": STD, "num_classes": len(names), "label_names": names, "license": "apache-2.0"}
    pretrained |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    config = {"architecture": ARCHITECTURE, "num_classes": len(names), "num_features": MODEL_ARGS["embed_dim"]}
    config |= {"global_pool": MODEL_ARGS["global_pool"], "model_args": MODEL_ARGS, "pretrained_cfg": pretrained}
    replace_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


CARD = """\
---
license: apache-2.0
library_name: timm
tags: [image-classification]
---
# The small ViT inside attnlens

A plain vision transformer for 32 x 32 images: width 96, depth 6, 3 heads, patch 4, global average pooling, no class
token, fixed 2-D sin-cos position embedding. attnlens analyses it where no model is named and no network is at hand.

    timm.create_model("local-dir:attnlens/embedded", pretrained=True)

| | |
| --- | --- |
{rows}

The accuracy is that of this float16 file, loaded back through timm. It belongs to one run and its last epoch; nothing
is selected on the test images.

What may be claimed: these are weights from short ordinary training (AdamW, cosine schedule, flips and shifts) that
starts from timm's default initialisation, and their attention shows what such training leaves in it.

What may not: the images of cifar10-jpeg75 went through JPEG at quality 75, so the accuracy never stands beside a
published CIFAR-10 number. One small network, briefly trained on one seed, is no evidence about large models and no
baseline to beat.
"""


def hardware() -> str:
    """Name the processor of the run."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{torch.get_num_threads()} threads on {found[1] if found else platform.machine()}, float32, no GPU"


def main(
    *,
    data: Annotated[Path, typer.Option(exists=True, help="cifar10-jpeg75.tar.xz, or the folder it unpacks to.")],
    work: Annotated[Path, typer.Option(help="Folder outside the repository for the checkpoint.")],
    output: Annotated[Path, typer.Option(help="Folder that receives the model.")] = Path("attnlens/embedded"),
    epochs: Annotated[int, typer.Option(min=1)] = 12,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    cache: Annotated[Path | None, typer.Option(help="File that keeps the decoded images (.npz).")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --work.")] = False,
) -> None:
    """Pre-train the embedded ViT and write it as a timm model folder."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(2)
    set_fused_attn(False)  # at 64 tokens torch's fused attention is slower on a CPU
    arrays = load_arrays(data, cache)
    pixels = hashlib.sha256(arrays["train_images"].tobytes() + arrays["test_images"].tobytes()).hexdigest()
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("t")}
    settings = {"epochs": epochs, "seed": seed, "decoded": pixels}
    images, labels = tensors["train_images"], tensors["train_labels"]
    model, seconds = train(images, labels, settings, work / "checkpoint.pt", resume)

    names = arrays["names"].tolist()
    write_model(work / "float16", model, names, {})
    stored = timm.create_model(f"local-dir:{work / 'float16'}", pretrained=True)
    share = accuracy(stored, tensors["test_images"], tensors["test_labels"])
    place = "--data ../shared/data/cifar10-jpeg75.tar.xz --work ../pretrain"
    versions = {"torch": torch.__version__, "timm": timm.__version__, "safetensors": safetensors.__version__}
    facts = {
        "architecture": f"{ARCHITECTURE} with {json.dumps(MODEL_ARGS)}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "test accuracy": f"{100 * share:.2f}% of n = {len(tensors['test_images']):,} test images",
        "data": f"cifar10-jpeg75, {len(images):,} training images",
        "data sha256": str(arrays["source"]),
        "sha256 of the decoded training, then test images": pixels,
        "command": f"python scripts/pretrain_embedded.py {place} --epochs {epochs} --seed {seed}",
        "seed": str(seed),
        "epochs": str(epochs),
        "training time": f"{seconds / 60:.0f} minutes",
        "hardware": hardware(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "licence of the weights": "Apache-2.0",
    }
    write_model(output, model, names, facts)
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    replace_file(output / "README.md", CARD.format(rows=rows).encode())
    log.info("test accuracy %s, written to %s", facts["test accuracy"], output)


if __name__ == "__main__":
    typer.run(main)
