"""Figures of an inspection: heatmaps of circuits and of filter covariances, their fits against depth, their spectra.

Results in, `matplotlib.figure.Figure` out. pyplot is never imported and the caller's rc settings stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from attnlens.circuits import Fold, Kind
from attnlens.errors import UsageError
from attnlens.figures import style
from attnlens.figures.heatmaps import Shape, draw_heatmap
from attnlens.figures.profiles import draw_profile
from attnlens.figures.saving import save_figures
from attnlens.figures.spectra import draw_spectra
from attnlens.heads import Array
from attnlens.statistics.table import ALL_HEADS

if TYPE_CHECKING:
    from attnlens.inspection import Inspection

__all__ = ["draw_all", "save_figures"]


def draw_all(inspection: Inspection, fold: Fold, size: int = 64) -> dict[str, Figure]:
    """Draw ``qk_heatmap``, ``ov_heatmap``, ``depth_profile`` and ``spectra`` where attention was read.

    Where depthwise filters were, ``filter_covariance``, ``filter_profile`` and ``filter_spectra``.
    The heatmaps show the top-left ``size x size`` corner of every product under ``fold``, the spectra are of ``fold``
    too, and the profile compares all folds that were measured. Raises `UsageError` for a fold that was not measured or
    a size below 1.
    """
    from attnlens.filters.figures import draw_filters  # which draws with this package's style

    if fold not in inspection.folds:
        raise UsageError(f"fold {fold!r} was not measured: choose from {', '.join(inspection.folds)}")
    if size < 1:
        raise UsageError(f"a corner of {size} x {size} entries cannot be drawn: give a size of 1 or more")
    notes = _notes(inspection)
    filters = draw_filters(inspection.filters, model=inspection.model) if inspection.filters.specs else {}
    if not inspection.specs:
        return filters
    with style.look():
        return {
            "qk_heatmap": _heatmap(inspection, "qk", fold, size, notes),
            "ov_heatmap": _heatmap(inspection, "ov", fold, size, notes),
            "depth_profile": draw_profile(inspection.stats, inspection.folds, model=inspection.model, notes=notes),
            "spectra": draw_spectra(inspection.spectra, fold, model=inspection.model, notes=notes),
            **filters,
        }


def _heatmap(inspection: Inspection, circuit: Kind, fold: Fold, size: int, notes: str) -> Figure:
    panels: dict[int, dict[int | str, Array]] = {}
    full: dict[int, Shape] = {}
    for layer in inspection.layers:
        if (layer, circuit, fold) not in inspection.spectra:  # no W_O, or a norm that is not known
            continue
        products = inspection.circuits(layer, circuit=circuit, fold=fold)
        stack = products.dense(size)
        panels[layer] = dict(enumerate(stack)) | ({ALL_HEADS: stack.sum(0)} if circuit == "ov" else {})
        full[layer] = (products.shape[-2], products.shape[-1])
    if not panels:
        missing = f"There is no {style.CIRCUIT_WORDS[circuit]} to draw ({fold})."
        return style.message_figure(inspection.model, f"{missing} {notes}")
    return draw_heatmap(panels, full, model=inspection.model, circuit=circuit, fold=fold, notes=notes)


def _notes(inspection: Inspection) -> str:
    """Say in one paragraph what the products leave out of the network."""
    depth = len(inspection.layers)
    reasons = [
        why if len(layers) == depth else f"{why} ({len(layers)} of {depth} layers)"
        for why, layers in inspection.left_out().items()
    ]
    return "Note: " + "; ".join(reasons) + "." if reasons else ""
