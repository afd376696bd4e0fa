"""Descriptions of timm's architectures: shipped for one version of timm, found once and cached for any other.

Describing an architecture needs torch and timm; reading its weights does not. The descriptions of every architecture
of the timm that a release was made with are shipped in one archive, and the shipped ViT's. For another version, for
other arguments and for renamed architectures the description is plain JSON in the user's cache folder by timm version,
so that the second inspection of such an architecture imports neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from attnlens.atomic import write_atomic, write_text_atomic
from attnlens.errors import OutputError
from attnlens.models.architecture import Architecture, build, check_model_args
from attnlens.models.bounded import describe_bounded

SHIPPED = Path(__file__).parents[1] / "catalogues"
"""Folder of what is shipped with the package about architectures, by timm version."""
_ABOUT = "about.json"
_TOGETHER = 24  # architectures in a member of the archive: names that begin alike are built alike, and pack well


def describe_architecture(name: str, model_args: dict[str, Any] | None = None) -> Architecture:
    """Describe a timm architecture, with ``model_args`` passed to its constructor; from the cache where it can be.

    Raises `ModelNotFoundError` with the nearest names when timm does not know it, `UnsupportedAttentionError` when
    it holds neither attention nor depthwise filters.
    """
    check_model_args(model_args or {}, name)
    cached = _cache_file(name, model_args or {})
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Architecture.from_json(json.loads(cached.read_text()))
    shipped = _shipped(_key(name, model_args or {}))
    if shipped is not None:
        return shipped
    found = describe_bounded(name, model_args) if model_args else build(name, {})
    with contextlib.suppress(OutputError):  # a read-only cache costs time, nothing else
        write_text_atomic(cached, json.dumps(found.to_json()))
    return found


def layouts_file() -> Path:
    """Return where the package ships the descriptions for the installed timm version, if it does."""
    return SHIPPED / f"timm-{version('timm')}.layouts.zip"


def _key(name: str, model_args: Mapping[str, Any]) -> str:
    """Return what an architecture is shipped under."""
    return f"{name} {json.dumps(model_args, sort_keys=True)}" if model_args else name


def _shipped(key: str) -> Architecture | None:
    """Return a shipped description that these rules made of this timm; None where there is none."""
    from lzma import LZMAError
    from zipfile import BadZipFile, ZipFile

    broken = (OSError, ValueError, KeyError, TypeError, BadZipFile, LZMAError)
    with contextlib.suppress(*broken), ZipFile(layouts_file()) as archive:
        if json.loads(archive.read(_ABOUT))["rules"] != rules_digest():
            return None
        members = sorted(set(archive.namelist()) - {_ABOUT})
        found = json.loads(archive.read(members[bisect_right(members, key) - 1])).get(key)
        return None if found is None else Architecture.from_json(found)
    return None


def ship_layouts(architectures: Iterable[tuple[str, dict[str, Any]]]) -> Path:
    """Describe architectures, names with arguments, and write them to where the package ships them from.

    A member of the archive holds the architectures from the one it is named after up to the next member's.
    """
    from zipfile import ZIP_LZMA, ZipFile, ZipInfo

    found = {_key(*each): describe_architecture(*each).to_json() for each in architectures}
    known = sorted(found)
    groups = [known[start : start + _TOGETHER] for start in range(0, len(known), _TOGETHER)]
    members = {group[0]: json.dumps({key: found[key] for key in group}, separators=(",", ":")) for group in groups}
    about = {"schema": "attnlens.layouts", "schema_version": 1, "timm": version("timm"), "rules": rules_digest()}

    def write(file: IO[bytes]) -> None:
        with ZipFile(file, "w", ZIP_LZMA) as archive:
            for member, text in {_ABOUT: json.dumps(about), **members}.items():
                archive.writestr(ZipInfo(member), text, ZIP_LZMA)  # without the hour it was made at

    return write_atomic(layouts_file(), write)


_READER = "read_write.py"


@cache
def rules_digest() -> str:
    """Hash the code that finds layers, so that a description made by other rules is never believed.

    What reads and writes the weights of layers that were found is no part of it.
    """
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted((package / "layouts").rglob("*.py")):
        if path.name != _READER:
            digest.update(path.read_bytes())
    for name in ("architecture.py", "forward_inputs.py", "undress.py"):
        digest.update((package / "models" / name).read_bytes())
    return digest.hexdigest()[:12]


def cache_folder() -> Path:
    """Return the user's folder for what is known about this timm version under these layout rules."""
    import platformdirs

    return platformdirs.user_cache_path("attnlens") / f"timm-{version('timm')}" / rules_digest()


def _cache_file(name: str, model_args: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps([name, model_args], sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / f"{name.replace('/', '_')}-{key}.json"
