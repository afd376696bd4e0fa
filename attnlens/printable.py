"""Text out of files on its way to a terminal: nothing in it moves the cursor, hides or turns what stands there."""

from __future__ import annotations

import re

SPELLED = {
    "α": "alpha",
    "β": "beta",
    "▲": "P",
    "△": "p",
    "▽": "n",
    "▼": "N",
    "·": ".",
    "±": "+-",
    "÷": "/",
    "×": "x",
    "√": "sqrt ",
    "²": "^2",
    "ᵀ": "^T",
    "–": "-",
    "\u2212": "-",  # minus
    "→": "->",
    "✓": "ok",
    "✗": "no",
    "“": '"',
    "”": '"',
    "…": "...",
}
"""What stands for a character of ours on a terminal that has not got it; others are escaped."""

LONGEST = 1200
"""Characters of an error's text; of a longer one the middle is left out, as what to do stands at the end."""

_TAIL = 400
_SURROGATE = re.compile("[\ud800-\udfff]")
_BREAKS = re.compile(r"\s*[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def printable(text: str, keep: str = "") -> str:
    r"""Write every character that is not printable as Python would escape it, save those in ``keep``.

    Control characters and terminal escapes, format characters such as those that turn the direction of writing, and
    halves of surrogate pairs are not printable. Example: ``printable("a\x1b[2J")`` is ``a\x1b[2J`` in plain letters.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def utf8_text(name: str) -> str:
    r"""Return the name of a file as text that UTF-8 can hold: bytes that are no UTF-8 become escapes, ``\xff``."""
    return name if name.isascii() else _SURROGATE.sub(_escaped, name)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"\\u{code:04x}"


def spelled(text: str, encoding: str) -> str:
    """Return text in characters that an encoding has: ``alpha`` for a Greek letter, an escape for what is not known."""
    if text.isascii():
        return text
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "".join(_in_encoding(mark, encoding) for mark in text)
    return text


def spell_out(error: UnicodeError) -> tuple[str, int]:
    """Replace what a stream cannot encode, as `spelled` does: a handler for `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(SPELLED.get(mark, ascii(mark)[1:-1]) for mark in lost), error.end


def _in_encoding(mark: str, encoding: str) -> str:
    try:
        mark.encode(encoding)
    except UnicodeEncodeError:
        return SPELLED.get(mark, ascii(mark)[1:-1])
    except LookupError:
        return SPELLED.get(mark, ascii(mark)[1:-1]) if not mark.isascii() else mark
    return mark


def one_line(text: str) -> str:
    """Return `printable` text without line breaks, of at most `LONGEST` characters."""
    if len(text) > 4 * LONGEST:  # a name of a gigabyte is not looked at as a whole
        text = f"{text[: 2 * LONGEST]} ... {text[-2 * LONGEST :]}"
    line = printable(_BREAKS.sub(" ", text.strip()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - _TAIL - 5]} ... {line[-_TAIL:]}"
