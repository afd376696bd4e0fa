"""The report: everything a page shows, put into one HTML file that needs no network and no other file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from attnlens.atomic import write_text_atomic
from attnlens.circuits import Fold
from attnlens.csv_text import csv_text
from attnlens.errors import UnsupportedAttentionError, UsageError
from attnlens.fit.comparison import Comparison, compare_inspections, inspected
from attnlens.fit.entries import Entry
from attnlens.fit.fit_params import fit_params
from attnlens.inspection import Inspection, inspect
from attnlens.outputs import Outputs
from attnlens.printable import printable
from attnlens.reports.filters import COLUMNS as FILTER_COLUMNS
from attnlens.reports.filters import Picture, filter_section, picture
from attnlens.reports.matrices import CODES, Drawings, corner_size
from attnlens.reports.scripts import asset, script_hash, scripts
from attnlens.reports.training import read_training, training_files
from attnlens.statistics.table import ALL_HEADS, KEYS, StatsTable
from attnlens.statistics.verdicts import Verdict
from attnlens.templates import aligned, environment
from attnlens.threads import Progress
from attnlens.words import counted

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
_JUDGED = ("verdict", "reason", "p_value", "alpha_low", "alpha_high", "beta_low", "beta_high")
SHOWN = ("alpha", "beta", "diagonal_prominence")
"""Statistics in the table of heads."""
_ABOUT = ("num_heads", "name", "leaves_out")


class Page(str):
    """An HTML page about a model, and the numbers it shows."""

    __slots__ = ("entries", "inspection")

    def __new__(cls, text: str, inspection: Inspection, entries: Sequence[Entry]) -> Page:
        """Make a page of its text, what was measured, and what was judged."""
        page = super().__new__(cls, text)
        page.inspection, page.entries = inspection, tuple(entries)
        return page

    inspection: Inspection
    entries: tuple[Entry, ...]

    def __repr__(self) -> str:
        """Say in a line what the page is about; the page itself is the text."""
        size = f"{len(self) / 1e6:.1f} MB of HTML"
        model, rows = printable(self.inspection.model), counted(len(self.inspection.stats), "row")
        return f"<Page about {model}: {rows}, {size}>"

    def to_pandas(self) -> pd.DataFrame:
        """Return `rows` as a pandas frame; of a model without attention, those of its filters."""
        table = StatsTable.of(self.rows()) if self.inspection.specs else self.inspection.filters.stats
        return table.to_pandas()

    def rows(self) -> list[dict[str, Any]]:
        """Return a row a product: its statistics, with interval, corrected p-value and verdict where it was judged."""
        judged = {_key(vars(entry)): entry for entry in self.entries}
        return [
            record | {name: getattr(judged.get(_key(record)), name, None) for name in _JUDGED}
            for record in self.inspection.stats.json_rows()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return `rows` and what the page says of depthwise filters as JSON-ready data."""
        about = {"schema": "attnlens.report", "schema_version": 1, "model": self.inspection.model}
        rest = {"folds": list(self.inspection.folds), "provenance": self.inspection.provenance}
        return {**about, **rest, "rows": self.rows(), "filters": self.inspection.filters.to_json()}

    def to_csv(self) -> str:
        """Return `rows` as CSV; of a model without attention, those of its filters."""
        if not self.inspection.specs:
            return self.inspection.filters.stats.to_csv()
        columns = (*self.inspection.stats.columns, *_JUDGED)
        return csv_text(columns, ([row[name] for name in columns] for row in self.rows()))


def report(
    model: str | os.PathLike[str] | nn.Module | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    compare: Sequence[Any] = (),
    train: str | os.PathLike[str] | None = None,
    fold: str = "both",
    num_heads: int | None = None,
    model_args: dict[str, Any] | None = None,
    input_size: int | tuple[int, ...] | None = None,
    weights: str | None = None,
    row_order: str | None = None,
    offline: bool = False,
    remote: bool = False,
    force: bool = False,
    command: str | None = None,
    progress: Progress = iter,
) -> Page:
    """Return the HTML page about a model: every head's fit, verdict, heatmaps, histograms and spectra.

    Of depthwise filters every layer's statistics and verdict, covariances, spectra and profiles.

    With ``output`` the page is also written to this file, whole or not at all; with ``force`` over a file that attnlens
    did not write.
    ``model``, ``checkpoint``, ``num_heads``, ``model_args``, ``input_size``, ``weights``, ``row_order``, ``offline``
    and ``remote`` are what `attnlens.inspect` takes. ``compare`` names models whose depth profiles stand beside it, or
    holds what `attnlens.inspect` returned of them; ``train`` is an output folder of `attnlens train-compare` whose
    curves are shown.
    ``command`` goes into the provenance. The statistics are those of `attnlens.inspect` under ``fold``, the verdicts
    those of `attnlens.fit_params` under each of its folds; nothing is measured here.

    The page carries its data, styles and scripts (d3 and Observable Plot draw, sortable sorts) and a policy that allows
    nothing else to be loaded or run. Under 5 MB for a ViT-B: heatmaps show the corner of `corner_size`.

    Raises what `attnlens.inspect` raises, `ResultsError` for a ``train`` folder that cannot be read, and `OutputError`
    for an ``output`` that cannot be written.
    """
    if output is not None:
        Outputs.of(model, checkpoint, *compare, files=training_files(train), force=force).file(output, ".html")
    training = read_training(Path(train)) if train is not None else None
    reach: dict[str, Any] = {"offline": offline, "remote": remote, "progress": progress}
    form: dict[str, Any] = {"num_heads": num_heads, "model_args": model_args, "input_size": input_size}
    form |= {"weights": weights, "row_order": row_order}
    drawings = Drawings()
    inspection = inspect(model, checkpoint, fold=fold, observe=drawings.observe, **form, **reach)
    entries, unjudged = list[Entry](), ""
    if inspection.specs:
        entries, unjudged = _judgements(model, inspection.folds, checkpoint=checkpoint, **form, **reach)
    others = [inspected(other, fold=fold, **reach) for other in compare]
    comparison = compare_inspections([inspection, *others], _common_fold(inspection, *others)) if others else None
    size = corner_size(inspection)
    data = {
        "folds": inspection.folds,
        "stats": _stats(inspection),
        "judged": {_key(vars(entry)): {name: getattr(entry, name) for name in _JUDGED} for entry in entries},
        "drawn": drawings.data(inspection, size),
        "codes": CODES,
        "comparison": _comparison_data(comparison, [inspection, *others]),
        "training": training and {"arms": training.arms, "points": [p.model_dump() for p in training.points]},
    }
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            inspection=inspection,
            rows=_rows(inspection, entries),
            statistics=SHOWN,
            default_fold=_common_fold(inspection),
            verdicts=[verdict.value for verdict in Verdict],
            counts=_counts(entries),
            unjudged=unjudged,
            size=size,
            notes=inspection.left_out(),
            provenance=list(_flat({**inspection.provenance, **({"command": command} if command else {})})),
            comparison=comparison,
            filters=filter_section(inspection.filters, inspection.model),
            filter_columns=FILTER_COLUMNS,
            filter_comparison=_filter_comparison(comparison),
            training=training,
            scripts=scripts(),
            hashes=[script_hash(script) for script in scripts()],
            style=Markup(asset("report.css")),  # noqa: S704  # the package's own file
        )
    )
    if output is not None:
        write_text_atomic(Path(output), page)
    return Page(page, inspection, entries)


def _judgements(model: Any, folds: Sequence[Fold], **how: Any) -> tuple[list[Entry], str]:
    """Return the entries of the model's fit under each fold, and why there are none where there are none."""
    found: list[Entry] = []
    try:
        for fold in [name for name in folds if name != "raw"] or folds:
            entries = fit_params(*([] if model is None else [model]), fold=fold, **how).entries
            found += [
                e for e in entries if e.fold == fold or (e.fold in folds and not any(e.fold == f.fold for f in found))
            ]
    except UnsupportedAttentionError as error:
        return [], str(error)
    return found, ""


def _common_fold(*inspections: Inspection) -> Fold:
    """Return the fold to show: effective where all have it, otherwise the first that all have."""
    folds: tuple[Fold, ...] = ("effective", *inspections[0].folds)
    shared = [fold for fold in folds if all(fold in inspection.folds for inspection in inspections)]
    if not shared:
        raise UsageError("the models have no fold in common: compare them with --fold raw")
    return shared[0]


def _key(record: dict[str, Any]) -> str:
    return ".".join(str(record[name]) for name in KEYS)


def _stats(inspection: Inspection) -> dict[str, Any]:
    """Return the table as `stats.json` has it, its columns named once."""
    columns = [name for name in inspection.stats.columns if name not in _ABOUT]
    return {"columns": columns, "rows": [[row[c] for c in columns] for row in inspection.stats.json_rows()]}


def _rows(inspection: Inspection, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return a row a layer, head and fold, with its QK and OV statistics (None where it has none) and verdicts.

    ``text`` holds the statistics that are `SHOWN` as their column writes them.
    """
    judged = {_key(vars(entry)): entry for entry in entries}
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for record in inspection.stats.json_rows():
        key = tuple(record[name] for name in KEYS if name != "circuit")
        row = rows.setdefault(key, {"layer": key[0], "head": key[1], "fold": key[2], "qk": None, "ov": None})
        row[record["circuit"]] = record | {"entry": judged.get(_key(record))}
    for circuit in ("qk", "ov"):
        own = [row[circuit] for row in rows.values() if row[circuit]]
        for name in SHOWN:
            for found, text in zip(own, aligned(record[name] for record in own), strict=True):
                found.setdefault("text", {})[name] = text
    order = {fold: i for i, fold in enumerate(inspection.folds)}
    return sorted(rows.values(), key=lambda row: (order[row["fold"]], row["layer"]))  # stable: heads keep their order


def _counts(entries: Sequence[Entry]) -> list[tuple[str, str, list[tuple[str, int]]]]:
    """Count verdicts by circuit and fold."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    words = {"qk": "QK heads", "ov": "OV heads"}
    for entry in entries:
        what = "OV layer sums" if entry.head == "all" else words[entry.circuit]
        groups.setdefault((what, entry.fold), Counter())[entry.verdict] += 1
    return [
        (what, fold, [(verdict.value, count[verdict.value]) for verdict in Verdict])
        for (what, fold), count in groups.items()
    ]


def _filter_comparison(comparison: Comparison | None) -> Picture | None:
    if comparison is None or not comparison.filter_distances:
        return None
    from attnlens.fit.comparison_figures import draw_filter_comparison

    caption = "Shares and effective rank of each model's filters, against relative depth."
    return picture("filter_comparison", draw_filter_comparison(comparison.models, comparison.filter_profiles), caption)


def _comparison_data(comparison: Comparison | None, inspections: Sequence[Inspection]) -> dict[str, Any] | None:
    """Return the profiles of all models and, where there are heads, each head's share of its largest cosine."""
    if comparison is None:
        return None
    profiles = [
        {"model": p.model, "circuit": p.circuit, "statistic": p.statistic, "depth": depth, "value": value}
        for p in comparison.profiles
        for depth, value in zip(p.depth.tolist(), p.values.tolist(), strict=True)
    ]
    return {
        "models": comparison.models,
        "profiles": profiles,
        "maps": [
            {"model": name, "circuit": row["circuit"], "layer": row["layer"], "head": row["head"], "share": share}
            for name, inspection in zip(comparison.models, inspections, strict=True)
            for row in inspection.stats.select(fold=comparison.fold).json_rows()
            if row["head"] != ALL_HEADS and (share := _share(row)) is not None
        ],
    }


def _share(row: dict[str, Any]) -> float | None:
    cosine, bound = row["identity_cosine"], row["identity_cosine_bound"]
    return None if cosine is None or not bound else float(f"{cosine / bound:.4g}")


def _flat(data: Any, name: str = "") -> list[tuple[str, str]]:
    if isinstance(data, dict):
        return [pair for key, value in data.items() for pair in _flat(value, f"{name} {key}".strip())]
    return [(name, data if isinstance(data, str) else json.dumps(data))]
