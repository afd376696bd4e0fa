"""Tables of depthwise filters: what was measured in each layer, and what was fitted to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attnlens.cli.sheet import Sheet
from attnlens.cli.tables import escape
from attnlens.words import p_text

if TYPE_CHECKING:
    from attnlens.filters.inspection import FilterInspection
    from attnlens.fit.comparison import Comparison
    from attnlens.fit.params import InitParams

_STYLES = {"closed form": "bold blue", "structured": "blue", "isotropic": "dim", "zeros": "dim"}


def filter_table(filters: FilterInspection, model: str) -> Sheet:
    """Build the table of one model: a row a layer, what chance gives in brackets."""
    from attnlens.filters.statistics import DRAWS

    table = Sheet(
        f"[bold]{escape(model)}[/bold]: depthwise filters, S = FᵀF / n against its closed form",
        "rank: effective, tr(S)² / tr(S²), with its p; s/k²: width by squared side, (in brackets) where it lies at an "
        "end of its range; blur, slope, contrast: shares of the trace, the rest is isotropic; explained: share beyond "
        "isotropy, and of covariances alone; noise: share that sampling makes; other (brackets): chance, filters of "
        f"the same norms in random directions, {DRAWS} draws",
    )
    columns = ("layer", "filters", "kernel", "rank", "p", *_shape_columns(), "noise")
    table.number("layer", key=True)
    table.number(*columns[1:5])
    table.number(*columns[5:9], group=1)
    table.number(*columns[9:], group=2)
    table.label("verdict", group=2)
    for row in filters.stats.records():
        cells = [str(row["layer"]), str(row["filters"]), f"{row['height']}×{row['width']}"]
        if row["verdict"] != "zeros":
            cells += _measured(row)
        table.add_row(*cells, *[""] * (len(columns) - len(cells)), _verdict(str(row["verdict"])))
    return table


def fit_filter_table(params: InitParams, source: int) -> Sheet:
    """Build the table of one source: a row a layer with the shrinkage of the full form and the parametric form."""
    entries = [entry for entry in params.filters if entry.source == source]
    table = Sheet(
        f"[bold]{escape(params.sources[source].model)}[/bold]: filter covariances "
        f"({entries[0].estimator}), and their closed form",
        "full: the covariance, shrunk by c towards equal variances; parametric: s/k² and shares of blur, slope and "
        "contrast, of which medians over layers of stride 1 and of stride above 1, all models, carry over; explained: "
        "share beyond isotropy, and of covariances alone",
    )
    table.number("layer", key=True)
    table.number("kernel", "stride", "filters", "rank", "c")
    table.number(*_shape_columns(), group=1)
    table.label("verdict", group=1)
    for entry in entries:
        cells = [str(entry.layer), f"{entry.kernel[0]}×{entry.kernel[1]}", f"{entry.stride[0]}×{entry.stride[1]}"]
        cells += [str(entry.filters), f"{entry.effective_rank:.1f}", f"{entry.shrinkage:.3f}", *_shape(vars(entry))]
        cells += [f"{entry.explained:.2f}", f"{entry.explained_covariances:.2f}"]
        table.add_row(*cells, _verdict(entry.verdict))
    for medians in params.filter_medians:
        table.add_section()
        shares = (f"{share:.2f}" for share in (medians.blur, medians.slope, medians.contrast))
        kind = "above 1" if medians.strided else "1"
        table.add_row("median", "", kind, f"{medians.layers}", "", "", f"{medians.relative_s:.3g}", *shares, "", "", "")
    return table


def filter_distance_table(comparison: Comparison) -> Sheet:
    """Build the table of distances between the filters of each pair of models."""
    table = Sheet(
        "Distance between depthwise filters",
        "shares: rms over depth of the distance between blur, slope, contrast and isotropic share, 0 to 1.41\n"
        "rank: the same of the difference in effective rank / positions, 0 to 1",
    )
    table.label("first", "second", key=True)
    table.number("shares", "rank")
    for row in comparison.filter_distances:
        names = (escape(row[name]) for name in ("first", "second"))
        table.add_row(*names, f"{row['shares']:.3f}", f"{row['effective_rank']:.3f}")
    return table


def _shape_columns() -> tuple[str, ...]:
    from attnlens.filters.closed_form import PARTS

    return ("s/k²", *PARTS, "explained", "covariances")


def _shape(found: Mapping[str, Any]) -> list[str]:
    """Format the width, in brackets where none was found, and the shares of the closed form's parts."""
    width = f"{found['relative_s']:.3g}"
    from attnlens.filters.closed_form import PARTS

    shares = [f"{found[f'{part}_share']:.2f}" for part in PARTS]
    return [f"({width})" if found["s_bound"] else width, *shares]


def _measured(row: Mapping[str, Any]) -> list[str]:
    """Format the statistics of a row, chance beside them."""
    return [
        f"{row['effective_rank']:.1f} ({row['effective_rank_null']:.1f})",
        p_text(row["p_value"]),
        *_shape(row),
        f"{row['explained']:.2f} ({row['explained_null']:.2f})",
        f"{row['explained_covariances']:.2f} ({row['explained_covariances_null']:.2f})",
        "" if math.isnan(row["noise_share"]) else f"{row['noise_share']:.2f}",
    ]


def _verdict(verdict: str) -> str:
    return f"[{_STYLES[verdict]}]{verdict}[/{_STYLES[verdict]}]"
