"""A table's first and last rows, as text for a terminal and as HTML for a notebook."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from attnlens.printable import printable
from attnlens.words import counted

WIDTH = 79
"""Characters of a line of text."""
TEXT_ROWS, HTML_ROWS = 10, 20
"""Rows shown at most, half of them from the end."""
_WIDEST = 28
_GAP = "  "


def cell(value: Any) -> str:
    """Write one value: four significant digits, nothing for what is not defined."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def text_preview(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return the ends of a table as lines of at most `WIDTH` characters; a last line says what has no room."""
    shown = _ends(rows, TEXT_ROWS)
    texts: list[list[str]] = [
        [name, *("..." if row is None else _short(row[i]) for row in shown)] for i, name in enumerate(columns)
    ]
    room, kept = WIDTH, 0
    for column in texts:
        room -= max(map(len, column)) + (len(_GAP) if kept else 0)
        if room < 0:
            break
        kept += 1
    aligned = [_aligned(column, [row[i] for row in shown if row is not None]) for i, column in enumerate(texts[:kept])]
    lines = [_GAP.join(cells).rstrip() for cells in zip(*aligned, strict=True)]
    left = list(columns[kept:])
    if left:
        lines.append(_listed(f"and {counted(len(left), 'more column')}: ", left))
    return "\n".join(lines)


def html_preview(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str) -> str:
    """Return the ends of a table as an HTML fragment, every column of it, escaped."""
    from attnlens.templates import environment

    return (
        environment()
        .get_template("table.html.j2")
        .render(
            title=title,
            head=columns,
            rows=shown_rows(rows),
            numeric=[all(isinstance(row[place], int | float) for row in rows) for place in range(len(columns))],
        )
    )


def shown_rows(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    """Return the ends of a table as a page writes their cells, an ellipsis where rows are left out."""
    return [["…"] * len(rows[0]) if row is None else list(map(cell, row)) for row in _ends(rows, HTML_ROWS)]


def _ends(rows: Sequence[Sequence[Any]], most: int) -> list[Sequence[Any] | None]:
    """Return all rows where there are few, else the first and last ones with None between them."""
    if len(rows) <= most:
        return list(rows)
    return [*rows[: most // 2], None, *rows[-(most // 2) :]]


def _short(value: Any) -> str:
    text = printable(" ".join(cell(value).split()))
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3]}..."


def _aligned(texts: Sequence[str], values: Sequence[Any]) -> list[str]:
    width = max(map(len, texts))
    numbers = all(isinstance(value, int | float) for value in values)
    return [text.rjust(width) if numbers else text.ljust(width) for text in texts]


def _listed(start: str, names: Sequence[str]) -> str:
    """Name as many columns as a line has room for."""
    line = start
    for place, name in enumerate(names):
        piece = name if place == len(names) - 1 else f"{name}, "
        if len(line) + len(piece) + (0 if place == len(names) - 1 else 3) > WIDTH:
            return f"{line}..."
        line += piece
    return line
