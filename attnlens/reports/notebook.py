"""What a notebook shows for an `Inspection` or `InitParams`: one small table, one figure, where it came from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from attnlens.figures import style
from attnlens.figures.profiles import draw_profile
from attnlens.filters.closed_form import PARTS
from attnlens.filters.figures import draw_filter_profile
from attnlens.fit.figures import draw_filter_fits, draw_fits
from attnlens.fit.params import Entry, InitParams
from attnlens.inspection import Inspection
from attnlens.reports.filters import png
from attnlens.reports.templates import environment, shown
from attnlens.statistics.table import ALL_HEADS, StatsTable

_PARAM_HEAD = (
    *("model", "layer", "QK α", "QK β", "QK verdicts"),
    *("OV α", "OV β", "OV β interval", "OV verdict", "OV request"),
)


_FILTER_HEAD = {
    "effective_rank": "effective rank",
    "effective_rank_null": "of chance",
    "relative_s": "s ÷ side²",
    **{f"{part}_share": part for part in (*PARTS, "isotropic")},
    "explained": "explained",
    "explained_covariances": "of covariances",
    "verdict": "verdict",
}


class _Column(NamedTuple):
    """A column of an inspection's table; ``total``: of the layer's summed product, not of its heads."""

    title: str
    circuit: str
    total: bool
    fold: str
    name: str


def inspection_html(inspection: Inspection) -> str:
    """Return an HTML fragment of what was read: attention, depthwise filters, or one after the other."""
    parts = [_attention_html(inspection)] if inspection.specs else []
    return "\n".join([*parts, *([_filters_html(inspection)] if inspection.filters.specs else [])])


def _filters_html(inspection: Inspection) -> str:
    """Return a fragment with a row of statistics a layer of filters, and their profiles."""
    filters = inspection.filters
    with style.look():
        picture = png(draw_filter_profile(filters.stats, model=inspection.model))
    return _fragment(
        title=f"{inspection.model}: covariance of depthwise filters, {len(filters.specs)} of {filters.depth} layers",
        note="chance: filters of the same norms in random directions; explained: beyond isotropy, and of covariances",
        head=["layer", "filters", "kernel", *_FILTER_HEAD.values()],
        rows=[
            [str(row["layer"]), str(row["filters"]), f"{row['height']} × {row['width']}"]
            + [row[name] if isinstance(row[name], str) else shown(row[name]) for name in _FILTER_HEAD]
            for row in filters.stats.json_rows()
        ],
        picture=picture,
        about=[("provenance", json.dumps(inspection.provenance))],
    )


def _attention_html(inspection: Inspection) -> str:
    """Return a fragment: per layer the mean QK fit and the summed OV fit, a column a fold, and the profiles."""
    columns = [
        _Column(f"{label} {symbol} {fold}", circuit, label != "QK", fold, name)
        for label, circuit in (("QK", "qk"), ("OV sum", "ov"))
        for symbol, name in (("α", "alpha"), ("β", "beta"), ("prom", "diagonal_prominence"))
        for fold in inspection.folds
    ]
    rows = [
        [str(layer), *(_mean(inspection.stats.select(layer=layer), column) for column in columns)]
        for layer in inspection.layers
    ]
    with style.look():
        figure = draw_profile(inspection.stats, inspection.folds, model=inspection.model)
        picture = png(figure)
    return _fragment(
        title=f"{inspection.model}: M ≈ α Z + β I, {len(inspection.layers)} of {inspection.depth} layers",
        note="QK: mean over heads; OV: sum over heads; prom = mean(diag) / sd(off-diag)",
        head=["layer", *(column.title for column in columns)],
        rows=rows,
        picture=picture,
        about=[("provenance", json.dumps(inspection.provenance))],
    )


def params_html(params: InitParams) -> str:
    """Return an HTML fragment of what was fitted: attention, depthwise filters, or one after the other."""
    parts = [_attention_params_html(params)] if params.entries else []
    return "\n".join([*parts, *([_filter_params_html(params)] if params.filters else [])])


def _filter_params_html(params: InitParams) -> str:
    """Return a fragment: per model and layer the closed form's fit and the shrinkage, and the first model's figure."""
    fitted = {title: name for name, title in _FILTER_HEAD.items() if not name.startswith(("effective", "verdict"))}
    names = {"shrinkage": "shrinkage", **fitted}
    with style.look():
        picture = png(next(iter(draw_filter_fits(params).values())))
    return _fragment(
        title=f"{' and '.join(source.model for source in params.sources)}: covariance of depthwise filters",
        note="shrinkage: towards equal variances; explained: beyond isotropy, and of covariances",
        head=["model", "layer", "filters", "kernel", *names, "verdict"],
        rows=[
            [
                *(params.sources[entry.source].model, str(entry.layer), str(entry.filters)),
                "{} × {}".format(*entry.kernel),
                *(shown(getattr(entry, name)) for name in names.values()),
                entry.verdict,
            ]
            for entry in params.filters
        ],
        picture=picture,
        about=[("created", json.dumps(params.created))],
    )


def _attention_params_html(params: InitParams) -> str:
    """Return a fragment: per model and layer the fit, its verdicts and the request, and the fits by depth."""
    with style.look():
        picture = png(draw_fits(params)["fit_profile"])
    return _fragment(
        title=f"{' and '.join(source.model for source in params.sources)}: {params.fold} products, M ≈ α Z + β I",
        note=f"QK: means and verdicts of heads; OV: sum over heads with the {params.level:.0%} interval of β",
        head=[
            "model",
            "layer",
            "QK α",
            "QK β",
            "QK verdicts",
            "OV α",
            "OV β",
            "OV β interval",
            "OV verdict",
            "OV request",
        ],
        rows=list(_param_rows(params)),
        picture=picture,
        about=[("created", json.dumps(params.created))],
    )


def _param_rows(params: InitParams) -> Iterator[list[str]]:
    chosen = [entry for entry in params.entries if entry.fold == params.fold]
    for source, layer in dict.fromkeys((entry.source, entry.layer) for entry in chosen):
        own = [entry for entry in chosen if (entry.source, entry.layer) == (source, layer)]
        heads = [entry for entry in own if entry.circuit == "qk"]
        counts = Counter(entry.verdict for entry in heads)
        words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        cells = [params.sources[source].model, str(layer), _mean_of(heads, "alpha"), _mean_of(heads, "beta"), words]
        total = next((entry for entry in own if entry.head == ALL_HEADS), None)
        yield cells + ([""] * 5 if total is None else _total_cells(total))


def _total_cells(total: Entry) -> list[str]:
    interval = f"{shown(total.beta_low)} to {shown(total.beta_high)}"
    request = f"({shown(total.request_alpha)}, {shown(total.request_beta)})"
    return [shown(total.alpha), shown(total.beta), interval, total.verdict, request]


def _mean_of(entries: Sequence[Entry], name: str) -> str:
    return shown(float(np.mean([getattr(entry, name) for entry in entries]))) if entries else ""


def _mean(stats: StatsTable, column: _Column) -> str:
    """Return the mean over heads, or of the layer's sum; nothing where there is none."""
    chosen = stats.select(circuit=column.circuit, fold=column.fold)
    values = (chosen.select(head=ALL_HEADS) if column.total else chosen).column(column.name)
    return shown(float(values.mean())) if len(values) and np.isfinite(values).all() else ""


def _fragment(**content: Any) -> str:
    return environment().get_template("notebook.html.j2").render(**content)
