"""Shell patterns over paths, in which links are named and never walked through: two that loop would have no end."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fnmatch import translate
from pathlib import Path

from attnlens.strict_json import there

_MAGIC = re.compile(r"[*?[]")
_ANY_DEPTH = "**"


def matching_paths(pattern: str) -> list[Path]:
    """Return the paths that a pattern matches, in the order of their names; none where it matches nothing.

    ``*``, ``?`` and ``[...]`` stand for parts of a name, ``**`` for any folders or none, and at the end for what lies
    in them, too. Below ``**`` a link to a folder is a match like any other, and what lies in it is none. Names that
    begin with a dot are matched where the pattern has the dot; a pattern that ends in a slash matches folders alone.
    """
    if not pattern or "\0" in pattern:
        return []
    path = Path(pattern)
    parts = path.parts[1:] if path.anchor else path.parts
    single = [part for part, before in zip(parts, (None, *parts), strict=False) if not part == before == _ANY_DEPTH]
    found = sorted(set(_expanded(Path(path.anchor), single)))
    return [match for match in found if there(match.is_dir)] if pattern.endswith((os.sep, "/")) else found


def _expanded(top: Path, parts: Sequence[str]) -> Iterator[Path]:
    waiting = [(top, 0)]
    while waiting:
        folder, done = waiting.pop()
        if done == len(parts):
            if os.path.lexists(folder):
                yield folder
            continue
        first, rest = parts[done], done + 1
        if first == _ANY_DEPTH:
            for below in _walked(folder):
                waiting.append((below, rest))
                if rest == len(parts):
                    yield from (below / entry.name for entry in _entries(below) if not entry.name.startswith("."))
        elif _MAGIC.search(first):
            fits = re.compile(translate(first)).match
            names = (entry.name for entry in _entries(folder))
            shown = (name for name in names if first.startswith(".") or not name.startswith("."))
            waiting.extend((folder / name, rest) for name in shown if fits(name))
        else:
            waiting.append((folder / first, rest))


def _walked(folder: Path) -> Iterator[Path]:
    """Yield a folder and all below it, links and hidden ones left out."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        if there(here.is_dir):
            yield here
        waiting.extend(
            here / entry.name
            for entry in _entries(here)
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
        )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:  # no folder, or none that may be listed
        return []
