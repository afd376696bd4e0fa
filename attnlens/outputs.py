"""Where results go: never over what the same command reads, nor over a file that attnlens did not write."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from attnlens.errors import OutputError, UsageError
from attnlens.state import read_state
from attnlens.strict_json import parse_json, there

HEAD = 1 << 16
"""Bytes of a file that are looked at for who wrote it."""
FOLDER_MANIFEST = ".attnlens.json"
"""File of a default folder that says which models it is of."""

_SCHEMA = re.compile(rb'"schema"\s*:\s*"attnlens\.')
_CONFIG = re.compile(rb'^\{\s*"sha256": "[0-9a-f]{64}",\s*"dataset":')
_MARKS: Mapping[str, re.Pattern[bytes]] = {
    ".json": re.compile(rb"^\s*\{"),
    ".html": re.compile(rb'<meta name="generator" content="attnlens|<title>[^<]* \xc2\xb7 attnlens</title>'),
    ".png": re.compile(rb"^\x89PNG[\s\S]{0,200}tEXtSoftware\x00attnlens"),
    ".svg": re.compile(rb"<dc:title>attnlens</dc:title>"),
    ".pdf": re.compile(rb"/Creator \(attnlens\)"),
    ".jsonl": re.compile(rb'^\{"config_sha256": "|^\{"run": "[^"]*", "epoch": [0-9.]+, "structure": '),
    ".csv": re.compile(
        rb"^(?:layer,head,circuit,fold,alpha|layer,name,filters,channels|kind,from_layer,from_head|model,status,fold"
        rb"|model,layer,relative_depth|arm,seed,layer,cosine|arm,n,|first,second,circuit|model,circuit,layer"
        rb"|run,epoch,train_loss,test_loss,)"
    ),
    ".md": re.compile(rb"\n## What the intervals allow to say\n"),
}
"""What a file of ours holds near its beginning, by how its name ends."""
_MANIFESTS = ("stats.json", "summary.json")
_TOLD = frozenset(["attnlens", "network", "trained_on", "config_sha256"])
"""What the metadata of weights hold that we wrote"""
_FILE_SUFFIXES = (*_MARKS, ".safetensors", ".pth", ".pt", ".bin", ".npz", ".txt")


@dataclass(frozen=True)
class Outputs:
    """What one command may write: ``inputs`` are the files that it reads; ``force`` replaces what others wrote."""

    inputs: tuple[Path, ...] = ()
    force: bool = False

    @classmethod
    def of(cls, *given: Any, files: Iterable[Path] = (), force: bool = False) -> Outputs:
        """Take for inputs what the models that are given are read from, as far as it is there, and further files."""
        return cls((*(path for value in given for path in _files(value)), *files), force)

    def file(self, given: str | os.PathLike[str], suffix: str) -> Path:
        """Return where a file of one kind goes. Raises `UsageError` and `OutputError` where it may not go there."""
        path = Path(given)
        if os.fspath(given).endswith(("/", os.sep)) or there(path.is_dir):
            raise UsageError(f"{given} is a folder: give a file to write, as {path / f'NAME{suffix}'}")
        if path.suffix != suffix and path.suffix in _FILE_SUFFIXES:
            raise UsageError(f"{path} is named as another kind of file: give a name that ends in {suffix}")
        return self.check(path)

    def folder(self, path: str | os.PathLike[str], names: Iterable[str] = ()) -> Path:
        """Return the folder that several files go to; ``names`` are those of them that are known beforehand."""
        path = Path(path)
        if there(path.is_file):
            raise UsageError(f"{path} is a file: give a folder, which several files are written into")
        if path.suffix in _FILE_SUFFIXES and not there(path.is_dir):
            raise UsageError(f"{path} is named as a file: give a folder, which several files are written into")
        for name in names:
            self.check(path / name)
        return path

    def check(self, path: Path) -> Path:
        """Return a path that may be written. Raises `UsageError` for an input, `OutputError` for a file of others."""
        if there(path.is_dir):
            raise OutputError(f"{path} is a folder, where a file goes: take it away, or choose another place")
        if there(path.is_symlink) and not there(path.exists):
            raise OutputError(f"{path} is a link to nothing: take it away, or name the file that it is to lead to")
        if not there(path.is_file):
            return path
        self.spare(path)
        if not self.force and not is_ours(path):
            raise OutputError(
                f"{path} was not written by attnlens, or was changed since: choose another name, or add --force "
                "to replace it"
            )
        return path

    def spare(self, path: Path) -> Path:
        """Return a path that is no input, under whatever name or link. Raises `UsageError`."""
        if _identity(path) in self._read:
            raise UsageError(f"{path} is what this command reads: write to another file")
        return path

    @cached_property
    def _read(self) -> frozenset[tuple[int, int] | None]:
        return frozenset(map(_identity, self.inputs)) - {None}


def is_ours(path: Path) -> bool:
    """Whether attnlens wrote a file: by its schema or metadata, or by a manifest beside it. An empty file is nobody's.

    Behind a link it is somebody's: a link says that the file is wanted elsewhere.

    A file that cannot be read is taken for somebody else's.
    """
    try:
        size = path.stat().st_size
        if size == 0:
            return not path.is_symlink()
        with path.open("rb") as file:
            head = file.read(HEAD)
            if path.suffix == ".pdf" and size > HEAD:
                file.seek(-HEAD, os.SEEK_END)
                head = file.read(HEAD)
    except OSError:
        return False
    mark = _MARKS.get(path.suffix)
    marked = mark is not None and mark.search(head) is not None
    if path.suffix == ".json":
        marked = marked and bool(_SCHEMA.search(head) or _CONFIG.search(head))
    return marked or _listed(path) or (path.suffix == ".safetensors" and _says_so(head))


def named_folder(root: Path, names: Sequence[str], models: Sequence[str]) -> Path:
    """Return the folder below ``root`` that is named after models: never one that is of others of the same name.

    ``models`` are what tells them from those: absolute paths, or names. The folder is made, and says so.
    """
    name = re.sub(r"[^\w.+-]+", "_", "+".join(names)).strip(".") or "model"
    digest = hashlib.sha256("\n".join(models).encode(errors="surrogateescape")).hexdigest()
    record = {"schema": "attnlens.folder", "schema_version": 1, "models": digest}
    for folder in (root / name, root / f"{name}-{digest[:6]}"):
        if _claimed(folder, record):
            return folder
    raise OutputError(f"{root / name} is of other models: choose a folder")


def model_identity(*given: Any) -> list[str]:
    """Return what tells models from others of the same name: absolute paths, names, options as text."""
    return [str(Path(one).resolve()) if _is_path(one) else str(one) for one in given if one is not None and one != ()]


def _claimed(folder: Path, record: dict[str, Any]) -> bool:
    """Make a folder of these models, or say whether it is theirs; one without a manifest becomes theirs."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FOLDER_MANIFEST).open("x") as file:  # one of two processes at a time
            file.write(json.dumps(record) + "\n")
    except FileExistsError:
        try:
            return bool(parse_json(read_state(folder / FOLDER_MANIFEST)) == record)
        except (OSError, ValueError):
            return False
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OutputError(f"cannot write {folder}: {reason}. Choose a folder you can write to") from error
    return True


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and there(Path(value).exists)


def _files(value: Any) -> list[Path]:
    if isinstance(value, list | tuple):
        return [path for one in value for path in _files(one)]
    if not isinstance(value, str | os.PathLike):
        return []
    text = os.fspath(value)
    for told in (text, text.partition(":")[2], text.partition("=")[2], text.removeprefix("@")):
        if told and _is_path(told):
            from attnlens.checkpoints.model_files import model_files  # imports numpy

            path = Path(told)
            return sorted({*model_files(path), *([path] if there(path.is_file) else [])})
    return []


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _says_so(head: bytes) -> bool:
    """Whether the metadata that begin a safetensors file are of `attnlens init` or of a run of `train-compare`.

    Only these are looked at: the names and shapes of tensors behind them may be many more bytes.
    """
    begin = head.find(b'{"__metadata__":') + len(b'{"__metadata__":')
    if not head[8:].startswith(b'{"__metadata__":'):
        return False
    try:
        metadata, _ = json.JSONDecoder().raw_decode(head[begin:].decode(errors="replace"))
    except ValueError:
        return False
    return isinstance(metadata, dict) and not _TOLD.isdisjoint(metadata)


def _listed(path: Path) -> bool:
    """Whether a manifest of ours in the same folder names the file with the hash that it has."""
    for name in _MANIFESTS:
        try:
            manifest = path.parent / name
            content = b"" if manifest == path else read_state(manifest)
            if not _SCHEMA.search(content[:HEAD]):
                continue
            known = parse_json(content).get("files", {}).get(path.name)
            with path.open("rb") as file:
                if known == hashlib.file_digest(file, "sha256").hexdigest():
                    return True
        except (OSError, ValueError, AttributeError):
            continue
    return False
