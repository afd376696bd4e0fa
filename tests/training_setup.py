"""A comparison small enough to run in a second: digits, a two-layer ViT of width 24 as the source."""

import torch
from safetensors.torch import save_file

from attnlens.training.comparison import train_compare
from attnlens.training.config import Config, Recipe
from attnlens.training.networks.vit import ViT

SHAPE = ViT(image_size=8, patch_size=4, channels=1, classes=10, embed_dim=24, depth=2, num_heads=2, mlp_ratio=2.0)


def write_source(folder):
    """Write a "pre-trained" model of another patch size, channel count and class count, weights enlarged at random."""
    shape = SHAPE.model_copy(update={"image_size": 16, "channels": 3, "classes": 7})
    generator = torch.Generator().manual_seed(1)
    state = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in shape.build(5).state_dict().items()
    }
    path = folder / "source.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path, shape.exported())
    return path


def small(source, **changes):
    """Return the arguments of a run that takes a second or two."""
    given = {
        "dataset": "digits",
        "model": str(source),
        "arms": ("default", "mimetic"),
        "seeds": 2,
        "epochs": 3,
        "batch_size": 40,
        "patch_size": 4,
        "train_images": 120,
        "test_images": 60,
        "augment": "flip-shift",
        "device": "cpu",
    }
    return {**given, **changes}


def compare(source, output, *, options=None, **how):
    """Run a small comparison."""
    return train_compare(**(options or small(source)), output=output, **{"quiet": True, "command": "test", **how})


def config(**changes):
    """Return a configuration for the engine alone."""
    recipe = {"epochs": 2, "batch_size": 6, "lr": 1e-3, **changes.pop("recipe", {})}
    given = {
        "dataset": "none",
        "data_sha256": "",
        "train_items": 30,
        "test_items": 7,
        "mean": [0.3],
        "std": [0.4],
        "source": {},
        "params_sha256": "",
        "network": SHAPE,
        "recipe": Recipe(**recipe),
        "arms": ["default", "mimetic"],
        "contrasts": [("mimetic", "default")],
        "seeds": 2,
        "data_seed": 0,
        "init_seed": 0,
        "target": 0.5,
        "eval_every": 1,
        "lr_grid": [],
        "tune_seeds": 1,
        "device": "cpu",
        "precision": "float32",
        "compiled": False,
        "stack": 1,
    }
    return Config(**{**given, **changes})
