"""Valid files of every format, small: what mutations start from."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import tarfile
import tempfile
import zipfile
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from attnlens import fit_params
from attnlens.scans.store import Store
from attnlens.scans.worker import Settings, measure
from attnlens.state import DIGEST, sealed
from benchmarks.trust.guard import Case
from benchmarks.trust.readers import CONFIG, SCANNED, loaded_stack

MODEL_ARGS = {
    "img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2, "num_classes": 3,
}  # fmt: skip
TIMM = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "model_args": MODEL_ARGS}
CONVNEXT = {"architecture": "convnext_atto", "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]}}
TRANSFORMERS = {
    "model_type": "vit",
    "architectures": ["ViTModel"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
}
GEMMA = {
    "model_type": "gemma2",
    "architectures": ["Gemma2ForCausalLM"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "head_dim": 4,
    "query_pre_attn_scalar": 16,
}


def state_file(data: dict[str, Any]) -> bytes:
    """Return a JSON file of state with a digest that is right."""
    return json.dumps(sealed({name: value for name, value in data.items() if name != DIGEST})).encode()


def summary_file(data: dict[str, Any], results: bytes) -> bytes:
    """Return a summary that names its results, with a digest that is right."""
    return state_file({**data, "files": {"results.jsonl": hashlib.sha256(results).hexdigest()}})


@cache
def scan_folder() -> dict[str, bytes]:
    """Return the folder of a scan of the shipped network."""
    result = measure(asdict(SCANNED), asdict(Settings()), 1)
    with tempfile.TemporaryDirectory() as place:
        Store(Path(place), Settings()).save(SCANNED, result)
        return {f"models/{path.name}": path.read_bytes() for path in Path(place, "models").iterdir()}


@cache
def timm_state():
    """Return the weights of a ViT of width 8 and two layers."""
    return _state(_network(TIMM))


@cache
def convnext_state():
    """Return the weights of a ConvNeXt of four depthwise layers and no attention."""
    return _state(_network(CONVNEXT))


def _network(config):
    import timm
    import torch

    torch.manual_seed(0)
    return timm.create_model(config["architecture"], **config["model_args"])


def _state(model):
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def _layers(templates: dict[str, tuple[int, ...]]):
    import torch

    draw = torch.Generator().manual_seed(0)
    return {
        name.format(layer): torch.randn(shape, generator=draw)
        for layer in range(2)
        for name, shape in templates.items()
    }


@cache
def transformers_state():
    """Return the attention weights of a transformers ViT."""
    at = "encoder.layer.{}."
    roles = [f"attention.attention.{role}" for role in ("query", "key", "value")] + ["attention.output.dense"]
    weights = {f"{at}{role}.weight": (8, 8) for role in roles} | {f"{at}{role}.bias": (8,) for role in roles}
    return _layers(weights | {f"{at}layernorm_before.weight": (8,), f"{at}layernorm_before.bias": (8,)})


@cache
def gemma_state():
    """Return the attention weights of a Gemma 2 with one key head for two query heads."""
    at = "model.layers.{}."
    shapes = {"q_proj": (8, 8), "k_proj": (4, 8), "v_proj": (4, 8), "o_proj": (8, 8)}
    weights = {f"{at}self_attn.{role}.weight": shape for role, shape in shapes.items()}
    return _layers(weights | {f"{at}input_layernorm.weight": (8,)})


def safetensors(state, metadata=None) -> bytes:
    """Return a safetensors file."""
    from safetensors.torch import save

    return save(dict(state), metadata)


def pth(state, *, legacy: bool = False) -> bytes:
    """Return what `torch.save` writes."""
    import torch

    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def training(state):
    """Return what a training script saves: two networks, and objects of which only the names are read."""
    import argparse
    import collections
    from pathlib import PurePosixPath

    extra = {"args": argparse.Namespace(lr=0.1, out=PurePosixPath("runs")), "best": np.float64(70.1)}
    moments = {"state": {0: {"exp_avg": next(iter(state.values()))}}}
    return {"model": state, "model_ema": dict(state), "seen": collections.Counter("ab"), "optimizer": moments, **extra}


def made(state):
    """Return weights stored as codes with scales, as g and v, under a mask, and beside an adapter with its scale."""
    import torch

    found = dict(state)
    for number, name in enumerate(n for n in state if n.endswith("weight") and state[n].ndim == 2):
        weight, module = found.pop(name), name.removesuffix("weight")
        found |= (
            {name: (20 * weight).to(torch.int8), f"{module}weight_scale": torch.full((8, 1), 0.05)},
            {f"{name}_g": torch.ones(8, 1), f"{name}_v": weight},
            {f"{name}_orig": weight, f"{name}_mask": torch.ones(8, 8)},
            {
                name: weight,
                f"{module}lora_A": torch.ones(2, 8),
                f"{module}lora_B": torch.ones(8, 2),
                f"{module}alpha": torch.tensor(2.0),
            },
        )[number % 4]
    return found


@cache
def scripted() -> bytes:
    """Return a TorchScript archive of a module with attention's names, scripted from its source."""
    import warnings

    import torch

    holder = torch.nn.Module()
    holder.attn = torch.nn.Module()
    for role in ("q", "k", "v", "o"):
        setattr(holder.attn, role, torch.nn.Linear(8, 8))
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to replace TorchScript; people's files stay
        torch.jit.save(torch.jit.script(holder), buffer)
    return buffer.getvalue()


def npz(state, *, compressed: bool = False) -> bytes:
    """Return a numpy archive."""
    buffer = io.BytesIO()
    save = np.savez_compressed if compressed else np.savez
    save(buffer, **{name: value.numpy() for name, value in state.items()})
    return buffer.getvalue()


def image(number: int, kind: str = "PNG", size: int = 8) -> bytes:
    """Return a small image of noise."""
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


KINDS = ("png", "jpeg", "bmp", "ppm", "webp")


def images() -> dict[str, bytes]:
    """Return the files of a data set of two classes, every format among them."""
    return {f"{name}/{i}.{kind}": image(i + 9 * j, kind.upper()) for j, name in enumerate(("cat", "dog")) for i, kind in enumerate(KINDS)}  # fmt: skip  # noqa: E501


def tar(files: dict[str, bytes]) -> bytes:
    """Return an archive of files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def record(arm: str, seed: int, epoch: int, **changes) -> dict:
    """Return one evaluation of a run as `train-compare` writes it."""
    fits = {"qk_alpha": [0.5, 0.6], "qk_beta": [0.1, 0.2], "ov_alpha": [0.3, 0.4], "ov_beta": [-0.1, 0.0]}
    structure = {"raw": fits, "effective": fits}
    return {
        "arm": arm,
        "seed": seed,
        "data_seed": seed,
        "init_seed": seed,
        "lr": 1e-3,
        "tuning": False,
        "epoch": epoch,
        "status": "finished" if epoch == 2 else "running",
        "accuracy": 0.1 * epoch + 0.01 * seed,
        "test_loss": 2.0,
        "train_loss": 2.1,
        "images_seen": 30 * epoch,
        "effective_epochs": epoch,
        "structure": structure,
        "train_seconds": 1.5,
        "models_in_stack": 1,
        "streams": [f"{seed}{epoch}"],
        "time": "2025-01-01T00:00:00",
        "provenance": {"device": "cpu", "command": "attnlens train-compare", "versions": {"torch": "2"}},
        **changes,
    }


@cache
def results() -> dict[str, bytes]:
    """Return the files of a results folder: three runs that have ended and one on its way."""
    from attnlens.training.results import results_lines, summarise

    runs = {
        f"{arm}-{seed}": [record(arm, seed, epoch) for epoch in range(3)]
        for arm, seed in (("default", 0), ("mimetic", 0), ("mimetic", 1))
    }
    config = {"sha256": CONFIG.sha256(), **json.loads(CONFIG.model_dump_json())}
    stack = loaded_stack()
    state = {
        "config": CONFIG.sha256(),
        "unit": ["default-1"],
        "epoch": 1,
        "step": 0,
        "seconds": 1.0,
        "streams": {1: ["10"]},
        "records": json.dumps([[record("default", 1, 0)]]),
        "stack": stack.snapshot(),
    }
    return {
        "config.json": json.dumps(config).encode(),
        "results.jsonl": (lines := results_lines(CONFIG, runs).encode()),
        "summary.json": summary_file(summarise(CONFIG, runs).to_json(), lines),
        "checkpoints/default-1.pt": pth(state),
        **{
            f"runs/{name}.json": state_file({"config": CONFIG.sha256(), "records": lines})
            for name, lines in runs.items()
        },
    }


@cache
def params() -> bytes:
    """Return a parameter file, of the tiny ViT's two layers and the ConvNeXt's four."""
    filters = {**CONVNEXT, "model_args": {**CONVNEXT["model_args"], "kernel_sizes": 3}}
    return fit_params(_network(TIMM), _network(filters)).to_json().encode()


@cache
def decoded() -> bytes:
    """Return a decoded data set as the cache keeps it."""
    from attnlens.training.data.cache import Decoded, write_decoded

    pixels, labels = np.arange(8 * 3 * 4 * 4, dtype=np.uint8).reshape(8, 3, 4, 4), np.arange(8) % 2
    buffer = io.BytesIO()
    write_decoded(buffer, Decoded(pixels[:6], labels[:6], pixels[6:], labels[6:], ("cat", "dog"), {}, ""))
    return buffer.getvalue()


def index(state, kind: str) -> dict[str, bytes]:
    """Return a sharded model folder of transformers, a shard a layer."""
    stem, write = ("model.safetensors", safetensors) if kind == "safetensors" else ("pytorch_model.bin", pth)
    shards = [f"{stem.partition('.')[0]}-{i + 1:05}-of-00002.{kind}" for i in range(2)]
    place = {name: shards["layer.1." in name] for name in state}
    files = {shard: write({name: state[name] for name in state if place[name] == shard}) for shard in shards}
    listing = json.dumps({"metadata": {"total_size": 1}, "weight_map": place}).encode()
    return {"config.json": json.dumps(TRANSFORMERS).encode(), f"{stem}.index.json": listing, **files}


def packed_cases(state) -> list[Case]:
    """Return archives around a weight file, and compressed ones."""
    inside = {"run/model.safetensors": safetensors(state), "run/notes.txt": b"some words"}
    folder = {"m/model.safetensors": safetensors(state), "m/config.json": json.dumps(TRANSFORMERS).encode()}
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in folder.items():
            archive.writestr(name, content)
    found = {
        "weights.tar": tar(inside),
        "weights.tar.gz": gzip.compress(tar(folder)),
        "weights.tar.xz": lzma.compress(tar(inside)),
        "weights.zip": zipped.getvalue(),
        "model.pth.bz2": bz2.compress(pth(state)),
        "model.safetensors.xz": lzma.compress(safetensors(state)),
    }
    return [Case("packed", name, {name: content}, name) for name, content in found.items()]


def valid() -> list[Case]:
    """Return a valid case of every kind of every format."""
    timm, hf = timm_state(), transformers_state()
    named = {"architecture": TIMM["architecture"], "model_args": json.dumps(MODEL_ARGS)}
    config = json.dumps(TIMM).encode()
    plain, packed = tar(images()), {"gz": gzip.compress, "xz": lzma.compress}
    return [
        Case("safetensors", "named", {"model.safetensors": safetensors(timm, named)}, "model.safetensors"),
        Case("safetensors", "bare", {"bare.safetensors": safetensors(hf)}, "bare.safetensors"),
        Case("pth", "state dict", {"model.pth": pth(hf)}, "model.pth"),
        Case("pth", "nested", {"model.bin": pth({"state_dict": hf, "epoch": 3})}, "model.bin"),
        Case("pth", "training checkpoint", {"last.pth.tar": pth(training(hf))}, "last.pth.tar"),
        Case("pth", "TorchScript", {"scripted.pt": scripted()}, "scripted.pt"),
        Case("pth", "codes and adapters", {"model.pth": pth(made(hf))}, "model.pth"),
        Case("safetensors", "two networks", {"two.safetensors": safetensors({f"{side}.{n}": v.clone() for side in "ab" for n, v in hf.items()})}, "two.safetensors"),  # noqa: E501
        Case("legacy pickle", "training checkpoint", {"model.pth": pth(training(hf), legacy=True)}, "model.pth"),
        Case("legacy pickle", "state dict", {"model.pth": pth(hf, legacy=True)}, "model.pth"),
        Case("npz", "stored", {"model.npz": npz(hf)}, "model.npz"),
        Case("npz", "compressed", {"model.npz": npz(hf, compressed=True)}, "model.npz"),
        *packed_cases(hf),
        Case("timm folder", "safetensors", {"config.json": config, "model.safetensors": safetensors(timm)}),
        Case("timm folder", "depthwise filters", {"config.json": json.dumps(CONVNEXT).encode(), "model.safetensors": safetensors(convnext_state())}),  # noqa: E501
        Case("timm folder", "bin", {"config.json": config, "pytorch_model.bin": pth(timm)}),
        Case("transformers folder", "vit", {"config.json": json.dumps(TRANSFORMERS).encode(), "model.safetensors": safetensors(hf)}),  # noqa: E501
        Case("transformers folder", "gemma2", {"config.json": json.dumps(GEMMA).encode(), "model.safetensors": safetensors(gemma_state())}),  # noqa: E501
        Case("shard index", "safetensors", index(hf, "safetensors")),
        Case("shard index", "bin", index(hf, "bin")),
        Case("params.json", "fitted", {"params.json": params()}, "params.json"),
        Case("results folder", "three of four runs", results()),
        Case("scan folder", "one model", scan_folder()),
        Case("image folder", "five formats", images()),
        Case("image tar", "plain", {"data.tar": plain}, "data.tar"),
        *(Case("image tar", end, {f"data.tar.{end}": pack(plain)}, f"data.tar.{end}") for end, pack in packed.items()),
        Case("text folder", "two files", {"a.txt": b"some words\n" * 9, "b/c.md": b"and others\n" * 9}),
        Case("decoded cache", "whole", {"cache.npz": decoded()}, "cache.npz"),
    ]  # fmt: skip
