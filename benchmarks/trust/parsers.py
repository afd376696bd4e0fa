"""The parsers of the package's own, each as a function of bytes that must raise nothing but what it says.

`coverage_guided` gives them what libFuzzer makes of `corpus`; tests give them the corpus itself.
"""

from __future__ import annotations

import io
import json
import os
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from attnlens.checkpoints import torch_files
from attnlens.checkpoints.archives import DAMAGED_ARRAY, array_header
from attnlens.checkpoints.files import NpzFile, SafetensorsFile
from attnlens.checkpoints.nested import named_tensors
from attnlens.checkpoints.pickled_data import read_pickle
from attnlens.errors import CheckpointError
from attnlens.printable import LONGEST
from attnlens.state import sealed, unsealed
from attnlens.strict_json import DEEPEST, parse_json


def pickled(data: bytes) -> None:
    """Read a pickle as data; what comes of it is looked through as a checkpoint is."""
    try:
        root = read_pickle(io.BytesIO(data))
        found, _ = named_tensors(root, 64 * len(data))
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  # `TorchFile` tells all of them in one line
        return
    torch_files._stated(root)  # noqa: SLF001
    torch_files._outline(root)  # noqa: SLF001
    assert all(isinstance(name, str) for name in found)


def document(data: bytes) -> None:
    """Parse JSON strictly; what is accepted is what Python's own parser makes of it, and can be written and sealed."""
    try:
        found = parse_json(data)
    except ValueError as error:
        str(error).encode("utf-8", "backslashreplace")
        return
    again = json.dumps(found, allow_nan=False)
    assert json.loads(again) == found == json.loads(data)
    assert _levels(found) <= DEEPEST
    again.encode()
    if isinstance(found, dict) and "sha256" not in found:
        assert unsealed(sealed(found)) == found


def _levels(value: object) -> int:
    inner = list(value.values()) if isinstance(value, dict) else value
    return 1 + max(map(_levels, inner), default=0) if isinstance(inner, list) else 0


def header(data: bytes) -> None:
    """Read the header of a stored array: no number in it is negative, and its type is plain."""
    try:
        shape, kind = array_header(io.BytesIO(data))
    except DAMAGED_ARRAY:
        return
    assert all(type(size) is int and size >= 0 for size in shape)
    assert kind.names is None


def _file(reader: Callable[[Path], object], suffix: str) -> Callable[[bytes], None]:
    """Return what reads bytes as a file: an error is one line, and every tensor has the shape it was said to have."""
    folder = tempfile.gettempdir()

    def read(data: bytes) -> None:
        path = Path(folder) / f"attnlens-parsers-{os.getpid()}{suffix}"
        path.write_bytes(data)
        told = "x"
        try:
            found = reader(path)
            for name in list(found)[:20]:  # type: ignore[call-overload]
                assert tuple(found[name].shape) == found.shape(name)  # type: ignore[index,attr-defined]
        except CheckpointError as error:
            told = str(error)
        finally:
            path.unlink()
        assert told.isprintable()
        assert 0 < len(told) <= LONGEST

    return read


PARSERS: dict[str, Callable[[bytes], None]] = {
    "pickle": pickled,
    "json": document,
    "array header": header,
    "safetensors": _file(SafetensorsFile, ".safetensors"),
    "torch": _file(torch_files.TorchFile, ".pth"),
    "npz": _file(NpzFile, ".npz"),
}


def corpus(name: str) -> Iterator[bytes]:
    """Yield what the search of one parser starts from."""
    from benchmarks.trust import built, payloads, seeds
    from benchmarks.trust import pickled as programs

    rng = random.Random(name)
    state = seeds.transformers_state()
    shapes = [{"a.q.weight": (2, 3), "a.k.weight": (2, 3)}, built.spoiled(rng, built.plain(rng))]
    if name in ("pickle", "torch"):
        whole = [seeds.pth({"q": next(iter(state.values()))}), seeds.pth(seeds.training(state))]
        if name == "torch":
            yield from whole
            yield seeds.pth({"q": next(iter(state.values()))}, legacy=True)
            return
        for one in whole:
            with zipfile.ZipFile(io.BytesIO(one)) as archive:
                held = archive.read(next(path for path in archive.namelist() if path.endswith("/data.pkl")))
            yield held
            yield programs.program(rng, held)
        for fragment in (*payloads.running().values(), *payloads.growing().values()):
            if len(fragment) < 2000:
                yield b"\x80\x02" + fragment + b"."
    elif name == "json":
        yield from (text for text in payloads.DOCUMENTS.values() if len(text) < 2000)
        yield from (json.dumps(value).encode() for value in payloads.VALUES)
        yield json.dumps(seeds.record("default", 0, 1)).encode()
        yield b'{"a": [1, 2.5e-3, null, true, "\\ud83d\\ude00"], "b": {"c": [[]]}}'
    elif name == "array header":
        for text in (
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }",
            "{'descr': '|V2', 'fortran_order': True, 'shape': (), }",
        ):
            for version in (1, 2, 3):
                size = len(text).to_bytes(2 if version == 1 else 4, "little")
                yield b"\x93NUMPY" + bytes((version, 0)) + size + text.encode()
    else:
        make = built.safetensors if name == "safetensors" else built.npz
        yield from (make(rng, one) for one in shapes)
