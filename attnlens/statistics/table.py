"""The table of statistics: a row per layer, head, circuit and fold; written as CSV, JSON or a pandas frame."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from attnlens.atomic import write_text_atomic
from attnlens.csv_text import csv_text
from attnlens.errors import UsageError
from attnlens.heads import Array
from attnlens.printable import printable
from attnlens.statistics.diagonal import DiagonalFit
from attnlens.statistics.gains import GainStatistics
from attnlens.statistics.preview import html_preview, text_preview
from attnlens.strict_json import finite_or_none
from attnlens.vocabulary import CIRCUIT, COMPOSED, FOLD, HEADS, Vocabulary, index
from attnlens.vocabulary import column as column_name
from attnlens.words import counted

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("layer", "head", "circuit", "fold")
ALL_HEADS = "all"
"""The ``head`` of a row that is about a layer's summed OV product."""

RATIOS = {"identity_share": ("identity_cosine", "identity_cosine_bound")}
"""Statistics that are one column over another, and no column of their own."""

_WORDS: dict[str, Vocabulary] = {"circuit": CIRCUIT, "fold": FOLD, "kind": COMPOSED}
Value = int | float | str
Row = tuple[Value, ...]


class Tabular:
    """What every result shares: it is iterated, indexed and shown by the rows of its main table.

    ``len(result)`` counts rows, ``for row in result`` yields each as a dictionary, ``result[0]`` and ``result[-1]`` are
    such rows, ``result[:5]`` is a `StatsTable` of some and ``result["beta"]`` a column as an array.
    """

    def _table(self) -> StatsTable:
        raise NotImplementedError

    def _headline(self) -> str:
        """Say in a line what this is a result of."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._table().rows)

    def __bool__(self) -> bool:
        """Return True: a result is there, whatever its number of rows."""
        return True

    def __iter__(self) -> Iterator[dict[str, Value]]:
        """Yield each row as a dictionary."""
        table = self._table()
        return (dict(zip(table.columns, row, strict=True)) for row in table.rows)

    @overload
    def __getitem__(self, key: int) -> dict[str, Value]: ...
    @overload
    def __getitem__(self, key: slice) -> StatsTable: ...
    @overload
    def __getitem__(self, key: str) -> NDArray[Any]: ...
    def __getitem__(self, key: int | slice | str) -> dict[str, Value] | StatsTable | NDArray[Any]:
        """Return a row as a dictionary, a table of a slice of rows, or a column by its name.

        Raises `UsageError` for a column that is not there, `IndexError` for such a row.
        """
        table = self._table()
        if isinstance(key, str):
            return table.values(key)
        if isinstance(key, slice):
            return StatsTable(table.rows[key], table.columns)
        try:
            row = table.rows[key]
        except IndexError:
            raise IndexError(f"row {key} does not exist: there are {len(table.rows)}") from None
        except TypeError:
            raise UsageError(f"{key!r} is no index: give the number of a row, a slice or a column's name") from None
        return dict(zip(table.columns, row, strict=True))

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a pandas frame. Raises `UsageError` where pandas is not installed."""
        try:
            import pandas as pd
        except ImportError as error:
            raise UsageError(
                "to_pandas needs pandas, which is not installed: pip install 'attnlens[pandas]'"
            ) from error
        table = self._table()
        return pd.DataFrame(list(table.rows), columns=list(table.columns))

    def __repr__(self) -> str:
        """Say what this is, and show the first and last rows: what fits a screen."""
        table = self._table()
        return "\n".join(filter(None, (f"<{printable(self._headline())}>", text_preview(table.columns, table.rows))))

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the first and last rows with every column."""
        table = self._table()
        return html_preview(table.columns, table.rows, self._headline())


@dataclass(frozen=True, repr=False)
class StatsTable(Tabular):
    """Rows of statistics under ``columns``, which begin layer, head, circuit, fold, alpha, beta.

    ``circuit`` is ``qk`` or ``ov``; ``head`` an index, or ``all`` for the layer's summed OV; ``fold`` is ``raw``,
    ``effective``, ``centred`` or ``balanced``. A statistic that is not defined is NaN: an empty cell in CSV, null in
    JSON.
    """

    rows: tuple[Row, ...]
    columns: tuple[str, ...] = (
        *KEYS,
        *DiagonalFit.names(),
        *GainStatistics.names(),
        "num_heads",
        "name",
        "leaves_out",
    )

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> StatsTable:
        """Make a table of records, by default under the names of the first; what is None or not there is NaN."""
        found = list(records)
        names = tuple(columns if columns is not None else found[0] if found else ())
        return cls(tuple(tuple(_value(record.get(name)) for name in names) for record in found), names)

    def _table(self) -> StatsTable:
        return self

    def _headline(self) -> str:
        return f"{type(self).__name__} of {counted(len(self.rows), 'row')} and {counted(len(self.columns), 'column')}"

    def __bool__(self) -> bool:
        """Return whether there are rows."""
        return bool(self.rows)

    def records(self) -> Iterator[dict[str, Value]]:
        """Yield each row as a dictionary."""
        return iter(self)

    def values(self, name: str) -> NDArray[Any]:
        """Return a column, of numbers as float64 and of words as they are. Raises `UsageError` for another."""
        if name in self.columns:
            place = self.columns.index(name)
            if any(isinstance(row[place], str) for row in self.rows):
                return np.array([row[place] for row in self.rows], dtype=object)
        return self.column(name)

    def select(self, **keys: Value) -> StatsTable:
        """Keep the rows whose columns equal the values given, e.g. ``select(circuit="ov", head="all")``.

        Raises `UsageError` for a column that is not there, and for a circuit, fold or head that is none.
        """
        named = {column_name(name, self.columns): value for name, value in keys.items()}
        places = {self.columns.index(name): _word(name, value) for name, value in named.items()}
        return StatsTable(tuple(r for r in self.rows if all(r[p] == v for p, v in places.items())), self.columns)

    def by(self, name: str) -> dict[Value, StatsTable]:
        """Return the rows by what a column holds, one table a value, as `select` finds them: all in one pass.

        A value that no row holds gives an empty table. Raises `UsageError` for a column that is not there.
        """
        place = self.columns.index(column_name(name, self.columns))
        found: dict[Value, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row[place], []).append(row)
        return defaultdict(
            lambda: StatsTable((), self.columns),
            {value: StatsTable(tuple(rows), self.columns) for value, rows in found.items()},
        )

    def column(self, name: str) -> Array:
        """Return a numeric column, or one of `RATIOS`, as float64. Raises `UsageError` for another."""
        ratios = [ratio for ratio, parts in RATIOS.items() if set(parts) <= set(self.columns)]
        name = column_name(name, (*self.columns, *ratios))
        if name in RATIOS:
            over, under = (self.column(part) for part in RATIOS[name])
            with np.errstate(divide="ignore", invalid="ignore"):
                return over / under
        place = self.columns.index(name)
        values = [row[place] for row in self.rows]
        if any(isinstance(value, str) for value in values):
            raise UsageError(f"column {name!r} holds words, no numbers: select() chooses rows by it")
        return np.array(values, dtype=np.float64)

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return the table as CSV; also write it to ``path`` when given."""
        return _written(csv_text(self.columns, self.rows), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the rows as a JSON list of objects; also write it to ``path`` when given."""
        return _written(json.dumps([_json_row(record) for record in self.records()], indent=1), path)

    def json_rows(self) -> list[dict[str, Any]]:
        """Return the rows as JSON-ready objects, undefined statistics as None."""
        return [_json_row(record) for record in self.records()]


def _word(name: str, value: Any) -> Any:
    """Return what a row holds for a value that a person gives of a column with words or indices of its own."""
    if name in _WORDS:
        return _WORDS[name](value)
    if name == "head" and isinstance(value, str):
        if HEADS.find(value) != ALL_HEADS:
            raise UsageError(f"head {value!r} is neither an index nor 'all', the layer's sum")
        return ALL_HEADS
    return index(name, value) if name in ("layer", "head", "from_layer", "from_head") else value


def _value(value: Any) -> Value:
    if value is None:
        return float("nan")
    return value if isinstance(value, int | float | str) else " × ".join(map(str, value))


def _json_row(record: dict[str, Value]) -> dict[str, Any]:
    return {name: finite_or_none(value) for name, value in record.items()}


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text_atomic(path, text)
    return text
