"""Data sets and configurations that are whole and hostile inside: images of every mode, trees, tars, arguments."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tarfile
from functools import cache
from typing import Any

import numpy as np

from benchmarks.trust import built, payloads, seeds

_MODES = ("L", "RGB", "RGBA", "LA", "P", "1", "I;16", "CMYK", "I", "F", "YCbCr")
_SIZES = ((8, 8), (8, 8), (8, 8), (1, 1), (1, 60), (300, 2), (64, 64))
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "img_size": (16, 8, 17, 224, [16, 24], 4096, 1, "16", 16.5, None),
    "patch_size": (8, 4, 1, 16, [8, 4], 3),
    "embed_dim": (8, 6, 7, 2, 1, 4096, 0, -8, "8", [8, 16]),
    "depth": (2, 1, 0, 5, 300, -1, 2.0, True),
    "num_heads": (2, 1, 4, 3, 8, 0, -1, [1, 2]),
    "mlp_ratio": (4.0, 0.0, 1e-9, -1, 100.0, [1, 2]),
    "num_classes": (3, 0, 65536, -1, None),
    "in_chans": (3, 1, 0, 1000),
    "class_token": (True, False, None, 0),
    "global_pool": ("token", "avg", "map", "", "max", "os.system", None),
    "qkv_bias": (True, False, 3),
    "qk_norm": (True, False),
    "init_values": (None, 1e-5, 0.0, "x"),
    "reg_tokens": (0, 4, -1, 65536),
    "dynamic_img_size": (True, False),
    "drop_path_rate": (0.0, 0.1, 1.0, 2.0, -1),
    "norm_layer": ("layernorm", "rmsnorm", "os.system", None, "eval"),
    "act_layer": ("gelu", "silu", "eval", ""),
    "depths": ([1, 1, 1, 1], [2, 1], [], [0, 0, 0, 0], [100] * 4, 3),
    "dims": ([8, 8, 8, 8], [8], [0, 8, 8, 8], [65536] * 4),
    "kernel_sizes": (7, 3, [3, 5, 7, 9], 0, 63),
    "window_size": (7, 0, 1, 999, [2, 2]),
}  # fmt: skip
"""Arguments of networks, and values of and beside their kind."""
_NETWORKS = [
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "cait_xxs24_224",
    "beit_base_patch16_224",
    "mixer_s16_224",
    "levit_128s",
    "xcit_nano_12_p16_224",
    "maxvit_tiny_tf_224",
    "eva02_tiny_patch14_224",
    "convmixer_768_32",
    "resnet18",
    "mobilevit_xxs",
    "coat_tiny",
    "pvt_v2_b0",
    "twins_svt_small",
    "naflexvit_base_patch16_gap",
    "poolformer_s12",
    "tnt_s_patch16_224",
    "volo_d1_224",
    "hiera_tiny_224",
    "vit_relpos_small_patch16_224",
    "regnetx_002",
]


def configured(rng: random.Random) -> dict[str, bytes]:
    """Return a folder of timm's form: arguments that networks have, with odd values, and weights of some of them."""
    if rng.random() < 0.6:
        architecture, arguments, state = seeds.TIMM["architecture"], dict(seeds.MODEL_ARGS), seeds.timm_state()
    else:
        architecture, arguments, state = rng.choice(_NETWORKS), {}, seeds.convnext_state()
    for name in rng.sample(list(_ARGUMENTS), rng.choice((0, 1, 1, 2, 3))):
        arguments[name] = rng.choice(_ARGUMENTS[name])
    config: dict[str, Any] = {"architecture": architecture, "model_args": arguments, "num_classes": 3}
    if rng.random() < 0.4:
        config["pretrained_cfg"] = {
            "tag": rng.choice(payloads.NAMES),
            "input_size": rng.choice(([3, 16, 16], [0], "x", [3, 10**9, 10**9])),
            "mean": [0.5],
            "num_classes": rng.choice((3, -1, 10**9)),
        }
    if rng.random() < 0.2:
        held = {
            f"{prefix}{name}": value
            for prefix in (rng.choice(("module.", "model.", "visual.trunk.")),)
            for name, value in state.items()
        }
        return {"config.json": json.dumps(config).encode(), "pytorch_model.bin": seeds.pth(held)}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": seeds.safetensors(state)}


def transformers(rng: random.Random) -> dict[str, bytes]:
    """Return a folder of a kind of model that is known, of which one or two fields or tensors are odd."""
    config, shapes = built.family(rng)
    shapes = built.spoiled(rng, shapes) if rng.random() < 0.6 else shapes
    section = next((value for value in config.values() if isinstance(value, dict)), config)
    for _ in range(rng.choice((0, 0, 1, 2))):
        name = rng.choice(list(section))
        if name != "model_type":
            section[name] = rng.choice((0, 1, 2, 3, -1, 7, 65536, 10**9, 2.5, None, True, "8", [8], {}, section[name]))
    if rng.random() < 0.3:
        config["architectures"] = rng.choice((["ViTModel"], ["\x1b[2J"], [7], "x", [], payloads.NAMES[:3]))
    if rng.random() < 0.2:
        config["quantization_config"] = {
            "quant_method": rng.choice(("gptq", "awq", "bitsandbytes", "fp8", "x\x1b")),
            "bits": rng.choice((4, 8, 0, 3)),
            "group_size": rng.choice((-1, 0, 8)),
        }
    text = json.dumps(config).encode()
    return {"config.json": text, "model.safetensors": built.safetensors(rng, shapes, {"format": "pt"})}


def shards(rng: random.Random) -> dict[str, bytes]:
    """Return a folder of shards: names that are odd and inside, tensors in two shards or in none."""
    config, shapes = built.family(rng)
    shapes = built.spoiled(rng, shapes)
    names = [f"model-{i + 1:05}-of-00003.safetensors" for i in range(3)]
    if rng.random() < 0.4:
        names[rng.randrange(3)] = rng.choice(
            ("\u00e4 b.safetensors", "-x.safetensors", "a\x1b[2J.safetensors", "x.safetensors.safetensors", "model.pth")
        )
    place = {name: rng.choice(names) for name in shapes}
    parts = {shard: {name: shapes[name] for name in shapes if place[name] == shard} for shard in names}
    way = rng.randrange(8)
    if way == 0:
        place["not.there.weight"] = names[0]
    elif way == 1:
        place[next(iter(place))] = rng.choice(names)
    elif way == 2:
        parts[names[0]] = parts[names[0]] | parts[names[1]]
    elif way == 3:
        place |= {f"x{i}": names[0] for i in range(3000)}
    files = {
        n: built.pth(rng, part) if n.endswith("pth") else built.safetensors(rng, part)
        for n, part in parts.items()
        if part
    }
    index = {"metadata": {"total_size": rng.choice((1, -1, 2**70, "x"))}, "weight_map": place}
    return {
        "config.json": json.dumps(config).encode(),
        "model.safetensors.index.json": json.dumps(index).encode(),
        **files,
    }


def _picture(rng: random.Random) -> tuple[str, bytes]:
    """Return a suffix and an image of any mode, size and format, with odd metadata."""
    from PIL import Image, PngImagePlugin

    width, height = rng.choice(_SIZES)
    draw = np.random.default_rng(rng.getrandbits(32))
    image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
    mode, kind = rng.choice(_MODES), rng.choice(("PNG", "JPEG", "BMP", "PPM", "WEBP", "GIF", "PNG"))
    options: dict[str, Any] = {}
    exif = Image.Exif()
    exif[0x0112] = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 65535))
    exif[0x010E] = "\x1b[2J" * rng.choice((1, 50))
    if rng.random() < 0.4:
        options["exif"] = exif.tobytes() if rng.random() < 0.7 else exif.tobytes()[: rng.randrange(8, 40)]
    if kind in ("GIF", "WEBP", "PNG") and rng.random() < 0.2:
        options |= {
            "save_all": True,
            "append_images": [image.rotate(90, expand=True) if rng.random() < 0.2 else image] * rng.choice((1, 8)),
        }
    if kind == "PNG" and rng.random() < 0.3:
        notes = PngImagePlugin.PngInfo()
        notes.add_text("\x1bk", "\x1b[2J" * 30, zip=rng.random() < 0.5)
        options["pnginfo"] = notes
    if rng.random() < 0.2:
        options["icc_profile"] = rng.randbytes(rng.choice((3, 400)))
    if kind == "PNG" and mode == "P" and rng.random() < 0.5:
        options["transparency"] = rng.choice((0, bytes(range(255))))
    buffer = io.BytesIO()
    try:
        (
            image.convert(mode)
            if mode != "I;16"
            else Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        ).save(buffer, kind, **options)
    except Exception:  # noqa: BLE001  # not every format takes every mode
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
    content = buffer.getvalue()
    if rng.random() < 0.1:
        content = content[: rng.randrange(len(content))] if rng.random() < 0.5 else content + rng.randbytes(50)
    suffix = {"JPEG": "jpg"}.get(kind, kind.lower())
    return rng.choice((suffix, suffix.upper(), suffix, "png")), content


@cache
def _pool(seed: int) -> list[tuple[str, bytes]]:
    rng = random.Random(seed)
    return [_picture(rng) for _ in range(300)]


def pictures(rng: random.Random) -> dict[str, bytes]:
    """Return the files of a data set: classes with odd names, splits, folders around, files that are no images."""
    even = rng.random() < 0.7
    pool = _pool(rng.randrange(10))
    usual = [
        (suffix, held) for suffix, held in pool if held[:4] == b"\x89PNG" and held[16:24] == struct.pack(">II", 8, 8)
    ]
    classes = rng.sample(
        ("cat", "dog", "\u00e4", "=1+1", "-x", "a b", "[bold]", "{x}", "train", "CAT", "z" * 200, "n\u0301"),
        rng.choice((1, 2, 2, 4)),
    )
    around = rng.choice(("", "", "data/", "data/data/"))
    tops = rng.choice((("",), ("",), ("train/", "test/"), ("train/", "val/", "extra/"), ("Train/",), ("test/",)))
    files: dict[str, bytes] = {}
    for top in tops:
        for name in classes:
            for number in range(rng.choice((1, 2, 4))):
                suffix, held = rng.choice(usual or pool) if even else rng.choice(pool)
                deep = rng.choice(("", "", "sub/", "0/1/2/3/"))
                files[f"{around}{top}{name}/{deep}{number}.{suffix}"] = held
    extra = {
        f"{around}readme.txt": b"words",
        f"{around}.hidden.png": b"x",
        f"{around}x.png": seeds.image(1),
        f"{around}cat/empty.png": b"",
        f"{around}cat/eps.png": payloads.EPS,
    }
    for name in rng.sample(list(extra), rng.choice((0, 0, 0, 1, 2))):
        files[name] = extra[name]
    return files


def tar(rng: random.Random) -> tuple[str, bytes]:
    """Return a name and a tar of such a data set: any make, order, members twice, folders, odd headers."""
    members = list(pictures(rng).items())
    if rng.random() < 0.3:
        rng.shuffle(members)
    if rng.random() < 0.2:
        members.append((members[0][0], members[-1][1]))
    form = built.tar_format(rng, [name for name, _ in members])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, held in members:
            member = tarfile.TarInfo(rng.choice(("", "", "./")) + name)
            member.size, member.mtime, member.mode = len(held), rng.choice((0, 2**31)), 0o7777
            if form == tarfile.PAX_FORMAT and rng.random() < 0.2:
                member.pax_headers = rng.choice(
                    ({"comment": "x" * 3000}, {"path": name}, {"size": str(len(held))}, {"SCHILY.xattr.x": "\x1b[2J"})
                )
            archive.addfile(member, io.BytesIO(held))
    way = rng.randrange(5)
    if way < 2:
        return "data.tar", buffer.getvalue()
    pack, end = ((gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz"))[way - 2]
    return f"data.tar.{end}", pack(buffer.getvalue())


def texts(rng: random.Random) -> dict[str, bytes]:
    """Return text files of any bytes and names, without those of value 0."""
    kinds = ("words \n", "\u00e4\u2028\u202e\x1b[2J", "x" * 70)
    files = {}
    for number in range(rng.choice((1, 2, 5))):
        held = (
            rng.choice(kinds).encode() * rng.choice((1, 9, 500))
            if rng.random() < 0.7
            else rng.randbytes(90).replace(b"\0", b"0")
        )
        name = rng.choice(("a", "\u00e4", "sub/b", "-x", "{x}", "[a-z]", "*", "d.d/e"))
        files[f"{name}{number}{rng.choice(('.txt', '.md', '.TXT', '.rst', '.bin'))}"] = held
    return files
