"""Text out of files on its way to a terminal or a page: nothing in it moves, hides or turns what stands there."""

from __future__ import annotations

import json
import re
from typing import Any

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
_NOT_PLAIN = re.compile(r"[^\n -~]")
_MARKUP = re.compile(r"[\\`*\[\]~|$]|(?<![^\W_])_|_(?![^\W_])|<(?=[A-Za-z/!?])|&(?=#?\w+;)")
_HTML = {"<": "&lt;", "&": "&amp;"}
_BREAKS = re.compile(r"(?<!\s)\s*?[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")


def printable(text: str, keep: str = "") -> str:
    r"""Write every character that is not printable as Python would escape it, save those in ``keep``.

    Control characters and terminal escapes, format characters such as those that turn the direction of writing, and
    halves of surrogate pairs are not printable. Example: ``printable("a\x1b[2J")`` is ``a\x1b[2J`` in plain letters.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def printable_json(text: str) -> str:
    r"""Write what is not printable in a JSON text as JSON escapes it: ``\u00a0``, where Python would write ``\xa0``."""
    return _NOT_PLAIN.sub(lambda found: found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1], text)


def utf8_text(name: str) -> str:
    r"""Return the name of a file as text that UTF-8 can hold: bytes that are no UTF-8 become escapes, ``\xff``."""
    return name if name.isascii() else _SURROGATE.sub(_escaped, name)


def utf8_data(data: Any) -> Any:
    """Return data for JSON, every text in it as `utf8_text` has it: others refuse, or lose, halves of pairs."""
    if isinstance(data, dict):
        return {utf8_data(name): utf8_data(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [utf8_data(value) for value in data]
    return utf8_text(data) if isinstance(data, str) else data


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


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def in_markdown(text: str) -> str:
    r"""Return `printable` text as Markdown shows it letter for letter: no markup, no HTML, no cell of a table begins.

    Example: ``in_markdown("a*b|<i>")`` is ``a\*b\|&lt;i>``. Of `Markdown` cells alone are kept from beginning.
    """
    if isinstance(text, Markdown):
        return text.replace("|", "\\|")
    return _MARKUP.sub(lambda found: _HTML.get(found[0], f"\\{found[0]}"), printable(text))


def as_code(text: str) -> Markdown:
    """Return `printable` text as a code span of Markdown, in more backticks than the text has side by side."""
    text = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    room = " " * (text.startswith("`") or text.endswith("`"))  # which is no part of the code
    return Markdown(f"{fence}{room}{text}{room}{fence}")


def one_line(text: str) -> str:
    """Return `printable` text without line breaks, of at most `LONGEST` characters."""
    if len(text) > 4 * LONGEST:  # a name of a gigabyte is not looked at as a whole
        text = f"{text[: 2 * LONGEST]} ... {text[-2 * LONGEST :]}"
    line = printable(_BREAKS.sub(" ", text.strip()))
    return line if len(line) <= LONGEST else f"{line[: LONGEST - _TAIL - 5]} ... {line[-_TAIL:]}"
