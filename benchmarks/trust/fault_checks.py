"""Telling a file of one known run from that of another, and either from half a file."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image

from attnlens.atomic import TEMPORARY
from attnlens.state import unsealed

ABSENT = "absent"
_PASSING = (
    (rb'("(?:time|command)": )"(?:[^"\\]|\\.)*"', rb'\1"-"'),
    (rb'("(?:train_)?seconds": )[-0-9.e+]+', rb"\g<1>0"),
    (rb'("commands": )\[[^\]]*\]', rb"\1[]"),
    (rb'("(?:results\.jsonl|report\.md)": )"[0-9a-f]{64}"', rb'\1"-"'),
    (rb"(\| (?:training time|command) \|)[^\n]*", rb"\1"),
    (rb"(<dt>(?:time|command)</dt><dd>)[^\n]*", rb"\1"),
)
"""What two runs of the same command do not share: the clock, and ``--resume`` on the command line."""


class DamagedError(Exception):
    """A file does not open whole."""


def content_hash(path: Path) -> str:
    """Return the sha256 of what a file holds, the clock left out. Raises `DamagedError` where it is not whole."""
    data = path.read_bytes()
    try:
        return hashlib.sha256(_READERS.get(path.suffix, _text)(data)).hexdigest()
    except (ValueError, KeyError, OSError, EOFError, SyntaxError, BadZipFile, struct.error) as error:
        raise DamagedError(f"{path} does not open whole: {error}") from error


_SEALED = frozenset(["records", "csv_sha256", "paired_runs_by_seed"])
"""What runs, results of a scan and summaries hold."""


def _text(data: bytes) -> bytes:
    for pattern, blank in _PASSING:
        data = re.sub(pattern, blank, data)
    return data


def _json(data: bytes) -> bytes:
    content = json.loads(data)
    if isinstance(content, dict) and not _SEALED.isdisjoint(content):  # its clock included
        data = json.dumps(unsealed(content)).encode()
    return _text(data)


def _lines(data: bytes) -> bytes:
    for line in data.splitlines():
        json.loads(line)
    return _text(data)


def _csv(data: bytes) -> bytes:
    if len({len(row) for row in csv.reader(io.StringIO(data.decode()))}) != 1:
        raise ValueError("rows of different lengths, or none")
    return data


def _png(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
    return data


def _npz(data: bytes) -> bytes:
    with np.load(io.BytesIO(data)) as arrays:
        return b"".join(name.encode() + arrays[name].tobytes() for name in arrays)


def _safetensors(data: bytes) -> bytes:
    """Return tensors by name, whatever order the header lists them in."""
    (length,) = struct.unpack("<Q", data[:8])
    header, values = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__", {})
    if max(place["data_offsets"][1] for place in header.values()) != len(values):
        raise ValueError("it ends before its last tensor, or after it")
    told = {name: _text(value.encode()).decode() for name, value in sorted(metadata.items())}
    parts = [json.dumps(told).encode()]
    for name, place in sorted(header.items()):
        begin, end = place["data_offsets"]
        parts += [f"{name} {place['dtype']} {place['shape']}".encode(), values[begin:end]]
    return b"\0".join(parts)


_READERS = {
    ".json": _json,
    ".jsonl": _lines,
    ".csv": _csv,
    ".png": _png,
    ".npz": _npz,
    ".safetensors": _safetensors,
}


def leftovers(folder: Path, newer_than: float = 0.0) -> list[Path]:
    """Return the temporary files below a folder, those that are younger than a moment."""
    found = []
    for path in folder.rglob(f".*{TEMPORARY}"):
        with suppress(OSError):  # it has become the file it was to be
            if path.stat().st_mtime >= newer_than:
                found.append(path)
    return found


def contents(folder: Path) -> dict[str, str]:
    """Return the content hashes of all files below a folder, temporary, lock and checkpoint files left out."""
    return {
        str(path.relative_to(folder)): content_hash(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".") and path.suffix != ".pt"
    }


def states(folder: Path, old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """Say of every output whether it is ``old``, ``new``, ``absent``, or what is wrong with it."""
    found = {}
    for name in sorted({*old, *new}):
        path = folder / name
        if not path.is_file():
            found[name] = "old" if name not in old else ABSENT
            continue
        try:
            now = content_hash(path)
        except DamagedError as error:
            found[name] = str(error)
        else:
            known = {new.get(name): "new", old.get(name): "old"}
            found[name] = known.get(now, f"{path} holds neither the old nor the new content")
    return found


def half_files(found: Mapping[str, str]) -> list[str]:
    """Return what is wrong: half files, foreign content, files that are gone."""
    return [state if state != ABSENT else f"{name} is gone" for name, state in found.items() if state not in _WHOLE]


_WHOLE = ("old", "new")


def told_apart(manifest: Path) -> dict[str, bool]:
    """Return which files are of the run that a manifest is of, by the hashes it names."""
    named, folder = json.loads(manifest.read_text())["files"], manifest.parent
    return {
        name: (folder / name).is_file() and hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256
        for name, sha256 in named.items()
    }
