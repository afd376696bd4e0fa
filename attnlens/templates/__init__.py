"""The templates of what is shown in a browser or a notebook, and how numbers are written there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from attnlens.words import counted


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
    return ("" if point or not longest else "\u2008") + "\u2007" * (longest - len(fraction))


@cache
def environment() -> Environment:
    """Return the templates' environment: everything is escaped, and a name a template does not know is an error."""
    environment = Environment(
        loader=PackageLoader("attnlens", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters.update(shown=shown, counted=counted, aligned=aligned)
    return environment
