"""The scripts and styles that a page is made of, each script with the hash that its content policy names."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from markupsafe import Markup

SCRIPTS = ("vendor/d3.min.js", "vendor/plot.min.js", "vendor/sortable.min.js", "report.js")


def asset(name: str) -> str:
    """Return the text of a style sheet or script of the package."""
    return (files("attnlens.reports") / "assets" / name).read_text(encoding="utf-8")


@cache
def scripts() -> tuple[Markup, ...]:
    """Return the scripts of a page, in the order they run."""
    texts = [asset(name) for name in SCRIPTS]
    assert not any("</script" in text.lower() for text in texts)
    return tuple(Markup(text) for text in texts)  # noqa: S704  # the package's own files


def script_hash(script: str) -> str:
    """Return the sha256 of a script as a content policy writes it."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
