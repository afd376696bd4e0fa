"""The templates and scripts that a page is made of, each script with the hash that its content policy names."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    pass

SCRIPTS = ("vendor/d3.min.js", "vendor/plot.min.js", "vendor/sortable.min.js", "report.js")


def shown(value: float | None) -> str:
    """Write a statistic with four significant digits; nothing where it is not defined."""
    return "" if value is None else f"{value:.4g}"


def _asset(name: str) -> str:
    return (files("attnlens.reports") / "assets" / name).read_text(encoding="utf-8")


@cache
def _scripts() -> tuple[Markup, ...]:
    texts = [_asset(name) for name in SCRIPTS]
    assert not any("</script" in text.lower() for text in texts)
    return tuple(Markup(text) for text in texts)  # noqa: S704  # the package's own files


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _template(name: str) -> str:
    return (files("attnlens.reports") / "templates" / name).read_text(encoding="utf-8")


@cache
def environment() -> Environment:
    """Return the templates' environment: everything is escaped, and a name a template does not know is an error."""
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["shown"] = shown
    return environment
