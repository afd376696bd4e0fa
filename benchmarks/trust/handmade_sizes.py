"""Cases written by hand: headers in front of a tar's members, names of tensors, networks that only sizes make large.

Each took more than the time or the memory that are promised.
"""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Iterator

import torch

from benchmarks.trust import seeds
from benchmarks.trust.guard import Case

_KEYS = b"".join(b"%d key%05d=v\n" % (len(b"00 key00000=v\n"), number) for number in range(5000))
HEADERS: dict[str, bytes] = {
    "digits": b"1" * 300_000,
    "records inside of each other": b"2 " * 50_000 + b"=",
    "many keys": _KEYS,
    "nothing": b"",
}


def sized() -> Iterator[Case]:
    """Yield every case."""
    yield from _in_front()
    yield from _named()
    yield from _shown()


def _block(kind: bytes, content: bytes) -> bytes:
    info = tarfile.TarInfo("h")
    info.type, info.size = kind, len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def _in_front() -> Iterator[Case]:
    weights = seeds.safetensors(seeds.transformers_state())
    packed, images = seeds.tar({"model.safetensors": weights}), seeds.tar(seeds.images())
    kinds = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
    for kind in (*kinds, tarfile.GNUTYPE_LONGLINK):
        for what, content in HEADERS.items():
            for times in (1, 2000) if len(content) < 1000 else (1, 3):
                front = _block(kind, content) * times
                name = f"{times} headers {kind.decode()}, {what}"
                yield Case("packed", name, {"m.tar": front + packed}, "m.tar")
                yield Case("packed", f"{name}, compressed", {"m.tar.gz": gzip.compress(front + packed)}, "m.tar.gz")
                yield Case("image tar", name, {"data.tar": front + images}, "data.tar")


def _named() -> Iterator[Case]:
    names = {
        "chunks": "blocks.1.1." * 27_272 + "\n\nx",
        "parametrizations": ".parametrizations.a" * 31_578 + ".\n\nx",
        "low rank": "a." * 100_000 + "lora_A\n",
        "numbers": ".1" * 100_000,
    }
    value = torch.ones(2, 2)
    for what, name in names.items():
        yield Case(
            "safetensors", f"long name, {what}", {"m.safetensors": seeds.safetensors({name: value})}, "m.safetensors"
        )
        state = {**seeds.timm_state(), name: value}
        files = {"config.json": json.dumps(seeds.TIMM).encode(), "model.safetensors": seeds.safetensors(state)}
        yield Case("timm folder", f"long name, {what}", files)


def _shown() -> Iterator[Case]:
    config = {"architecture": "tiny_vit_5m_224", "num_classes": 0, "model_args": {"window_sizes": [200] * 4}}
    for stages in (2, 4):
        state = {f"stages.{stage}.blocks.0.x": torch.ones(1) for stage in range(stages)}
        files = {"config.json": json.dumps(config).encode(), "model.safetensors": seeds.safetensors(state)}
        yield Case("timm folder", f"windows of 200 in {stages} stages", files)
