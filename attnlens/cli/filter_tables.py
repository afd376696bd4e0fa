"""Tables of depthwise filters: what was measured in each layer, and what was fitted to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attnlens.cli.tables import escape, plain_table

if TYPE_CHECKING:
    from rich.table import Table

    from attnlens.filters.inspection import FilterInspection
    from attnlens.fit.params import InitParams

_STYLES = {"closed form": "bold blue", "structured": "blue", "isotropic": "dim", "zeros": "dim"}


def filter_table(filters: FilterInspection, model: str) -> Table:
    """Build the table of one model: a row a layer, what chance gives in brackets."""
    from attnlens.filters.statistics import DRAWS

    table = plain_table(
        f"[bold]{escape(model)}[/bold]: depthwise filters, S = FᵀF / n against (1 - w) C(s) + w I / p",
        "rank: effective, tr(S)² / tr(S²), with its p; mean: share of the mean filter; s/k²: C's width by squared\n"
        "side; explained: share beyond isotropy; noise: share that sampling makes; (in brackets): chance, filters of\n"
        f"the same norms in random directions, {DRAWS} draws",
    )
    for name in ("layer", "filters", "kernel", "rank", "p", "mean", "s/k²", "w", "cosine", "explained", "noise"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in filters.stats.records():
        cells = [str(row["layer"]), str(row["filters"]), f"{row['height']}×{row['width']}"]
        if row["verdict"] != "zeros":
            cells += _measured(row)
        table.add_row(*cells, *[""] * (11 - len(cells)), _verdict(str(row["verdict"])))
    return table


def fit_filter_table(params: InitParams, source: int) -> Table:
    """Build the table of one source: a row a layer with the shrinkage of the full form and the parametric form."""
    entries = [entry for entry in params.filters if entry.source == source]
    table = plain_table(
        f"[bold]{escape(params.sources[source].model)}[/bold]: filter covariances "
        f"({entries[0].estimator}), and (1 - w) C(s) + w I / p",
        "full: the covariance, shrunk by c towards equal variances; parametric: s and w;\n"
        "trend: of s/k² and w by depth, all models; explained: share beyond isotropy",
    )
    for name in ("layer", "kernel", "filters", "rank", "c", "s", "s/k²", "w", "trend s/k²", "w", "explained"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    assert params.filter_trend is not None
    for entry in entries:
        relative, isotropic = params.filter_trend.at(entry.depth)
        cells = [str(entry.layer), f"{entry.kernel[0]}×{entry.kernel[1]}", str(entry.filters)]
        cells += [f"{entry.effective_rank:.1f}", f"{entry.shrinkage:.3f}", f"{entry.s:.3g}"]
        cells += [f"{entry.relative_s:.3g}", f"{entry.isotropic_share:.2f}", f"{relative:.3g}", f"{isotropic:.2f}"]
        table.add_row(*cells, f"{entry.explained:.2f}", _verdict(entry.verdict))
    return table


def _measured(row: Mapping[str, Any]) -> list[str]:
    """Format the statistics of a row, chance beside them."""
    return [
        f"{row['effective_rank']:.1f} ({row['effective_rank_null']:.1f})",
        f"{row['p_value']:.3f}",
        f"{row['mean_share']:.3f} ({row['mean_share_null']:.3f})",
        f"{row['relative_s']:.3g}",
        f"{row['isotropic_share']:.2f}",
        f"{row['cosine']:.2f} ({row['cosine_null']:.2f})",
        f"{row['explained']:.2f} ({row['explained_null']:.2f})",
        "" if math.isnan(row["noise_share"]) else f"{row['noise_share']:.2f}",
    ]


def _verdict(verdict: str) -> str:
    return f"[{_STYLES[verdict]}]{verdict}[/{_STYLES[verdict]}]"
