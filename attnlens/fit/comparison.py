"""Comparing models: the same depth profiles side by side, and how far apart two models' structures are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnlens.circuits import Fold, Kind, parse_folds
from attnlens.csv_text import csv_text
from attnlens.drawn import Drawn
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.filters.comparison import FilterProfile, filter_distances, filter_profiles
from attnlens.inspection import Inspection, inspect
from attnlens.statistics.depth import GRID, Profile, relative_depth, rms_over_depth
from attnlens.statistics.preview import shown_rows
from attnlens.statistics.table import ALL_HEADS, StatsTable, Tabular
from attnlens.threads import Progress
from attnlens.vocabulary import CIRCUIT, FOLD, Vocabulary, several
from attnlens.words import counted, listed, told_apart

if TYPE_CHECKING:
    from attnlens.figures.drawings import Drawing

STATISTICS = ("alpha", "beta", "identity_share")
STATISTIC = Vocabulary("statistic", STATISTICS)
PROFILES: tuple[tuple[Kind, str], ...] = (("qk", "each"), ("ov", "all"))
"""What is compared: QK as the mean over a layer's heads, OV as the layer's sum."""


_COLUMNS = ("first", "second", "circuit", "identity_share", "log_alpha", "shares", "effective_rank")


@dataclass(frozen=True, repr=False)
class Comparison(Drawn, Tabular):
    """Profiles of several models and the distances between each pair, of attention and of depthwise filters.

    Its rows are the distances: one a pair and circuit; of depthwise filters the circuit is ``filters``.
    """

    fold: Fold
    models: tuple[str, ...]
    profiles: tuple[Profile, ...]
    distances: tuple[dict[str, Any], ...]
    filter_profiles: tuple[FilterProfile, ...] = ()
    filter_distances: tuple[dict[str, Any], ...] = ()
    left_out: Mapping[str, Mapping[str, list[int]]] = field(default_factory=dict)
    """By model, what its products leave out and how its layout was found, in words, with the layers it is true of."""

    def select(self, circuit: Kind, statistic: str) -> list[Profile]:
        """Return one statistic's profile of every model."""
        circuit, statistic = CIRCUIT(circuit), STATISTIC(statistic)
        return [p for p in self.profiles if (p.circuit, p.statistic) == (circuit, statistic)]

    def to_json(self) -> dict[str, Any]:
        """Return models and distances as JSON-ready data."""
        about = {"schema": "attnlens.comparison", "schema_version": 1, "fold": self.fold, "models": list(self.models)}
        return {
            **about,
            "left_out": self.left_out,
            "distances": self.distances,
            "filter_distances": self.filter_distances,
        }

    def to_csv(self) -> str:
        """Return the distances as CSV: a row a pair and circuit; of depthwise filters the circuit is ``filters``."""
        return csv_text(_COLUMNS, ([row.get(name) for name in _COLUMNS] for row in self._records()))

    def _records(self) -> list[dict[str, Any]]:
        return [*self.distances, *({"circuit": "filters", **row} for row in self.filter_distances)]

    def _table(self) -> StatsTable:
        records = self._records()
        return StatsTable.of(records, [name for name in _COLUMNS if any(name in record for record in records)])

    def _headline(self) -> str:
        return f"Comparison of {listed(self.models, 'model')}: {self.fold} products by relative depth"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the distances, and the profiles of all models."""
        from attnlens.figures.notebook import fragment

        table = self._table()
        return fragment(
            lambda: next(iter(self.figures().values())),
            title=self._headline(),
            note="root mean square over depth of the difference between two profiles",
            head=table.columns,
            rows=shown_rows(table.rows),
            about=("left out", dict(self.left_out)),
        )

    def _drawings(self) -> dict[str, Drawing]:
        """Return what draws ``comparison`` of attention and ``filter_comparison`` of depthwise filters."""
        from functools import partial

        from attnlens.fit.comparison_figures import draw_comparison, draw_filter_comparison

        found: dict[str, Drawing] = {}
        if self.profiles:
            found["comparison"] = partial(draw_comparison, self.models, self.profiles, self.fold)
        if self.filter_profiles:
            found["filter_comparison"] = partial(draw_filter_comparison, self.models, self.filter_profiles)
        return found


def compare(
    *models: Any,
    fold: Fold = "effective",
    checkpoints: Sequence[Any] = (),
    num_heads: int | None = None,
    model_args: dict[str, Any] | None = None,
    weights: str | None = None,
    row_order: str | None = None,
    offline: bool = False,
    remote: bool = False,
    progress: Progress = iter,
) -> Comparison:
    """Return how the structure of several models, each inspected, differs with depth.

    ``models`` are what `inspect` takes and what it returned, one by one or as one list.

    Distance of a pair, per circuit (QK, OV): the root mean square over relative depth t in [0, 1] of the difference of
    the two ``identity_share`` profiles, interpolated linearly in t: between 0 and 2, free of scale, width and depth.
    Beside it ``log_alpha``: the same of log10(alpha), the difference in noise scale. Models with depthwise filters are
    compared by these too: `filters.comparison.filter_distances`. ``checkpoints`` are files, one a model; ``model_args``
    go to every architecture of timm, ``weights`` names the network of each file, ``num_heads`` and ``row_order`` are of
    every model; ``offline`` and ``remote`` are those of `inspect`. Raises what `inspect` raises, and
    `UnsupportedAttentionError` where no two models hold layers of one kind.
    """
    fold = FOLD(fold)
    models = several(models)
    if len(models) < 2:
        raise UsageError("compare needs at least two models")
    if checkpoints and len(checkpoints) != len(models):
        given = counted(len(checkpoints), "checkpoint")
        raise UsageError(f"{given} for {counted(len(models), 'model')}: give one for each, in their order")
    files = checkpoints or [None] * len(models)
    how: dict[str, Any] = {
        "fold": fold,
        "num_heads": num_heads,
        "model_args": model_args,
        "weights": weights,
        "row_order": row_order,
        "offline": offline,
        "remote": remote,
        "progress": progress,
    }
    inspections = [inspected(model, file, **how) for model, file in zip(models, files, strict=True)]
    paths = [_path_of(model, file) for model, file in zip(models, files, strict=True)]
    return compare_inspections(inspections, fold, paths)


def inspected(model: Any, checkpoint: Any = None, **how: Any) -> Inspection:
    """Return an inspection as it is, and of all else what `inspect` finds.

    Raises `UsageError` where a checkpoint is given beside an inspection, or its fold was not measured.
    """
    if not isinstance(model, Inspection):
        return inspect(model, checkpoint, **how)
    if checkpoint is not None:
        raise UsageError(f"{model.model} is inspected already: give its checkpoint to inspect(), or the model itself")
    missing = [fold for fold in parse_folds(how.get("fold", "raw")) if fold not in model.folds]
    if model.specs and missing:
        raise UsageError(
            f"{model.model} was inspected without fold {missing[0]!r}: choose from {', '.join(model.folds)}, or "
            f"inspect it with fold={missing[0]!r}"
        )
    return model


def compare_inspections(
    inspections: Sequence[Inspection], fold: Fold, paths: Sequence[str | None] | None = None
) -> Comparison:
    """Measure how inspected models differ, as `compare` does; ``fold`` must have been measured in each.

    ``paths`` tell models of one name apart.
    """
    names = told_apart([inspection.model for inspection in inspections], paths or [None] * len(inspections))
    named = list(zip(names, inspections, strict=True))
    kinds = (
        [bool(inspection.specs) for inspection in inspections],
        [bool(inspection.filters.specs) for inspection in inspections],
    )
    if all(sum(kind) < 2 for kind in kinds):
        held = ", ".join(
            f"{name}: {'attention' if inspection.specs else 'depthwise filters'}" for name, inspection in named
        )
        raise UnsupportedAttentionError(f"no two of these models hold layers of one kind ({held}): name others")
    profiles = [profile for name, inspection in named for profile in profiles_of(inspection, name, fold)]
    filters = [profile for name, inspection in named for profile in filter_profiles(inspection.filters, name)]
    distances = tuple(_distances(names, profiles)), tuple(filter_distances(filters))
    said = {
        name: inspection.left_out() | {f"filters: {why}": of for why, of in inspection.filters.left_out().items()}
        for name, inspection in named
    }
    return Comparison(fold, tuple(names), tuple(profiles), distances[0], tuple(filters), distances[1], said)


def profiles_of(inspection: Inspection, name: str, fold: Fold) -> list[Profile]:
    """Return every profile of one inspected model."""
    profiles = []
    for circuit, heads in PROFILES:
        rows_of = _of_heads(inspection.stats.select(circuit=circuit, fold=fold), heads).by("layer")
        by_layer = {layer: rows_of[layer] for layer in inspection.layers}
        for statistic in STATISTICS:
            values = {layer: rows.column(statistic) for layer, rows in by_layer.items()}
            means = {layer: v[np.isfinite(v)].mean() for layer, v in values.items() if np.isfinite(v).any()}
            if means:  # a layer without a number (a product that is zero, or not square) is interpolated over
                depth = np.array([relative_depth(layer, inspection.depth) for layer in means])
                profiles.append(Profile(name, circuit, statistic, depth, np.array(list(means.values()))))
    return profiles


def _of_heads(stats: StatsTable, heads: str) -> StatsTable:
    if heads == ALL_HEADS:
        return stats.select(head=ALL_HEADS)
    head = stats.columns.index("head")
    return StatsTable(tuple(row for row in stats.rows if row[head] != ALL_HEADS), stats.columns)


def _distances(names: Sequence[str], profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    by_key = {(p.model, p.circuit, p.statistic): p.at(GRID) for p in profiles}
    distances: list[dict[str, Any]] = []
    for first, second in combinations(names, 2):
        for circuit, _ in PROFILES:
            if any((name, circuit, "identity_share") not in by_key for name in (first, second)):
                continue
            shares = [by_key[name, circuit, "identity_share"] for name in (first, second)]
            alphas = np.stack([by_key[name, circuit, "alpha"] for name in (first, second)])
            with np.errstate(divide="ignore"):
                logs = np.log10(np.where(alphas < np.finfo(np.float64).tiny, 0.0, alphas))  # fewer digits are no number
            distances.append(
                {
                    "first": first,
                    "second": second,
                    "circuit": circuit,
                    "identity_share": rms_over_depth(shares[0] - shares[1]),
                    "log_alpha": rms_over_depth(logs[0] - logs[1]) if np.isfinite(logs).all() else None,
                }
            )
    return distances


def _path_of(model: Any, file: Any) -> str | None:
    """Return the path a model was read from, its suffix left out; None for what is none."""
    given = model if file is None else file
    return os.fspath(Path(given).with_suffix("")) if isinstance(given, str | os.PathLike) else None
