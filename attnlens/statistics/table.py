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
from attnlens.heads import Array
from attnlens.statistics.diagonal import DiagonalFit
from attnlens.statistics.gains import GainStatistics
from attnlens.strict_json import finite_or_none

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("layer", "head", "circuit", "fold")
ALL_HEADS = "all"
"""The ``head`` of a row that is about a layer's summed OV product."""

RATIOS = {"identity_share": ("identity_cosine", "identity_cosine_bound")}
"""Statistics that are one column over another, and no column of their own."""

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
        """Keep the rows whose columns equal the values given, e.g. ``select(circuit="ov", head="all")``."""
        places = {self.columns.index(name): value for name, value in keys.items()}
        return StatsTable(tuple(r for r in self.rows if all(r[p] == v for p, v in places.items())), self.columns)

    def column(self, name: str) -> Array:
        """Return a numeric column, or one of `RATIOS`, as float64."""
        if name in RATIOS:
            over, under = (self.column(part) for part in RATIOS[name])
            with np.errstate(divide="ignore", invalid="ignore"):
                return over / under
        place = self.columns.index(name)
        return np.array([row[place] for row in self.rows], dtype=np.float64)

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


def _json_row(record: dict[str, Value]) -> dict[str, Any]:
    return {name: finite_or_none(value) for name, value in record.items()}


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_text_atomic(path, text)
    return text
