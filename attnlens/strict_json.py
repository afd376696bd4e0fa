"""Reading untrusted files: JSON that is plain, and files that lie where they say."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attnlens.errors import AttnlensError

DEEPEST = 64
"""Levels of nesting a document may have."""


def parse_json(text: str | bytes, *, constant: Callable[[str], Any] | None = None) -> Any:
    """Parse UTF-8 JSON and refuse what readers of JSON disagree about. Raises `ValueError` alone.

    Refused are: a name given twice in one object, halves of surrogate pairs, NaN and Infinity (``constant`` makes
    another value of these), numbers beyond float64, integers of more than 4,300 digits, and more than `DEEPEST` levels.
    """
    try:
        data = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            object_pairs_hook=_object,
            parse_constant=constant or _refuse,
        )
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels") from None
    _check(data, finite=constant is None)
    return data


def read_json(path: Path, *, constant: Callable[[str], Any] | None = None) -> Any:
    """Parse the JSON in a file, see `parse_json`. Raises `OSError` and `ValueError`."""
    return parse_json(path.read_bytes(), constant=constant)


def within(folder: Path, path: Path, refusal: type[AttnlensError]) -> Path:
    """Return a path below ``folder``, refusing one that is a link to another place, with an error of that class.

    The hub's cache links a snapshot's files to the ``blobs`` folder of the same repository: those are followed.
    """
    try:
        home, real = folder.resolve(), path.resolve(strict=os.path.lexists(path))
    except (OSError, RuntimeError, ValueError) as error:  # too long, links to nothing or in a circle, a null character
        raise refusal(f"{path} cannot be followed ({error}): give a plain file") from error
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    if not any(real.is_relative_to(place) for place in homes):
        raise refusal(f"{path} is a link that leaves {home}: refused, put the file itself there")
    return path


def there(look: Callable[[], bool]) -> bool:
    """Return what a look at the disk finds, as ``path.is_file``: False for a name that no file can have.

    Such is one that is too long, or below what may not be entered: there `pathlib` raises.
    """
    try:
        return look()
    except (OSError, ValueError):
        return False


def finite_or_none(value: Any) -> Any:
    """Return a value that strict JSON can hold: a float that is NaN or infinite becomes None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice[:100]!r} is given twice in one object")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def _check(data: Any, *, finite: bool) -> None:
    level = [data]
    for _ in range(DEEPEST):
        level = [inner for value in level for inner in _parts(value, finite)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {DEEPEST} levels")


def _parts(value: Any, finite: bool) -> list[Any]:
    """Return the containers directly inside a value, having checked what else is."""
    items: list[Any] = [*value, *value.values()] if isinstance(value, dict) else value
    if not isinstance(items, list):
        items = [items]
    for item in items:
        if isinstance(item, str) and not item.isascii() and any("\ud800" <= c <= "\udfff" for c in item):
            raise ValueError(f"{item[:100]!r} holds half of a surrogate pair")
        if finite and isinstance(item, float) and not math.isfinite(item):
            raise ValueError("a number is beyond what float64 holds")
    return [item for item in items if isinstance(item, dict | list)]
