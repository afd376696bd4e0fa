"""Tables as CSV, whose cells no spreadsheet takes for a formula and no terminal for a command."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import IO, Any, TextIO

from attnlens.printable import printable

_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a cell begins with that spreadsheets compute, in either width."""


def csv_text(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table as CSV with line feeds: a header, then a line a row.

    None and what is no finite number are empty cells. Text is written by `printable`, so that a cell is one line, and
    behind an apostrophe where it begins as a formula does, white space left out; numbers are as Python writes them.
    """
    return csv_rows([columns]) + csv_rows(rows)


def csv_rows(rows: Iterable[Iterable[Any]]) -> str:
    """Return rows as `csv_text` writes those of a table."""
    buffer = io.StringIO()
    _write(buffer, rows)
    return buffer.getvalue()


def write_csv(file: IO[bytes], columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write what `csv_text` returns, row by row."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        _write(text, [columns])
        _write(text, rows)
        text.flush()
    finally:
        text.detach()


def _write(file: TextIO, rows: Iterable[Iterable[Any]]) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else value


@lru_cache(1 << 10)  # most tables say the same few words in every row
def _text(value: str) -> str:
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text
