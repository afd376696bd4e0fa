"""The table of statistics: a row per layer, head, circuit and fold; written as CSV, JSON or a pandas frame."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.atomic import write_text_atomic
from attnlens.csv_text import csv_text
from attnlens.errors import UsageError
from attnlens.heads import Array
from attnlens.statistics.diagonal import DiagonalFit
from attnlens.statistics.gains import GainStatistics
from attnlens.strict_json import finite_or_none
from attnlens.vocabulary import CIRCUIT, COMPOSED, FOLD, HEADS, Vocabulary, index
from attnlens.vocabulary import column as column_name

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


@dataclass(frozen=True)
class StatsTable:
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

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def records(self) -> Iterator[dict[str, Value]]:
        """Yield each row as a dictionary."""
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows)

    def select(self, **keys: Value) -> StatsTable:
        """Keep the rows whose columns equal the values given, e.g. ``select(circuit="ov", head="all")``.

        Raises `UsageError` for a column that is not there, and for a circuit, fold or head that is none.
        """
        named = {column_name(name, self.columns): value for name, value in keys.items()}
        places = {self.columns.index(name): _word(name, value) for name, value in named.items()}
        return StatsTable(tuple(r for r in self.rows if all(r[p] == v for p, v in places.items())), self.columns)

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

    def to_pandas(self) -> pd.DataFrame:
        """Return the table as a pandas frame (needs pandas: ``pip install attnlens[pandas]``)."""
        import pandas as pd

        return pd.DataFrame(list(self.rows), columns=list(self.columns))

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


def _json_row(record: dict[str, Value]) -> dict[str, Any]:
    return {name: finite_or_none(value) for name, value in record.items()}


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text_atomic(path, text)
    return text
