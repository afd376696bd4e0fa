"""How numbers stand in sentences: one and many, p-values as people write them."""

from __future__ import annotations

import math


def counted(number: int, one: str, many: str | None = None) -> str:
    """Write a number with what it counts: ``1 model``, ``2 models``; ``many`` where that is not ``one`` with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def p_text(value: float, digits: int = 3) -> str:
    """Write a p-value without the zero in front: ``.042``, ``< .001``, ``> .999``; ``none`` for NaN."""
    if math.isnan(value):
        return "none"
    if value < 10**-digits:
        return f"< {10**-digits:.{digits}f}".replace("0.", ".")
    if round(value, digits) >= 1:
        return "1" if value == 1 else f"> {1 - 10**-digits:.{digits}f}".replace("0.", ".")
    return f"{value:.{digits}f}".removeprefix("0")
