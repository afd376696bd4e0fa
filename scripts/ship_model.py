"""Make the small vision transformer inside the package from the comparison that trained it.

    attnlens train-compare --dataset ../shared/data/cifar10-jpeg75.tar.xz --arms default --seeds 1 \
        --epochs 80 --lr 2e-3 --weight-decay 0.3 --patch-size 8 --augment flip-randaugment --save-weights -o ../pretrain
    python scripts/ship_model.py ../pretrain --data ../shared/data/cifar10-jpeg75.tar.xz

Writes a timm model folder with float16 weights, measures the accuracy of that file on the test images, and says in the
model card, attnlens/embedded/README.md, what the run gave: command, data, accuracy, n, seed, hardware and versions.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import safetensors.torch
import timm
import torch
import typer

from attnlens.atomic import write_atomic, write_text_atomic
from attnlens.training.config import AUGMENTATIONS, Config, Run
from attnlens.training.data.images import Images
from attnlens.training.data.sources import load_dataset
from attnlens.training.networks.vit import ARCHITECTURE
from attnlens.training.seen import METADATA_KEY, Seen
from attnlens.training.store import Store, stored_config

CARD = """\
---
license: apache-2.0
library_name: timm
tags: [image-classification]
---
# The small ViT inside attnlens

A plain vision transformer for {size} x {size} images: width {width}, depth {depth}, {heads} heads, patch {patch},
global average pooling, no class token, fixed 2-D sin-cos position embedding. attnlens looks at it where no model is
named; nothing needs to be downloaded for that.

    timm.create_model("local-dir:attnlens/embedded", pretrained=True)

| | |
| --- | --- |
{rows}

The accuracy is that of this float16 file, loaded back through timm. It belongs to one run and its last epoch; nothing
is selected on the test images. The training is an ordinary run of `attnlens train-compare` that starts from timm's
default initialisation.

What may be claimed: these are weights from short ordinary training, and their attention shows what such training
leaves in it. The weight decay was chosen high so that the initial noise fades within {epochs} epochs.

What may not: the images of cifar10-jpeg75 went through JPEG at quality 75, so the accuracy never stands beside a
published CIFAR-10 number. One small network, briefly trained on one seed, is no evidence about large models and no
baseline to beat.
"""


@torch.inference_mode()
def accuracy(folder: Path, images: Images, mean: list[float], std: list[float]) -> float:
    """Return the share of test images whose largest logit is their label, by timm's network from its folder."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    scale = [torch.tensor(values)[:, None, None] for values in (mean, std)]
    correct = 0
    for pixels, labels in zip(np.array_split(images.test, 20), np.array_split(images.test_labels, 20), strict=True):
        normalised = (torch.from_numpy(pixels).float() / 255 - scale[0]) / scale[1]
        correct += int((model(normalised).argmax(1).numpy() == labels).sum())
    return correct / len(images.test_labels)


def write_model(folder: Path, weights: Path, config: Config, classes: tuple[str, ...], facts: dict[str, str]) -> None:
    """Write float16 weights, with facts as their metadata, and the config from which timm rebuilds the network."""
    tensors = {name: value.half().contiguous() for name, value in safetensors.torch.load_file(weights).items()}
    content = safetensors.torch.save(tensors, {"format": "pt", **facts})
    write_atomic(folder / "model.safetensors", lambda file: file.write(content))
    size, mean, std = config.network.image_size, config.mean, config.std
    pretrained: dict[str, Any] = {"input_size": [config.network.channels, size, size], "fixed_input_size": True}
    pretrained |= {"crop_pct": 1.0, "interpolation": "bicubic", "mean": mean, "std": std}
    pretrained |= {"num_classes": len(classes), "label_names": classes, "license": "apache-2.0"}
    pretrained |= {"first_conv": "patch_embed.proj", "classifier": "head"}
    arguments = {name: value for name, value in config.network.model_args().items() if name != "num_classes"}
    described = {"architecture": ARCHITECTURE, "num_classes": len(classes), "num_features": config.network.embed_dim}
    described |= {"global_pool": arguments["global_pool"], "model_args": arguments, "pretrained_cfg": pretrained}
    seen = Seen(dataset=config.dataset, sha256=config.data_sha256, classes=classes)
    described |= {METADATA_KEY: [seen.model_dump(mode="json")]}
    write_text_atomic(folder / "config.json", json.dumps(described, indent=2) + "\n")


def main(
    *,
    results: Annotated[Path, typer.Argument(exists=True, help="Folder of the comparison, with its weights.")],
    data: Annotated[Path, typer.Option(exists=True, help="The data set it trained on.")],
    output: Annotated[Path, typer.Option(help="Folder that receives the model.")] = Path("attnlens/embedded"),
) -> None:
    """Write the model folder and its card."""
    stored = stored_config(results) or {}
    config = Config.model_validate({name: value for name, value in stored.items() if name != "sha256"})
    run = Run("default", 0, config.recipe.lr)
    last = Store.open(results, config, resume=True).load_runs()[run.name][-1]
    images = load_dataset(str(data))
    if images.sha256() != config.data_sha256:
        raise typer.BadParameter(f"{data} is not what {results} trained on")
    weights = results / "weights" / f"{run.name}.safetensors"
    write_model(results / "float16", weights, config, images.classes, {})
    share = accuracy(results / "float16", images, config.mean, config.std)
    shape, recipe, made = config.network, config.recipe, last["provenance"]
    arguments = {name: value for name, value in shape.model_args().items() if name != "num_classes"}
    facts = {
        "architecture": f"{ARCHITECTURE} with {json.dumps(arguments)}",
        "parameters": f"{sum(value.numel() for value in safetensors.torch.load_file(weights).values()):,}",
        "test accuracy": f"{100 * share:.2f}% of n = {len(images.test):,} test images",
        "data": f"{config.dataset}, {config.train_items:,} training images",
        "sha256 of the decoded data set": config.data_sha256,
        "command": made["command"].replace(" --resume", ""),
        "recipe": f"AdamW, peak rate {recipe.lr:g}, weight decay {recipe.weight_decay:g}, {recipe.epochs} epochs of "
        f"batches of {recipe.batch_size}, linear warm-up, cosine; {AUGMENTATIONS[recipe.augment]}",
        "seed": f"{config.init_seed} for weights, {config.data_seed} for data",
        "training time": f"{last['train_seconds'] / 60:.0f} minutes",
        "hardware": f"one thread, {made['device']}, {config.precision}"
        if config.device == "cpu"
        else f"{made['device']}, {config.precision}",
        "versions": ", ".join(f"{name} {made['versions'][name]}" for name in ("torch", "timm", "safetensors")),
        "licence of the weights": "Apache-2.0",
    }
    write_model(output, weights, config, images.classes, facts)
    sizes = {"size": shape.image_size, "width": shape.embed_dim, "depth": shape.depth, "heads": shape.num_heads}
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    card = CARD.format(rows=rows, patch=shape.patch_size, epochs=recipe.epochs, **sizes)
    write_text_atomic(output / "README.md", card)
    print(f"test accuracy {facts['test accuracy']}, written to {output}")


if __name__ == "__main__":
    typer.run(main)
