"""The tables of a scan: a row a layer, circuit and fold of every model, and a row a model and fold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnlens.circuits import Fold, Kind
from attnlens.heads import Array
from attnlens.statistics.depth import relative_depth
from attnlens.statistics.table import ALL_HEADS, Row, StatsTable
from attnlens.strict_json import finite_or_none

LAYER_COLUMNS = (
    "layer",
    "relative_depth",
    "circuit",
    "fold",
    "alpha",
    "beta",
    "ratio",
    "diagonal_prominence",
    "identity_share",
)
"""``qk`` rows are means over heads, ``ov`` rows are of the heads' sum. ``ratio`` is beta / alpha, ``identity_share``
the identity cosine over its bound, ``relative_depth`` 0 at the first attention layer, 1 at the last and 1/2 in a model
of one layer, as everywhere."""

_MEDIANS = ("alpha", "beta", "ratio", "diagonal_prominence", "identity_share")
MODEL_COLUMNS = (
    "model",
    "status",
    "fold",
    "architecture",
    "depth",
    "layers",
    "heads",
    "head_dim",
    *(f"{circuit}_{name}" for circuit in ("qk", "ov") for name in _MEDIANS),
    "ov_negative_share",
    "leaves_out",
    "labels",
    "error",
)
"""Statistics are medians over layers; ``ov_negative_share`` is the share of layers whose summed OV has beta < 0;
``labels`` say how a layout was found where the model does not say it itself."""

GRID = np.linspace(0, 1, 41)
"""Relative depths at which the models' curves are brought together."""

Result = dict[str, Any]


def layer_records(stats: StatsTable, depth: int) -> list[list[Any]]:
    """Return rows under `LAYER_COLUMNS`, None for what is not defined."""
    places = {name: stats.columns.index(name) for name in stats.columns}
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in stats.rows:
        key = tuple(row[places[name]] for name in ("layer", "circuit", "fold"))
        if (row[places["head"]] == ALL_HEADS) == (key[1] == "ov"):
            groups.setdefault(key, []).append(row)
    found = []
    for (layer, circuit, fold), rows in groups.items():
        table = StatsTable(tuple(rows), stats.columns)
        alpha, beta = table.column("alpha"), table.column("beta")
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = beta / alpha
        values = (alpha, beta, ratio, table.column("diagonal_prominence"), table.column("identity_share"))
        means = (finite_or_none(float(value.mean())) for value in values)
        found.append([layer, relative_depth(layer, depth), circuit, fold, *means])
    return found


def model_rows(name: str, result: Result) -> list[dict[str, Any]]:
    """Return a row of `MODEL_COLUMNS` for every fold of a model, one row for a model that failed."""
    common = {"model": name, "status": result["status"]}
    if result["status"] != "ok":
        return [{**common, "error": result["error"]}]
    about = {key: result[key] for key in ("architecture", "depth", "layers", "heads", "head_dim", "leaves_out")}
    about["labels"] = "; ".join(result.get("labels", ()))
    return [{**common, "fold": fold, **about, **_medians(result["table"], fold)} for fold in result["folds"]]


def _medians(table: Sequence[Sequence[Any]], fold: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for circuit in ("qk", "ov"):
        rows = [dict(zip(LAYER_COLUMNS, row, strict=True)) for row in table if (row[2], row[3]) == (circuit, fold)]
        for name in _MEDIANS:
            values = [row[name] for row in rows if row[name] is not None]
            found[f"{circuit}_{name}"] = float(np.median(values)) if values else None
        if circuit == "ov":
            signs = [row["beta"] < 0 for row in rows if row["beta"] is not None]
            found["ov_negative_share"] = float(np.mean(signs)) if signs else None
    return found


@dataclass(frozen=True)
class Curve:
    """One statistic of one circuit of one model against relative depth."""

    model: str
    group: str
    depth: Array
    value: Array


@dataclass(frozen=True)
class Spread:
    """Quartiles over models of a statistic at each relative depth of `GRID`."""

    low: Array
    median: Array
    high: Array


def curves(results: Mapping[str, Result], circuit: Kind, fold: Fold, statistic: str = "ratio") -> list[Curve]:
    """Return the curve of every model that has the statistic for at least one layer."""
    place = LAYER_COLUMNS.index(statistic)
    found = []
    for name, result in results.items():
        rows = [row for row in result.get("table", ()) if (row[2], row[3]) == (circuit, fold)]
        points = [(row[1], row[place]) for row in rows if row[place] is not None]
        if points:
            depth, value = np.array(sorted(points), dtype=np.float64).T
            found.append(Curve(name, result["group"], depth, value))
    return found


def spread(found: Iterable[Curve]) -> Spread:
    """Interpolate every curve of two layers or more at `GRID`, inside its own range, and take quartiles over models."""
    at_grid = [
        np.interp(GRID, curve.depth, curve.value, left=np.nan, right=np.nan) for curve in found if len(curve.depth) > 1
    ]
    if not at_grid:
        nothing = np.full(len(GRID), np.nan)
        return Spread(nothing, nothing, nothing)
    columns = [column[~np.isnan(column)] for column in np.array(at_grid).T]
    quartiles = [np.quantile(column, [0.25, 0.5, 0.75]) if len(column) else np.full(3, np.nan) for column in columns]
    return Spread(*np.array(quartiles).T)
