"""Tables that keep their numbers at any width: labels shrink first, then columns move to a further table below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from attnlens.printable import printable, spelled

if TYPE_CHECKING:
    from rich.box import Box
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

_LABEL = 12
"""Cells a label keeps where others need the room; its longest word if that is shorter."""


@dataclass(frozen=True)
class Column:
    """One column: a number, which is never cut, or a ``label``, which is folded at ``least`` cells or more."""

    name: str
    label: bool = False
    key: bool = False
    """Whether it stands in front of every part of a table that was split."""
    group: int = 0
    """Columns of one group stay together where there is room."""
    least: int = 0


@dataclass
class Sheet:
    """A table on its way to a terminal. Title, captions and string cells may hold rich's markup, so `escape` names."""

    title: str
    caption: str = ""
    """Paragraphs, each a line where there is room for it"""
    columns: list[Column] = field(default_factory=list)
    rows: list[tuple[list[Text], str, bool]] = field(default_factory=list)
    """Cells, style, and whether a section ends with the row"""

    def number(self, *names: str, group: int = 0, key: bool = False) -> None:
        """Add columns of numbers, flushed right."""
        self.columns += [Column(name, group=group, key=key) for name in names]

    def label(self, *names: str, group: int = 0, key: bool = False, least: int = 0) -> None:
        """Add columns of words, flushed left."""
        self.columns += [Column(name, label=True, group=group, key=key, least=least) for name in names]

    def add_row(self, *cells: str | Text, style: str = "", end_section: bool = False) -> None:
        """Add a row; cells that are not given are empty, and no cell breaks its line."""
        from rich.text import Text

        filled = [*cells, *[""] * (len(self.columns) - len(cells))]
        texts = [Text.from_markup(printable(cell)) if isinstance(cell, str) else cell for cell in filled]
        self.rows.append((texts, style, end_section))

    def add_section(self) -> None:
        """End a section with the last row."""
        if self.rows:
            cells, style, _ = self.rows[-1]
            self.rows[-1] = (cells, style, True)

    def natural_width(self, encoding: str = "utf-8") -> int:
        """Return the width at which nothing is folded or moved, the title included."""
        from rich.text import Text

        title = max(len(line) for line in Text.from_markup(spelled(self.title, encoding)).plain.split("\n"))
        return max(title, self._columns_width(encoding))

    def _columns_width(self, encoding: str) -> int:
        return _width([self._natural(place, encoding) for place in range(len(self.columns)) if not self._empty(place)])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield title, the parts of the table that the width asks for, and caption."""
        from rich.text import Text

        encoding = options.encoding
        if self.title:
            yield Text.from_markup(spelled(self.title, encoding), overflow="fold")
        for part in self.parts(options.max_width, encoding):
            yield self._drawn(part, console, encoding)
        for paragraph in filter(None, self.caption.split("\n")):
            yield Text.from_markup(f"[dim italic]{spelled(paragraph, encoding)}[/]", overflow="fold")

    def parts(self, width: int, encoding: str = "utf-8") -> list[dict[int, int]]:
        """Return the tables to draw, each as the places of its columns with their widths in cells."""
        least = [self._least(place, encoding) for place in range(len(self.columns))]
        keys = [place for place, column in enumerate(self.columns) if column.key]
        others = [place for place, column in enumerate(self.columns) if not (column.key or self._empty(place))]
        if _width([least[place] for place in (*keys, *others)]) <= width:
            blocks = [others]
        else:
            blocks = _blocks(
                [self._group(place, others) for place in dict.fromkeys(map(self._of, others))], least, keys, width
            )
        return [
            self._widened({place: least[place] for place in sorted([*keys, *block])}, width, encoding)
            for block in blocks
        ]

    def _empty(self, place: int) -> bool:
        """Whether a label has nothing to say in any row."""
        return self.columns[place].label and not any(cells[place].plain for cells, _, _ in self.rows)

    def _of(self, place: int) -> int:
        return self.columns[place].group

    def _group(self, group: int, places: Sequence[int]) -> list[int]:
        return [place for place in places if self.columns[place].group == group]

    def _cells(self, place: int, encoding: str) -> Iterator[int]:
        from rich.cells import cell_len

        return (cell_len(spelled(cells[place].plain, encoding)) for cells, _, _ in self.rows)

    def _natural(self, place: int, encoding: str) -> int:
        from rich.cells import cell_len

        return max(cell_len(spelled(self.columns[place].name, encoding)), *self._cells(place, encoding), 1)

    def _least(self, place: int, encoding: str) -> int:
        """Return the cells a column needs: of a number all, of a label its `least`, of a heading its longest word."""
        column = self.columns[place]
        heading = max((len(word) for word in spelled(column.name, encoding).split()), default=1)
        body = max([*self._cells(place, encoding), 1])
        return max(heading, min(body, column.least or _LABEL) if column.label else body)

    def _widened(self, part: dict[int, int], width: int, encoding: str) -> dict[int, int]:
        """Give the room that is left to the headings that are broken and the labels that are folded, evenly."""
        wanted = {place: self._natural(place, encoding) for place in part}
        room = width - _width(list(part.values()))
        while room > 0 and any(part[place] < wanted[place] for place in part):
            for place in sorted(part, key=lambda place: self.columns[place].label):  # headings first
                if part[place] < wanted[place] and room > 0:
                    part = {**part, place: part[place] + 1}
                    room -= 1
        return part

    def _drawn(self, part: dict[int, int], console: Console, encoding: str) -> Table:
        from rich import box
        from rich.table import Table

        plain = not encoding.lower().startswith("utf")
        table = Table(box=_ascii_box() if plain else box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for place, cells in part.items():
            column = self.columns[place]
            name = spelled(column.name, encoding)
            table.add_column(name, justify="left" if column.label else "right", width=cells, overflow="fold")
        for cells_of, style, end in self.rows:
            chosen = [_respelled(cells_of[place], encoding, console) for place in part]
            table.add_row(*chosen, style=style or None, end_section=end)
        return table


def _width(columns: Sequence[int]) -> int:
    """Return the width of a table: two cells a column go to what separates them."""
    return sum(columns) + 2 * len(columns)


def _blocks(groups: Sequence[list[int]], least: Sequence[int], keys: Sequence[int], width: int) -> list[list[int]]:
    """Split columns into tables that fit, groups whole where one table has room for them."""
    head = _width([least[place] for place in keys])
    blocks: list[list[int]] = [[]]

    def room(places: Sequence[int]) -> bool:
        return head + _width([least[place] for place in (*blocks[-1], *places)]) <= width

    for group in groups:
        whole = head + _width([least[place] for place in group]) <= width
        for places in [group] if whole else [[place] for place in group]:
            if blocks[-1] and not room(places):
                blocks.append([])
            blocks[-1] += places
    return blocks


def _respelled(cell: Text, encoding: str, console: Console) -> Text:
    """Return a cell in characters that the terminal has, styles kept."""
    if spelled(cell.plain, encoding) == cell.plain:
        return cell
    from rich.text import Text

    pieces = (
        (spelled(mark, encoding), cell.get_style_at_offset(console, place)) for place, mark in enumerate(cell.plain)
    )
    return Text.assemble(*pieces)


def _ascii_box() -> Box:
    from rich.box import Box

    return Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
