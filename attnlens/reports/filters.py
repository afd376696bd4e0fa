"""What a report shows of depthwise filters: a row a layer with its verdict, and the figures of an inspection."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from attnlens.filters.inspection import FilterInspection
from attnlens.filters.notebook import HEAD
from attnlens.words import counted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {
    **{name: title for name, title in HEAD.items() if name != "verdict"},
    "explained_variances": "of variances",
    "noise_share": "noise",
    "p_value": "p",
}
"""Statistics of the report's table, with their titles."""
_CAPTIONS = {
    "filter_covariance": "Covariance of every layer's filters: block p is the image of the covariance of position p "
    "with every position q.",
    "filter_spectra": "Eigenvalues of every layer's covariance, in units of their mean.",
    "filter_profile": "Effective rank, what the closed form explains, its width and its shares by layer.",
}


@dataclass(frozen=True)
class Picture:
    """A figure as a data URL's content, with the words below it."""

    name: str
    png: str
    caption: str


@dataclass(frozen=True)
class FilterSection:
    """Everything the section needs: the rows as `stats.json` has them, verdicts counted, pictures."""

    layers: int
    depth: int
    rows: list[dict[str, Any]]
    counts: list[tuple[str, int]]
    notes: list[str]
    pictures: list[Picture]


def filter_section(filters: FilterInspection, model: str) -> FilterSection | None:
    """Return the section of a model's depthwise filters; None where it has none."""
    if not filters.specs:
        return None
    rows = filters.stats.json_rows()
    notes = [f"Not read: {refused.path} ({refused.module_class}) {refused.reason}" for refused in filters.refused]
    notes += [f"{why}: {len(layers)} of {counted(len(rows), 'layer')}" for why, layers in filters.left_out().items()]
    drawn = filters.figures(model)
    return FilterSection(
        layers=len(rows),
        depth=filters.depth,
        rows=rows,
        counts=Counter(str(row["verdict"]) for row in rows).most_common(),
        notes=notes,
        pictures=[picture(name, drawn[name], caption) for name, caption in _CAPTIONS.items()],
    )


def picture(name: str, figure: Figure, caption: str) -> Picture:
    """Return a figure as it stands in a page."""
    from attnlens.figures.notebook import png

    return Picture(name, png(figure), caption)
