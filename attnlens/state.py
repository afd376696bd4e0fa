"""Folders that are both state and output: looked through before anything in them is believed or written.

Such a folder may come from somebody else. Of its files a digest tells damage and edits, not a forgery: whoever writes
numbers can write their digest, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnlens.errors import AttnlensError
from attnlens.strict_json import parse_json, there

LARGEST = 1 << 30
"""Bytes of a file of state that is read: a million evaluations take less."""

DIGEST = "sha256"
SEALED_FROM = 2
"""The ``schema_version`` from which on a manifest, or a checkpoint, has the digest of itself."""
_COMMENT = b"sha256 "
"""What stands in front of the digest in the comment of an archive"""
_CHUNK = 1 << 20


def check_folder(folder: Path, refusal: type[AttnlensError], parts: Sequence[str] = ()) -> None:
    """Refuse, with an error of that class, a folder in which something read or written would be another place's.

    Looked at are the entries of ``folder`` and of its folders ``parts``. A link must end inside ``folder``; whatever is
    neither file nor folder (a pipe, whose opening may never return, or a device) is refused. A folder that is not
    there is in order.
    """
    home = _resolved(folder, refusal) if there(folder.is_dir) else folder
    for place in (folder, *(folder / name for name in parts)):
        for path in _entries(place, refusal):
            if path.is_symlink() and not _resolved(path, refusal).is_relative_to(home):
                raise refusal(f"{path} is a link that leaves {folder}: refused, its target would be written")
            kind = path.stat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise refusal(f"{path} is no file and no folder but a pipe or a device: take it out of {folder}")
            if path.parent == folder and path.name in parts and not stat.S_ISDIR(kind):
                raise refusal(f"{path} is a file where a folder is expected: take it away")


def read_state(path: Path) -> bytes:
    """Return the content of a plain file of at most `LARGEST` bytes. Raises `OSError`, or `ValueError` for others."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is no plain file")
        if status.st_size > LARGEST:
            raise ValueError(f"it has {status.st_size} bytes, of which at most {LARGEST} are read")
        return file.read(LARGEST + 1)


def sealed(data: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the sha256 of what it holds, under `DIGEST`."""
    return {**data, DIGEST: _digest(data)}


def unsealed(data: Any) -> dict[str, Any]:
    """Return what `sealed` was given. Raises `ValueError` where the digest is not of what stands there now."""
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004  # what parsing raises, too
    inner = {name: value for name, value in data.items() if name != DIGEST}
    if data.get(DIGEST) != _digest(inner):
        raise ValueError("it was changed after it was written: its sha256 is of something else")
    return inner


def sealed_archive(content: memoryview) -> tuple[memoryview, bytes]:
    """Return two parts of a file: a zip archive without a comment, and the sha256 of all before it as its comment."""
    head, length = content[:-2], struct.pack("<H", len(_COMMENT) + 2 * hashlib.sha256().digest_size)
    digest = hashlib.sha256(head)
    digest.update(length)
    return head, length + _COMMENT + digest.hexdigest().encode()


def is_sealed_archive(path: Path) -> bool:
    """Whether an archive ends in the digest of `sealed_archive`. Raises `ValueError` where that is of something else.

    Raises `OSError` for a file that cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = max(0, path.stat().st_size - len(_COMMENT) - 2 * digest.digest_size)
        while part := file.read(min(left, _CHUNK)):
            digest.update(part)
            left -= len(part)
        comment = file.read()
    if not comment.startswith(_COMMENT):
        return False
    if comment != _COMMENT + digest.hexdigest().encode():
        raise ValueError("it was changed after it was written: its sha256 is of something else")
    return True


def manifest_of(content: bytes) -> dict[str, Any]:
    """Return the JSON object that names the other files of its set with their sha256, under ``files``.

    Raises `ValueError` where it was changed after it was written: older ones have no digest.
    """
    data = parse_json(content)
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004  # what parsing raises, too
    return unsealed(data) if DIGEST in data or data.get("schema_version", 1) not in range(SEALED_FROM) else data


def check_listed(manifest: Path, told: bytes, name: str, content: bytes) -> None:
    """Raise `ValueError` where a manifest, that holds ``told``, does not name the file ``name`` with this content.

    A manifest without ``files`` is of a version that named none.
    """
    try:
        known = manifest_of(told).get("files")
    except ValueError as error:
        raise ValueError(f"{manifest.name}: {error}") from error
    if known is not None and (not isinstance(known, dict) or known.get(name) != hashlib.sha256(content).hexdigest()):
        raise ValueError(f"it is not what {manifest.name} was made of")


def _digest(data: dict[str, Any]) -> str:
    plain = json.loads(json.dumps(data))  # keys that are numbers sort in another order than their names
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _entries(place: Path, refusal: type[AttnlensError]) -> list[Path]:
    if not there(place.is_dir):
        return []
    try:
        return sorted(place.iterdir())
    except OSError as error:
        raise refusal(f"{place} cannot be listed: {error.strerror}") from error


def _resolved(path: Path, refusal: type[AttnlensError]) -> Path:
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, or to nothing
        raise refusal(f"{path} cannot be followed ({error}): put the file itself there, or take it away") from error
