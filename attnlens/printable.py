"""Text out of files on its way to a terminal: nothing in it moves the cursor, hides or turns what stands there."""

from __future__ import annotations

import re

LONGEST = 1200
"""Characters of an error's text; of a longer one the middle is left out, as what to do stands at the end."""

_TAIL = 400
_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def printable(text: str, keep: str = "") -> str:
    r"""Write every character that is not printable as Python would escape it, save those in ``keep``.

    Control characters and terminal escapes, format characters such as those that turn the direction of writing, and
    halves of surrogate pairs are not printable. Example: ``printable("a\x1b[2J")`` is ``a\x1b[2J`` in plain letters.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Return `printable` text without line breaks, of at most `LONGEST` characters."""
    if len(text) > 4 * LONGEST:  # a name of a gigabyte is not looked at as a whole
        text = f"{text[: 2 * LONGEST]} ... {text[-2 * LONGEST :]}"
    line = printable(_BREAKS.sub(" ", text.strip()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - _TAIL - 5]} ... {line[-_TAIL:]}"
