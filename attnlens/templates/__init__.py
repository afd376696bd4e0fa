"""The templates of what is shown in a browser or a notebook, and how numbers are written there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from attnlens.printable import printable
from attnlens.words import counted

_POINT, _DIGIT = "\u2008", "\u2007"
"""Blanks as wide as a decimal point and as a digit."""


def shown(value: float | None) -> str:
    """Write a statistic with four significant digits; nothing where it is not defined."""
    return "" if value is None else f"{value:.4g}"


def aligned(values: Iterable[float | None]) -> list[str]:
    """Write a column with four significant digits each and the decimal points below each other.

    Right of shorter fractions stand blanks as wide as a digit (U+2007), for the point one as wide as that (U+2008), so
    that a column set flush right lines up.
    """
    texts = [_positional(value) for value in values]
    longest = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [text and text + _blank(longest, text) for text in texts]


def _positional(value: float | None) -> str:
    if value is None:
        return ""
    size = abs(value)
    if not 1e-6 <= size < 1e6 and size:
        return shown(value)
    digits = 3 - math.floor(math.log10(size)) if size else 0
    return f"{value:.{max(0, digits)}f}"


def _blank(longest: int, text: str) -> str:
    _, point, fraction = text.partition(".")
    return ("" if point or not longest else _POINT) + _DIGIT * (longest - len(fraction))


def _printable(value: Any) -> Any:
    """Return what a template says of a value: text out of files is `printable`, markup of our own as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return printable(value, keep=_POINT + _DIGIT)


def _data(value: Any, **how: Any) -> str:
    """Write as JSON what a page's scripts show, every text in it `printable`."""
    return json.dumps(_all_printable(value), **how)


def _all_printable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_printable(key): _all_printable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_all_printable(one) for one in value]
    return _printable(value)


@cache
def environment() -> Environment:
    """Return the templates' environment: everything is printable and escaped, and a name it does not know an error."""
    environment = Environment(
        loader=PackageLoader("attnlens", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_function"] = _data
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters.update(shown=shown, counted=counted, aligned=aligned)
    return environment
