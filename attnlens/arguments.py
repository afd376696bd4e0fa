"""How messages name what was given: as options on the command line, as arguments in Python.

Messages are written with options, ``--num-heads``, and with ``MODEL`` for the model that is named. Who calls a function
of the package reads ``num_heads`` and ``model``. What stands in backticks is a command and stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

FLAGS = {
    "compile": "compiled=True",
    "force": "force=True",
    "freeze-filters": "freeze_filters=True",
    "include-channel": "include='channel'",
    "include-linear": "include='linear'",
    "no-compile": "compiled=False",
    "offline": "offline=True",
    "remote": "remote=True",
    "resume": "resume=True",
    "save-weights": "save_weights=True",
}
"""Options without a value, as Python writes them."""

NAMES = {"model-arg": "model_args"}
"""Options whose argument has another name than their own with underscores."""

NOT_OURS = frozenset({"nproc-per-node"})
"""Options of other programs."""

_WORD = r"[\w./-]*\w"
_VALUE = "|".join(
    (
        r"[A-Z]+\b",  # FILE
        r"'[^']*'",
        rf"{_WORD}(?:[,:=]{_WORD})+",  # qkv,head,dim and num_heads=N
        r"-?\d[\w.-]*\b",
        rf"{_WORD}(?=[,;:)]|\.?$|\. )",  # the last word of a phrase: what follows an option elsewhere goes on with it
    )
)
_OPTION = re.compile(rf"`[^`]*`|(?<![\w-])--(?P<name>[a-z][a-z-]*)(?: (?P<value>{_VALUE}))?|\bMODEL\b")
_told_as_options = False


@contextmanager
def as_options() -> Iterator[None]:
    """Leave options in messages as they are, inside the context: who reads them is on the command line."""
    global _told_as_options  # noqa: PLW0603  # one reader a process
    before, _told_as_options = _told_as_options, True
    try:
        yield
    finally:
        _told_as_options = before


def told(text: str) -> str:
    """Return a message as its reader writes calls: with options inside `as_options`, else with arguments."""
    return text if _told_as_options else in_python(text)


def in_python(text: str) -> str:
    """Write the options in a message as arguments.

    >>> in_python("give --num-heads N, or MODEL with --checkpoint FILE: `attnlens inspect --help`")
    'give num_heads=N, or model with checkpoint=FILE: `attnlens inspect --help`'
    >>> in_python("--offline and --remote exclude each other; use --device cpu")
    "offline=True and remote=True exclude each other; use device='cpu'"
    """
    return _OPTION.sub(_argument, text)


def _argument(found: re.Match[str]) -> str:
    if found[0] == "MODEL":
        return "model"
    name, value = found["name"], found["value"]
    rest = f" {value}" if value else ""
    if name in FLAGS:
        return f"{FLAGS[name]}{rest}"
    if name is None or name in NOT_OURS:
        return found[0]  # a command in backticks, or of another program
    argument = NAMES.get(name, name.replace("-", "_"))
    if not value:
        return argument
    if "=" in value:
        key, _, one = value.partition("=")
        return f"{argument}={{{key!r}: {one}}}"
    bare = value.isupper() or value.startswith("'") or _is_number(value)
    return f"{argument}={value if bare else repr(value)}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
