"""The figures of a training comparison by their names."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from attnlens.training.ladder import ladder_of
from attnlens.training.results import Summary
from attnlens.training.source import Source
from attnlens.training.structure import source_structure

if TYPE_CHECKING:
    from attnlens.figures.drawings import Drawing


def comparison_drawings(summary: Summary, source: Source) -> dict[str, Drawing]:
    """Return what draws ``curves``, ``structure`` where products were measured, ``waterfall`` where rungs were trained.

    ``source`` gives the pre-trained model's own structure.
    """
    from attnlens.training.figures import draw_curves, draw_structure, has_structure
    from attnlens.training.waterfall import draw_waterfall

    found: dict[str, Drawing] = {"curves": partial(draw_curves, summary)}
    if has_structure(summary):
        found["structure"] = partial(draw_structure, summary, source_structure(source), source.name)
    ladder = ladder_of(summary.config.network.ladder, summary.finished, summary.contrasts)
    if ladder:
        found["waterfall"] = partial(draw_waterfall, summary, ladder)
    return found
