"""Errors a user can act on: each says what was wrong, the value given, what is accepted and what to do."""

from __future__ import annotations

from typing import Any

from attnlens.arguments import told
from attnlens.printable import one_line


class AttnlensError(Exception):
    """Base of every error attnlens raises on purpose; its text is one printable line, whatever files call things."""

    def __str__(self) -> str:
        """Return the text, made safe for a terminal by `attnlens.printable`, naming arguments or options as is read."""
        return one_line(told(super().__str__()))


class UsageError(AttnlensError, ValueError):
    """The call itself is wrong: an option value that is not accepted (exit code 2 on the command line)."""


class ModelNotFoundError(AttnlensError):
    """No architecture of that name, or no weights for it that can be reached."""


class CheckpointError(AttnlensError):
    """A weight file is missing, truncated, corrupt, unsafe, or does not hold what the architecture needs."""


class UnsupportedAttentionError(AttnlensError):
    """The attention of a module is of a family whose product would not mean what the table says."""


class OutputError(AttnlensError, OSError):
    """A result could not be written; nothing half-written is left behind."""


class ParamsError(AttnlensError, ValueError):
    """A parameter file is not valid; the text names the file and the field."""


def first_problem(error: Any) -> str:
    """Return which field of data pydantic refuses first, and why, in a line."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "the whole"
    return f"{field}: {first['msg']}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error that says something, else its class."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
