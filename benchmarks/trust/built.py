"""Weight files that are whole and hostile inside: names, shapes, types, orders and values that a parser lets pass.

A mutation breaks most files where they are parsed. Here a file is written from a description that was changed before it
was written, so that what is wrong lies behind the parser: in the tree of names, in what the layers are taken for, in
what is computed of the numbers.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np

from benchmarks.trust import payloads, seeds
from benchmarks.trust.pickled import program, tree

Shapes = dict[str, tuple[int, ...]]

_PLAIN = (
    ("blocks.{}.attn.", ("qkv.weight", "proj.weight")),
    ("encoder.{}.", ("attn.in_proj_weight", "attn.out_proj.weight")),
    ("layers.{}.self_attn.", ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")),
    ("h.{}.attn.", ("c_attn.weight", "c_proj.weight")),
    ("net.{}.", ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")),
    ("stage.{}.", ("conv_dw.weight", "dwconv.weight")),
    ("{}.attention.", ("query.weight", "key.weight", "value.weight", "dense.weight")),
)
"""Names as networks have them, layers and roles."""
_LAYERS = ("007", "-1", "\u0663", "\u00b2", "9" * 30, "2147483648", "1e3", "0x1", "", " ", "1.5", "{head}")
"""What stands where the number of a layer is expected."""
_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
"""Bytes of a number, by the types that safetensors knows."""
_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}  # fmt: skip
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": ">i2", "U8": "|u1", "BOOL": "|b1", "C64": "<c8", "BF16": "|V2"}  # fmt: skip  # noqa: E501


@cache
def _families() -> list[tuple[str, Any]]:
    from attnlens.models.transformers.describe import families

    return [(name, stack) for name, family in sorted(families().items()) for stack in family.stacks]


_ORDINARY = bytes((*range(0x30, 0x40), *range(0xB0, 0xC0)))
"""Bytes of which numbers of any width are neither large nor small."""


def family(rng: random.Random) -> tuple[dict[str, Any], Shapes]:
    """Return the configuration of a kind of model that is known, and the shapes of the tensors it names."""
    name, stack = rng.choice(_families())
    heads, width, depth = rng.choice(((2, 8, 2), (4, 8, 1), (2, 12, 3), (3, 9, 2), (1, 5, 2)))
    kv = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    depths = (stack.depth,) if isinstance(stack.depth, str) else stack.depth or ()
    sizes = {stack.heads: heads, stack.width: width, stack.kv_heads: kv, **dict.fromkeys(depths[:1], depth)}
    sizes |= {**stack.defaults, **stack.only_if, **dict.fromkeys(stack.flags_set, rng.random() < 0.5)}
    config = {"model_type": name, **({stack.section: sizes} if stack.section else sizes)}
    rows, shapes = {"q": width, "k": kv * (width // heads), "v": kv * (width // heads), "o": width}, {}
    prefix, biased = rng.choice(("", "", "model.", "transformer.")) + stack.within, rng.random() < 0.6
    for layer in range(depth):
        names = {
            role: template.format(layer=layer, before=layer - 1, last=depth - 1)
            for role, template in stack.projections().items()
        }
        for tensor in names.values():
            out = sum(rows[other] for other, same in names.items() if same == tensor)
            shapes[prefix + tensor] = (width, out) if stack.stored_in_out else (out, width)
            if biased and tensor.endswith("weight"):
                shapes[prefix + tensor.removesuffix("weight") + "bias"] = (out,)
        for norm in (stack.norm, stack.first_norm, stack.kv_norm, stack.layer_scale):
            if norm:
                shapes[prefix + norm.format(layer=layer, before=layer - 1, last=depth - 1)] = (width,)
    return config, shapes


def plain(rng: random.Random) -> Shapes:
    """Return shapes of attention or filters under one of the usual names."""
    path, roles = rng.choice(_PLAIN)
    width, depth = rng.choice((6, 8, 10)), rng.choice((1, 2, 2, 5))
    widths = {"qkv.weight": 3 * width, "attn.in_proj_weight": 3 * width, "c_attn.weight": width}
    found: Shapes = {}
    for layer in range(depth):
        for role in roles:
            shape = (width, 1, 3, 3) if "dw" in role else (widths.get(role, width), width)
            shape = (width, 3 * width) if role == "c_attn.weight" else shape
            found[path.format(layer) + role] = shape
            if rng.random() < 0.3:
                found[(path.format(layer) + role).replace("weight", "bias")] = shape[:1]
    return found


def spoiled(rng: random.Random, shapes: Shapes) -> Shapes:
    """Return names and shapes changed in one or two ways that no parser minds."""
    for _ in range(rng.choice((0, 0, 1, 1, 2))):
        names = list(shapes)
        name = rng.choice(names)
        shape, way = shapes[name], rng.randrange(12)
        if way == 0:
            shapes[name] = rng.choice(
                (
                    shape[::-1],
                    (*shape, 1),
                    (1,) * rng.choice((33, 60)),
                    (0, *shape),
                    (),
                    (math.prod(shape),),
                    (*shape, 0, 2**40),
                )
            )
        elif way == 1:
            shapes[name] = tuple(max(0, size + rng.choice((-1, 1, 7))) for size in shape)
        elif way == 2:
            del shapes[name]
        elif way == 3:  # the number of a layer
            odd = rng.choice(_LAYERS)
            shapes = {".".join(odd if part == "0" else part for part in n.split(".")): s for n, s in shapes.items()}
        elif way == 4:
            prefix = rng.choice((*payloads.NAMES, "a." * rng.choice((70, 1000)), "module.", "_orig_mod.", "\u00e9."))
            shapes = {f"{prefix}{n}": s for n, s in shapes.items()}
        elif way == 5:  # two networks of the same form
            shapes = {f"{side}.{n}": s for side in ("a", rng.choice(("b", "", "a.a"))) for n, s in shapes.items()}
        elif way == 6:  # weights that are stored in parts
            shapes |= _companions(rng, name, shape)
        elif way == 7:
            shapes |= {f"{name}.{n}": s for n, s in list(shapes.items())[:3]}  # a tensor and a module of one name
        elif way == 8:
            many = rng.choice((100, 1500))
            shapes |= {name.replace("0", str(number), 1): (0,) * len(shape) for number in range(many)}
        elif way == 9:
            shapes[name.replace("weight", rng.choice(("bias", "weight_v", "q_norm.weight", "scale")))] = shape
        elif way == 10:
            shapes = dict(rng.sample(list(shapes.items()), len(shapes)))
        else:
            shapes = {n.upper() if n == name else n: s for n, s in shapes.items()}
        shapes = shapes or {name: shape}
    return shapes


def _companions(rng: random.Random, name: str, shape: tuple[int, ...]) -> Shapes:
    """Return tensors beside a weight by which it is scaled, masked, normalised or adapted, or that lie about it."""
    stem, out, inner = name.removesuffix("weight"), shape[0] if shape else 1, shape[-1] if shape else 1
    rank = rng.choice((0, 1, 2, 64))
    kinds: tuple[Shapes, ...] = (
        {f"{stem}weight_scale": rng.choice(((out, 1), (1,), (), (out + 1, 1), (0,)))},
        {f"{name}_g": (out, 1), f"{name}_v": shape},
        {f"{name}_orig": shape, f"{name}_mask": rng.choice((shape, shape[::-1], (1,)))},
        {f"{stem}lora_A.default.weight": (rank, inner), f"{stem}lora_B.default.weight": (out, rank)},
        {f"{stem}lora_A": (rank, inner), f"{stem}lora_B": (out, rank + 1), f"{stem}alpha": ()},
        {f"{stem}parametrizations.weight.original0": (out, 1), f"{stem}parametrizations.weight.original1": shape},
        {f"{stem}qweight": (inner // 2, out), f"{stem}qzeros": (1, out), f"{stem}scales": (1, out)},
        {f"{name}.absmax": (out,), f"{name}.quant_map": (16,)},
    )
    return rng.choice(kinds)


LONGEST = 1 << 20
"""Bytes that are written of a tensor: a shape may claim more than a disk holds, and its file is cut there."""


def content(rng: random.Random, size: int) -> bytes:
    """Return so many bytes of numbers, `LONGEST` at most: ordinary, or, once in forty times, odd ones."""
    size = min(size, LONGEST)
    if rng.random() < 0.975:
        return bytes(rng.choices(_ORDINARY, k=size))
    if rng.random() < 0.2:
        return rng.randbytes(size)
    piece = rng.choice((b"\0", b"\xff", b"\x00\x00\xc0\x7f", b"\xff\xff\x7f\x7f", b"\x01\0\0\0"))
    return (piece * (size // len(piece) + 1))[:size]


def safetensors(rng: random.Random, shapes: Shapes, metadata: dict[str, str] | None = None) -> bytes:
    """Return a file whose header and offsets are in order."""
    usual = rng.choice(("F32", "F32", "F16", "BF16", "F64"))
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    parts, begin = [], 0
    for name in rng.sample(list(shapes), len(shapes)):
        kind = usual if rng.random() < 0.98 else rng.choice(list(_SIZES))
        size = math.prod(shapes[name]) * _SIZES[kind]
        header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [begin, begin + size]}
        parts.append(content(rng, size))
        begin += size
    order = rng.sample(list(header), len(header))  # of the header: another one than that of the bytes
    text = json.dumps({name: header[name] for name in order}, ensure_ascii=rng.random() < 0.5).encode(
        "utf-8", "replace"
    )
    text += b" " * rng.choice((0, -len(text) % 8, 64))
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def tensors(rng: random.Random, shapes: Shapes) -> dict[str, Any]:
    """Return tensors of these shapes: of odd types, views of each other, transposed, empty, one number expanded."""
    import torch

    found, usual = {}, rng.choice(("F32", "F32", "F16", "BF16", "F64"))
    for name, shape in shapes.items():
        kind = usual if rng.random() < 0.98 else rng.choice(list(_TORCH))
        held = torch.frombuffer(bytearray(content(rng, math.prod(shape) * _SIZES[kind]) or bytes(8)), dtype=torch.uint8)
        try:
            value = (
                held.view(getattr(torch, _TORCH[kind]))[: math.prod(shape)].view(shape)
                if math.prod(shape)
                else torch.empty(shape, dtype=getattr(torch, _TORCH[kind]))
            )
        except RuntimeError:  # more axes, or longer empty ones, than a tensor has
            continue
        way = rng.random()
        if way < 0.05 and value.ndim == 2:
            value = value.T.contiguous().T
        elif way < 0.1 and found:
            value = rng.choice(list(found.values()))
        elif way < 0.13 and value.ndim == 2 and value.numel():
            value = value[:1].expand(value.shape)
        found[name] = value
    return found


def pth(rng: random.Random, shapes: Shapes, *, legacy: bool = False) -> bytes:
    """Return what `torch.save` writes of weights among whatever else training scripts keep."""
    whole = seeds.pth(tree(rng, tensors(rng, shapes)), legacy=legacy)
    if legacy or rng.random() < 0.5:
        return whole
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:  # another pickle in front of the same storages
        for name, inner in members:
            archive.writestr(name, program(rng, inner) if name.endswith("/data.pkl") else inner)
    return buffer.getvalue()


def npz(rng: random.Random, shapes: Shapes) -> bytes:
    """Return a numpy archive of arrays of any plain type, order and version of the header."""
    from numpy.lib import format as stored

    buffer = io.BytesIO()
    usual, method = rng.choice(("F32", "F64", "F16", "BF16")), rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, shape in shapes.items():
            kind = usual if rng.random() < 0.98 else rng.choice(list(_NUMPY))
            fortran = rng.random() < 0.2
            member = io.BytesIO()
            write = stored.write_array_header_1_0 if rng.random() < 0.8 else stored.write_array_header_2_0
            write(member, {"descr": _NUMPY[kind], "fortran_order": fortran, "shape": shape})
            member.write(content(rng, math.prod(shape) * np.dtype(_NUMPY[kind]).itemsize))
            key = rng.choice((name, name, name.replace(".", "/")))
            archive.writestr(
                f"{key.replace(chr(0), '0').encode('utf-8', 'replace').decode()[:60_000]}.npy", member.getvalue()
            )
    return buffer.getvalue()


def weights(rng: random.Random, shapes: Shapes) -> tuple[str, bytes]:
    """Return a suffix and a weight file of one of the formats."""
    kinds: dict[str, Callable[[random.Random, Shapes], bytes]] = {"safetensors": safetensors, "pth": pth, "npz": npz}
    suffix = rng.choice(list(kinds))
    return suffix, kinds[suffix](rng, shapes)


_OTHERS = {
    "notes.txt": b"words", "._model.pth": b"x", "__MACOSX/model.pth": b"x", "d/": b"", "\x1b[2J.txt": b"", "e.npy": b"",
    "config.json": json.dumps(seeds.TRANSFORMERS).encode(), "config.json ": b"{", "adapter_config.json": b'{"r": 0}',
}  # fmt: skip
"""What else lies in an archive."""


def tar_format(rng: random.Random, names: Iterable[str]) -> int:
    """Return a format of tars in which such names have room."""
    short = all(len(name.encode()) < 90 for name in names)
    return rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, *((tarfile.USTAR_FORMAT,) if short else ())))


def packed(rng: random.Random, shapes: Shapes) -> tuple[str, bytes]:
    """Return a name and an archive, or a compressed file, of any make around a weight file."""
    suffix, inner = weights(rng, shapes)
    folder = rng.choice(("", "run/", "a/b/c/", "x" * 120 + "/", "\u00e4/", "./"))
    members = {f"{folder}model.{suffix}": inner}
    members |= {folder + name: _OTHERS[name] for name in rng.sample(list(_OTHERS), rng.randrange(4))}
    members = dict(rng.sample(list(members.items()), len(members)))
    way, buffer = rng.randrange(4), io.BytesIO()
    if way == 0:
        with zipfile.ZipFile(buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for name, held in members.items():
                archive.writestr(name, held)
        return "weights.zip", buffer.getvalue()
    if way == 1:
        pack, end = rng.choice(((gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")))
        halves = rng.random() < 0.3  # one stream behind the other
        return f"model.{suffix}.{end}", pack(inner[:50]) + pack(inner[50:]) if halves else pack(inner)
    form = tar_format(rng, members)
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, held in members.items():
            member = tarfile.TarInfo(name.rstrip("/"))
            member.type = (
                tarfile.DIRTYPE
                if name.endswith("/")
                else rng.choice((tarfile.REGTYPE, tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE))
            )
            member.size = len(held)
            member.mtime, member.mode, member.uid = rng.choice((0, 1.5, 2**31)), 0o7777, rng.choice((0, 2**20))
            if rng.random() < 0.3 and form == tarfile.PAX_FORMAT:
                member.pax_headers = {"comment": "\x1b[2J" * 20, "path": member.name}
            tar.addfile(member, io.BytesIO(held))
    if way == 2:
        return "weights.tar", buffer.getvalue()
    pack, end = rng.choice(((gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")))
    return f"weights.tar.{end}", pack(buffer.getvalue())
