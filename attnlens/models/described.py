"""Descriptions of timm's architectures: found once, and cached.

Describing an architecture needs torch and timm; reading its weights does not. The description is plain JSON in the
user's cache folder by timm version, so the second inspection of an architecture imports neither.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attnlens.atomic import write_text_atomic
from attnlens.errors import OutputError
from attnlens.models.architecture import Architecture, build, check_model_args
from attnlens.models.bounded import describe_bounded


def describe_architecture(name: str, model_args: dict[str, Any] | None = None) -> Architecture:
    """Describe a timm architecture, with ``model_args`` passed to its constructor; from the cache where it can be.

    Raises `ModelNotFoundError` with the nearest names when timm does not know it, `UnsupportedAttentionError` when
    it holds neither attention nor depthwise filters.
    """
    check_model_args(model_args or {}, name)
    cached = _cache_file(name, model_args or {})
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Architecture.from_json(json.loads(cached.read_text()))
    found = describe_bounded(name, model_args) if model_args else build(name, {})
    with contextlib.suppress(OutputError):  # a read-only cache costs time, nothing else
        write_text_atomic(cached, json.dumps(found.to_json()))
    return found


@cache
def rules_digest() -> str:
    """Hash the code that finds layers, so that a description made by other rules is never believed."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted((package / "layouts").rglob("*.py")):
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
