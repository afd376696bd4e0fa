"""What a notebook shows: one small table, one figure, where it came from; and that of the circuits' statistics."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from attnlens.circuits import Fold
from attnlens.figures import style
from attnlens.figures.profiles import draw_profile
from attnlens.statistics.table import ALL_HEADS, StatsTable
from attnlens.templates import environment, shown
from attnlens.words import counted

_DPI = 100


def png(figure: Figure) -> str:
    """Return a figure as PNG in base64, as a page holds it."""
    buffer = io.BytesIO()
    with style.boxes():
        figure.savefig(buffer, format="png", dpi=_DPI)
    return base64.b64encode(buffer.getvalue()).decode()


def fragment(
    draw: Callable[[], Figure],
    *,
    title: str,
    note: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    about: tuple[str, dict[str, Any]],
) -> str:
    """Return an HTML fragment: a table of ``rows`` under ``head``, the figure ``draw`` makes, and what it is about."""
    with style.look():
        picture = png(draw())
    return (
        environment()
        .get_template("notebook.html.j2")
        .render(
            title=title,
            note=note,
            head=head,
            rows=rows,
            picture=picture,
            about=[(about[0], json.dumps(about[1]))],
        )
    )


class _Column(NamedTuple):
    """A column of the table; ``total``: of the layer's summed product, not of its heads."""

    title: str
    circuit: str
    total: bool
    fold: str
    name: str


def profile_html(
    stats: StatsTable,
    folds: Sequence[Fold],
    layers: Sequence[int],
    depth: int,
    *,
    model: str,
    provenance: dict[str, Any],
) -> str:
    """Return a fragment: per layer the mean QK fit and the summed OV fit, a column a fold, and the profiles."""
    columns = [
        _Column(f"{label} {symbol} {fold}", circuit, label != "QK", fold, name)
        for label, circuit in (("QK", "qk"), ("OV sum", "ov"))
        for symbol, name in (("α", "alpha"), ("β", "beta"), ("prom", "diagonal_prominence"))
        for fold in folds
    ]
    by_layer = stats.by("layer")
    return fragment(
        lambda: draw_profile(stats, folds, model=model),
        title=f"{model}: M ≈ α Z + β I, {len(layers)} of {counted(depth, 'layer')}",
        note="QK: mean over heads; OV: sum over heads; prom = mean(diag) / sd(off-diag)",
        head=["layer", *(column.title for column in columns)],
        rows=[[str(layer), *(_mean(by_layer[layer], column) for column in columns)] for layer in layers],
        about=("provenance", provenance),
    )


def _mean(stats: StatsTable, column: _Column) -> str:
    """Return the mean over heads, or of the layer's sum; nothing where there is none."""
    chosen = stats.select(circuit=column.circuit, fold=column.fold)
    values = (chosen.select(head=ALL_HEADS) if column.total else chosen).column(column.name)
    return shown(float(values.mean())) if len(values) and np.isfinite(values).all() else ""
