"""From patterns to jobs: timm's names, folders and files on disk, hub names, lists of all these."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from attnlens.checkpoints.base import INDEX_SUFFIX, NUMPY_SUFFIXES, SAFETENSORS_SUFFIXES, TORCH_SUFFIXES
from attnlens.checkpoints.model_files import model_files
from attnlens.checkpoints.packed import CONFIGURATIONS
from attnlens.errors import ModelNotFoundError, UsageError
from attnlens.models.catalogue import Entry, load_catalogue
from attnlens.patterns import matching_paths
from attnlens.printable import utf8_text
from attnlens.words import counted

_WEIGHTS = (*SAFETENSORS_SUFFIXES, *TORCH_SUFFIXES, *NUMPY_SUFFIXES)
_COMMENT = re.compile(r"(^|(?<=\s))#.*")
_SCHEMES = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(frozen=True)
class Job:
    """One model of a scan: what `inspect` is given, under the name it has in the tables."""

    name: str
    model: str
    checkpoint: str | None = None
    stamp: str | None = None
    """Digest of names, sizes and times of the files on disk; a result of other files is not believed."""

    @property
    def key(self) -> str:
        """Return the name of its result file: readable, different for different models, the same from any folder."""
        what = f"{self.model}={self.checkpoint}" if self.checkpoint else self.model
        readable = re.sub(r"[^A-Za-z0-9.+-]+", "_", what)[-80:].strip("._")
        return f"{readable}-{hashlib.sha256(os.fsencode(what)).hexdigest()[:10]}"


@dataclass(frozen=True)
class Plan:
    """The jobs of a scan, each model once, and in words what the patterns matched beside them."""

    jobs: tuple[Job, ...]
    notes: tuple[str, ...]


def plan_scan(patterns: Sequence[str]) -> Plan:
    """Expand patterns into jobs, in their order, each model once.

    A pattern is a name that `inspect` takes (``vit_base_patch16_224``, ``hf-hub:org/name``), a shell pattern over
    timm's pretrained names (``vit_*dinov2*``; without a dot it matches the architecture, all tags), a path or a glob
    (``runs/**``, see `matching_paths`) over model folders and weight files, ``ARCHITECTURE=GLOB`` for weight files that
    do not say what they are of, or ``@FILE``, a list with a pattern a line and comments behind a ``#`` that begins
    a word.

    Raises `ModelNotFoundError` for a pattern that matches nothing, `UsageError` for a list that cannot be read.
    """
    found: dict[tuple[str, str | None], Job] = {}
    notes: list[str] = []
    for pattern in _listed(patterns):
        for job in _expand(pattern, notes):
            found.setdefault((job.model, job.checkpoint), job)
    if not found:
        raise UsageError("there is nothing to scan: give names, patterns, folders or files")
    return Plan(tuple(found.values()), tuple(dict.fromkeys(notes)))


def _listed(patterns: Iterable[str]) -> Iterator[str]:
    """Yield the patterns, those of lists in the lists' place."""
    for pattern in patterns:
        if not pattern.startswith("@"):
            yield pattern
            continue
        try:
            lines = Path(pattern[1:]).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(
                f"the list {pattern[1:]} cannot be read ({error}): give @FILE with a pattern a line"
            ) from error
        for line in (_COMMENT.sub("", line).strip() for line in lines):
            if line.startswith("@"):
                raise UsageError(f"{pattern[1:]} names another list, {line}: give both on the command line")
            if line:
                yield line


def _expand(pattern: str, notes: list[str]) -> list[Job]:
    if pattern.startswith(_SCHEMES):
        return [Job(pattern, pattern)]
    paths = matching_paths(pattern)
    if paths:
        return _of_paths(pattern, paths, notes)
    architecture, _, weights = pattern.partition("=")
    if weights:
        files = [match for match in matching_paths(weights) if match.name.endswith(_WEIGHTS)]
        if not files:
            raise ModelNotFoundError(f"no weight file matches {weights!r}: one of {', '.join(_WEIGHTS)} is expected")
        return [
            Job(utf8_text(f"{architecture}={file}"), architecture, str(file.absolute()), stamp(file)) for file in files
        ]
    return _of_names(pattern, notes)


def _of_paths(pattern: str, paths: Sequence[Path], notes: list[str]) -> list[Job]:
    """Make a job of every model folder, and of every weight file that lies in none of these."""
    folders = {path for path in paths if path.is_dir() and _holds_model(path)}
    files = {path for path in paths if path.is_file() and path.name.endswith((*_WEIGHTS, INDEX_SUFFIX))}
    models = [path for path in paths if path in folders or (path in files and path.parent not in folders)]
    if not models:
        raise ModelNotFoundError(
            f"{pattern!r} matches {counted(len(paths), 'path')} and none is a model: folders with weights, and files "
            f"ending in {', '.join(_WEIGHTS)}, are"
        )
    others = [path for path in paths if path not in folders and path not in files and path.parent not in folders]
    if others:
        of = counted(len(paths), "path")
        are = "is no model" if len(others) == 1 else "are no models"
        notes.append(f"{pattern}: {len(others)} of {of} {are}, e.g. {others[0]}")
    return [Job(utf8_text(str(path)), str(path.absolute()), None, stamp(path)) for path in models]


def _holds_model(folder: Path) -> bool:
    names = [path.name for path in folder.iterdir()]
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    return (
        not {*CONFIGURATIONS}.isdisjoint(names)
        or len(weights) == 1
        or any(name.endswith(INDEX_SUFFIX) for name in names)
    )


def _of_names(pattern: str, notes: list[str]) -> list[Job]:
    """Make jobs of timm's pretrained names that match; a name without a wildcard is left to `inspect`."""
    if not any(mark in pattern for mark in "*?["):
        known = {entry.name for entry in _entries()}
        if pattern.partition("@")[0].removeprefix("timm/").partition(".")[0] not in known:
            raise ModelNotFoundError(
                f"{pattern!r} is no folder or file here and no architecture with attention of timm: see "
                "`attnlens list-models`"
            )
        return [Job(pattern, pattern)]
    wanted = pattern.lower() if "." in pattern else f"{pattern.lower()}.*"
    jobs, unread, untagged = [], 0, 0
    for entry in _entries():
        untagged += not entry.tags and fnmatchcase(entry.name.lower(), wanted.partition(".")[0])
        names = [f"{entry.name}.{tag}" if tag else entry.name for tag in entry.tags]
        chosen = [name for name in names if fnmatchcase((name if "." in name else f"{name}.").lower(), wanted)]
        if entry.readable:
            jobs += [Job(name, name) for name in chosen]
        else:
            unread += len(chosen)
    if unread:
        without = "no attention that inspect reads without an option"
        notes.append(f"{pattern}: {counted(unread, 'name has', 'names have')} {without}: left out")
    if not jobs:
        alike = counted(untagged, "architecture of that name has", "architectures of that name have")
        more = f" ({alike} no pretrained weights)" if untagged else ""
        raise ModelNotFoundError(
            f"{pattern!r} matches no path here and no pretrained name of timm{more}: see `attnlens list-models`"
        )
    return jobs


@cache
def _entries() -> tuple[Entry, ...]:
    return load_catalogue().entries


def stamp(path: Path) -> str:
    """Digest names, sizes and times of the files a model on disk is read from.

    The time of a file's last change of any kind is among them: one that is replaced by a copy with its old time, of
    its length, is another file.
    """
    digest = hashlib.sha256()
    for file in model_files(path):
        status = file.stat()
        times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
        digest.update(f"{file} {status.st_size} {times}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]
