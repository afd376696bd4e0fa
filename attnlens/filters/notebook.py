"""What a notebook shows of depthwise filters: their statistics by layer, and the profiles."""

from __future__ import annotations

from typing import Any

from attnlens.filters.closed_form import PARTS
from attnlens.statistics.table import StatsTable
from attnlens.templates import shown
from attnlens.words import counted

HEAD = {
    "effective_rank": "effective rank",
    "effective_rank_null": "of chance",
    "relative_s": "s ÷ side²",
    **{f"{part}_share": part for part in (*PARTS, "isotropic")},
    "explained": "explained",
    "explained_covariances": "of covariances",
    "verdict": "verdict",
}


def filters_html(stats: StatsTable, depth: int, *, model: str, provenance: dict[str, Any]) -> str:
    """Return a fragment with a row of statistics a layer of filters, ``depth`` layers in all, and their profiles."""
    from attnlens.figures.notebook import fragment
    from attnlens.filters.figures import draw_filter_profile

    return fragment(
        lambda: draw_filter_profile(stats, model=model),
        title=f"{model}: covariance of depthwise filters, {len(stats)} of {counted(depth, 'layer')}",
        note="chance: filters of the same norms in random directions; explained: beyond isotropy, and of covariances",
        head=["layer", "filters", "kernel", *HEAD.values()],
        rows=[
            [str(row["layer"]), str(row["filters"]), f"{row['height']} × {row['width']}"]
            + [row[name] if isinstance(row[name], str) else shown(row[name]) for name in HEAD]
            for row in stats.json_rows()
        ],
        about=("provenance", provenance),
    )
