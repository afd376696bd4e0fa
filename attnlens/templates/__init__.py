"""The templates of what is shown in a browser or a notebook, and how numbers are written there."""

from __future__ import annotations

from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from attnlens.words import counted


def shown(value: float | None) -> str:
    """Write a statistic with four significant digits; nothing where it is not defined."""
    return "" if value is None else f"{value:.4g}"


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
    environment.filters.update(shown=shown, counted=counted)
    return environment
