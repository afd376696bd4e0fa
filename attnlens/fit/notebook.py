"""What a notebook shows of fitted parameters: fits, verdicts and requests by layer, and the fits by depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from attnlens.circuits import Fold
from attnlens.figures.notebook import fragment
from attnlens.filters.entries import FilterEntry
from attnlens.filters.notebook import HEAD
from attnlens.fit.entries import Entry, Source
from attnlens.fit.figures import filter_drawings, fit_drawings
from attnlens.statistics.table import ALL_HEADS
from attnlens.templates import shown


def fits_html(
    sources: Sequence[Source], entries: Sequence[Entry], fold: Fold, level: float, created: dict[str, Any]
) -> str:
    """Return a fragment: per model and layer the fit, its verdicts and the request, and the fits by depth."""
    return fragment(
        fit_drawings(sources, entries, fold, level)["fit_profile"],
        title=f"{_models(sources)}: {fold} products, M ≈ α Z + β I",
        note=f"QK: means and verdicts of heads; OV: sum over heads with the {level:.0%} interval of β",
        head=[
            *("model", "layer", "QK α", "QK β", "QK verdicts"),
            *("OV α", "OV β", "OV β interval", "OV verdict", "OV request"),
        ],
        rows=list(_rows(sources, entries, fold)),
        about=("created", created),
    )


def filter_fits_html(sources: Sequence[Source], filters: Sequence[FilterEntry], created: dict[str, Any]) -> str:
    """Return a fragment: per model and layer the closed form's fit and the shrinkage, and the first model's figure."""
    fitted = {title: name for name, title in HEAD.items() if not name.startswith(("effective", "verdict"))}
    names = {"shrinkage": "shrinkage", **fitted}
    return fragment(
        next(iter(filter_drawings(sources, filters).values())),
        title=f"{_models(sources)}: covariance of depthwise filters",
        note="shrinkage: towards equal variances; explained: beyond isotropy, and of covariances",
        head=["model", "layer", "filters", "kernel", *names, "verdict"],
        rows=[
            [
                *(sources[entry.source].model, str(entry.layer), str(entry.filters)),
                "{} × {}".format(*entry.kernel),
                *(shown(getattr(entry, name)) for name in names.values()),
                entry.verdict,
            ]
            for entry in filters
        ],
        about=("created", created),
    )


def _models(sources: Sequence[Source]) -> str:
    return " and ".join(source.model for source in sources)


def _rows(sources: Sequence[Source], entries: Sequence[Entry], fold: Fold) -> Iterator[list[str]]:
    chosen = [entry for entry in entries if entry.fold == fold]
    for source, layer in dict.fromkeys((entry.source, entry.layer) for entry in chosen):
        of_layer = [entry for entry in chosen if (entry.source, entry.layer) == (source, layer)]
        heads = [entry for entry in of_layer if entry.circuit == "qk"]
        counts = Counter(entry.verdict for entry in heads)
        words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        cells = [sources[source].model, str(layer), _mean_of(heads, "alpha"), _mean_of(heads, "beta"), words]
        total = next((entry for entry in of_layer if entry.head == ALL_HEADS), None)
        yield cells + ([""] * 5 if total is None else _total_cells(total))


def _total_cells(total: Entry) -> list[str]:
    interval = f"{shown(total.beta_low)} to {shown(total.beta_high)}"
    request = f"({shown(total.request_alpha)}, {shown(total.request_beta)})"
    return [shown(total.alpha), shown(total.beta), interval, total.verdict, request]


def _mean_of(entries: Sequence[Entry], name: str) -> str:
    return shown(float(np.mean([getattr(entry, name) for entry in entries]))) if entries else ""
