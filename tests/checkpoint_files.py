"""Small vision transformers and the files that training leaves of them."""

import timm
import torch

import attnlens

TINY = "vit_tiny_patch16_224"
SMALL = {"depth": 2, "img_size": 32, "num_classes": 5}


def vit(seed=0):
    torch.manual_seed(seed)
    return timm.create_model(TINY, **SMALL)


def state(seed=0):
    return vit(seed).state_dict()


def prefixed(tensors, prefix):
    return {prefix + name: value for name, value in tensors.items()}


def saved(folder, content, name="x.pth"):
    torch.save(content, folder / name)
    return folder / name


def alphas(source, **options):
    """Return every alpha, read by names unless something else is asked for."""
    options = options or {"num_heads": 3}
    return [row["alpha"] for row in attnlens.inspect(source, fold="raw", **options).stats.records()]


def plain_alphas(folder):
    """Return what files of the two networks alone give."""
    return [alphas(saved(folder, state(seed), f"plain{seed}.pth")) for seed in (0, 1)]


def projections(tensors):
    return [name for name in tensors if name.endswith(("qkv.weight", "attn.proj.weight"))]
