"""How numbers stand in sentences: one and many, p-values as people write them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import PurePath


def counted(number: int, one: str, many: str | None = None) -> str:
    """Write a number with what it counts: ``1 model``, ``2 models``; ``many`` where that is not ``one`` with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def listed(names: Sequence[str], one: str, most: int = 3) -> str:
    """Name a few things, ``a, b and c``; write how many there are of more than ``most``."""
    if len(names) > most:
        return counted(len(names), one)
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def numbered(indices: Iterable[int], one: str, many: str | None = None) -> str:
    """Write which of several things, by index and as ranges: ``layer 3``, ``layers 0-3, 11``."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    what = one if sum(map(len, runs)) == 1 else many or f"{one}s"
    return f"{what} {', '.join(str(run[0]) if len(run) == 1 else f'{run[0]}-{run[-1]}' for run in runs)}"


def p_text(value: float, digits: int = 3) -> str:
    """Write a p-value without the zero in front: ``.042``, ``< .001``, ``> .999``; ``none`` for NaN."""
    if math.isnan(value):
        return "none"
    if value < 10**-digits:
        return f"< {10**-digits:.{digits}f}".replace("0.", ".")
    if round(value, digits) >= 1:
        return "1" if value == 1 else f"> {1 - 10**-digits:.{digits}f}".replace("0.", ".")
    return f"{value:.{digits}f}".removeprefix("0")


def told_apart(names: Sequence[str], paths: Sequence[str | None]) -> list[str]:
    """Return names that differ: those that occur twice by the folders their paths differ in, else by a number."""
    found = list(names)
    for name in dict.fromkeys(names):
        places = [place for place, other in enumerate(names) if other == name]
        if len(places) > 1:
            for place, new in zip(places, _by_folders(name, [paths[place] for place in places]), strict=True):
                found[place] = new
    return found


def _by_folders(name: str, paths: Sequence[str | None]) -> list[str]:
    parts = [PurePath(path).parts if path else () for path in paths]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        tails = ["/".join(part[-depth:]) for part in parts]
        if all(tails) and len(set(tails)) == len(tails):
            return tails
    return [f"{name} ({number})" for number in range(1, len(paths) + 1)]
