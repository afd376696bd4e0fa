"""Figures of fitted parameters: depth profiles with intervals and null band, requests, tails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from attnlens.circuits import Fold, Kind
from attnlens.figures import scales, style
from attnlens.figures.drawings import Drawing
from attnlens.figures.panels import Given, Legend, Panels, Place, open_panels
from attnlens.filters.closed_form import closed_form
from attnlens.filters.entries import FilterEntry
from attnlens.filters.figures import Covariance, draw_mosaics
from attnlens.fit.entries import Entry, Source, by_layer, select
from attnlens.heads import Array


def filter_drawings(sources: Sequence[Source], filters: Sequence[FilterEntry]) -> dict[str, Drawing]:
    """Return what draws, for each model, the covariances of its depthwise filters above the closed form fitted to each.

    ``filter_fit``, numbered where there are several models.
    """
    return {
        "filter_fit" if len(sources) == 1 else f"filter_fit_{index}": partial(_draw_filter_fit, source.model, entries)
        for index, source in enumerate(sources)
        if (entries := [entry for entry in filters if entry.source == index])
    }


def _draw_filter_fit(model: str, entries: Sequence[FilterEntry], *, ax: Given | None = None) -> Figure:
    full = {
        entry.layer: Covariance(entry.matrix(), entry.kernel, f"layer {entry.layer}: shrunk {entry.shrinkage:.2f}")
        for entry in entries
    }
    form = {
        entry.layer: Covariance(
            closed_form(entry.kernel, entry.shape),
            entry.kernel,
            f"s = {entry.s:.3g}, explains {entry.explained_covariances:.2f}",
        )
        for entry in entries
    }
    with style.look():
        return draw_mosaics(
            {"full": full, "closed\nform": form},
            model=model,
            title="Covariance of each layer's depthwise filters, and the closed form fitted to it",
            ax=ax,
        )


Look = dict[str, Any]
"""Colour, dash and mark of a model or a fold"""
Column = tuple[Kind, Literal["each", "all"], str]
COLUMNS: tuple[Column, ...] = (("qk", "each", "QK, every head"), ("ov", "all", "OV, summed over heads"))
PAPER_COLUMNS: dict[str, str] = {"qk": "QK", "ov": "OV, sum"}
_LEFT, _GAP, _WIDTH, _HEIGHT = 120, 110, 430, 270
PITCH, _LABELLED_PITCH = 75, 105
"""Device pixels between rows; more where every row has its own x axis."""

Mark = tuple[str, str, Literal["full", "none"]]
"""Words, symbol (empty: that of the model or fold) and how it is filled"""
_FILLED: Mark = ("share in beta·I", "", "full")
_OPEN: Mark = ("share above the noise's edge", "", "none")
_CROSS: Mark = ("beyond the bound of its rank: nearest request", "x", "full")


class _Fits(NamedTuple):
    """Fits of several models, of which those under ``fold`` are drawn."""

    sources: Sequence[Source]
    entries: Sequence[Entry]
    fold: Fold


class _Row(NamedTuple):
    """A row of panels: name, label, what draws one model's entries, and what sets the axes once all are drawn."""

    name: str
    label: str
    draw: Callable[[Axes, Sequence[Entry], Look, float], None]
    finish: Callable[[Axes, Sequence[Entry], bool], None]


def fit_drawings(sources: Sequence[Source], entries: Sequence[Entry], fold: Fold, level: float) -> dict[str, Drawing]:
    """Return what draws ``fit_profile``, ``realised_requested`` and ``tails`` of fits under ``fold``, a look a model.

    ``level`` is the coverage of the entries' intervals. Panels: a row of ``alpha`` and ``beta``, or ``kurtosis`` and
    ``share``, of ``qk`` and ``ov``, as in ``"beta ov"``.
    """
    missed = any(not entry.reachable for entry in entries)
    fits = _Fits(sources, _drawable(entries), fold)
    return {
        "fit_profile": partial(
            _grid,
            fits,
            f"Fit by depth: a point a head with its {level:.0%} interval, a line through the layers' means; "
            "shaded: ±2 sd of beta under the null, the median of a layer's heads",
            [
                _Row("alpha", "alpha (log scale)", _alpha_panel, _by_layer("alpha")),
                _Row("beta", "beta (arcsinh scale)", _beta_panel, _by_layer("beta")),
            ],
            raw=True,
        ),
        "realised_requested": partial(
            _grid,
            fits,
            "Realised in the model against requested of the initialiser; on the line nothing is lost to the rank. "
            "Both axes of a panel have one scale",
            [
                _Row("alpha", "requested alpha (log scale)", _request_panel("alpha"), _request_axes("alpha")),
                _Row("beta", "requested beta (arcsinh scale)", _request_panel("beta"), _request_axes("beta")),
            ],
            marks=(_CROSS,) if missed else (),
            pitch=_LABELLED_PITCH,
        ),
        "tails": partial(
            _grid,
            fits,
            "How well two numbers describe each product, by depth: tails of the off-diagonal (0 if Gaussian), and "
            "how much of the squared norm is identity or lies in few directions",
            [
                _Row(
                    *("kurtosis", "excess kurtosis (arcsinh scale)", _kurtosis_panel),
                    _by_layer("offdiagonal_kurtosis"),
                ),
                _Row("share", "share of squared norm", _share_panel, _share_axes),
            ],
            marks=(_FILLED, _OPEN),
        ),
    }


_IN_UNITS_OF_M = (
    *("alpha", "alpha_low", "alpha_high", "beta", "beta_low", "beta_high"),
    *("null_sd", "request_alpha", "request_beta"),
)


def _drawable(entries: Sequence[Entry]) -> Sequence[Entry]:
    """Return entries with 0 for what is too small to be drawn."""
    values = np.array([[getattr(entry, name) for name in _IN_UNITS_OF_M] for entry in entries])
    shown = scales.drawable(values)
    if np.array_equal(values, shown):
        return entries
    rows = zip(entries, shown.tolist(), strict=True)
    return [entry.model_copy(update=dict(zip(_IN_UNITS_OF_M, row, strict=True))) for entry, row in rows]


def label_row(panels: Panels, name: str, label: str) -> None:
    """Label the y axis of the first panel of a row."""
    if not panels.is_first(name):
        return
    axes = panels.axes[name]
    axes.set_ylabel(label)
    if not (style.current().paper or panels.given):
        axes.yaxis.set_label_coords(-92 / scales.length(axes), 0.5)


def place_of(pitch: float) -> Place:
    """Return where panels of a fit stand, with so many pixels between rows."""
    return Place(_LEFT, _WIDTH, _HEIGHT, gap=_GAP, pitch=pitch, above=50, right=40)


def _grid(
    fits: _Fits,
    subject: str,
    rows: Sequence[_Row],
    *,
    raw: bool = False,
    marks: Sequence[Mark] = (),
    pitch: int = PITCH,
    ax: Given | None = None,
) -> Figure:
    """Draw one panel a row and circuit; ``raw`` draws the raw fit of a single model beside."""
    several, paper = len(fits.sources) > 1, style.current().paper
    folds: tuple[Fold, ...] = ("raw", fits.fold) if raw and fits.fold != "raw" and not several else (fits.fold,)
    if several:
        names = [(source.model, look_of(index)) for index, source in enumerate(fits.sources)]
    else:
        names = [(fold if paper else style.fold_words(fold, ["qk", "ov"]), _fold_look(fold)) for fold in folds]
    with style.look():
        panels = open_panels(
            [
                [
                    f"{row.name} {circuit}"
                    for circuit, head, _ in COLUMNS
                    if select(fits.entries, circuit, head, fold=fits.fold)
                ]
                for row in rows
            ],
            place_of(pitch),
            [(" and ".join(source.model for source in fits.sources), 10), (subject, 8.5)],
            legend=_legend(names, marks),
            ax=ax,
        )
        drawn = [(source, fold) for source in range(len(fits.sources)) for fold in folds]
        columns = {str(circuit): (circuit, head, title) for circuit, head, title in COLUMNS}
        by_name = {row.name: row for row in rows}
        for name, axes in panels.axes.items():
            row = by_name[name.split()[0]]
            circuit, head, title = columns[name.split()[1]]
            if not paper or row is rows[0]:
                panels.title(name, PAPER_COLUMNS[circuit] if paper else title)
            shown: list[Entry] = []
            for index, (source, fold) in enumerate(drawn):
                entries = [e for e in select(fits.entries, circuit, head, fold=fold) if e.source == source]
                if entries:
                    look = look_of(source) if several else _fold_look(fold)
                    row.draw(axes, entries, look, 0.3 * (index - (len(drawn) - 1) / 2) / len(drawn))
                shown += entries
            row.finish(axes, shown, panels.is_last(name))
            label_row(panels, name, row.label.replace(" scale)", ")") if paper else row.label)
        return panels.finish()


def look_of(index: int) -> Look:
    """Return a model's colour, dash and mark."""
    return style.line_style(index + 1)  # black is the axes'


def _fold_look(fold: Fold) -> Look:
    look: Look = {"marker": style.FOLD_MARKERS[fold], "linestyle": style.FOLD_LINES[fold], "markeredgewidth": 0}
    return {"color": style.FOLD_COLOURS[fold], "markersize": 3.5, **look}


def handle_of(look: Look) -> Line2D:
    """Return the legend's line of a model or a fold."""
    return Line2D([], [], linewidth=1.4, **look)


def _legend(names: Sequence[tuple[str, Look]], marks: Sequence[Mark]) -> Legend:
    """Return a line a name, in a paper only where there are several, and a symbol a mark."""
    lines = [(handle_of(look), name) for name, look in names]
    own = names[0][1]["marker"] if len(names) == 1 else "o"
    symbols = [
        (Line2D([], [], color=style.INK, marker=marker or own, fillstyle=fill, linestyle="none", markersize=4), words)
        for words, marker, fill in marks
    ]
    return symbols if symbols and style.current().paper and len(names) == 1 else [*lines, *symbols]


def _layers(entries: Sequence[Entry], shift: float) -> Array:
    return np.array([entry.layer + shift for entry in entries])


def _points(axes: Axes, x: Array, y: Array, look: Look, **how: Any) -> None:
    """Draw marks without a line."""
    axes.plot(x, y, **{**look, "linestyle": "none", "alpha": 0.75, **how})


def _bars(axes: Axes, entries: Sequence[Entry], name: str, look: Look, shift: float) -> None:
    """Draw a point an entry with its interval, and a line through the layers' means."""
    x, y = _layers(entries, shift), np.array([getattr(entry, name) for entry in entries])
    low, high = (np.array([getattr(entry, f"{name}_{end}") for entry in entries]) for end in ("low", "high"))
    axes.vlines(x, low, high, color=look["color"], linewidth=0.8, alpha=0.5)
    _points(axes, x, y, look, markersize=2.6)
    places: dict[int, list[int]] = {}
    for place, entry in enumerate(entries):
        places.setdefault(entry.layer, []).append(place)
    layers = sorted(places)
    means = [y[places[layer]].mean() for layer in layers]
    axes.plot(np.array(layers) + shift, means, color=look["color"], linestyle=look["linestyle"], linewidth=1.2)


def _alpha_panel(axes: Axes, entries: Sequence[Entry], look: Look, shift: float) -> None:
    _bars(axes, entries, "alpha", look, shift)


def _beta_panel(axes: Axes, entries: Sequence[Entry], look: Look, shift: float) -> None:
    """Draw beta over the band of +-2 null standard deviations, the median of a layer's heads."""
    of_layer = by_layer(entries)
    layers = sorted(of_layer)
    band = np.array([2 * np.median([entry.null_sd for entry in of_layer[layer]]) for layer in layers])
    axes.fill_between(np.array(layers) + shift, -band, band, color=look["color"], alpha=0.13, linewidth=0, step="mid")
    _bars(axes, entries, "beta", look, shift)


def _request_panel(name: str) -> Callable[[Axes, Sequence[Entry], Look, float], None]:
    def draw(axes: Axes, entries: Sequence[Entry], look: Look, shift: float) -> None:  # noqa: ARG001
        x, y = (np.array([getattr(entry, field) for entry in entries]) for field in (name, f"request_{name}"))
        reached = np.array([entry.reachable for entry in entries], dtype=bool)
        _points(axes, x[reached], y[reached], look, markersize=3)
        axes.plot(x[~reached], y[~reached], "x", color=look["color"], markersize=4)

    return draw


def _request_axes(name: str) -> Callable[[Axes, Sequence[Entry], bool], None]:
    def finish(axes: Axes, entries: Sequence[Entry], bottom: bool) -> None:  # noqa: ARG001
        """Give both axes one scale and one range, so that the line of equality is the diagonal."""
        values = np.array([getattr(entry, field) for entry in entries for field in (name, f"request_{name}")])
        value_axis(axes, name, values, room="x")
        axes.set_xlim(axes.get_ylim())  # first: zeros alone have no logarithmic scale
        if axes.get_yscale() == "log":
            axes.set_xscale("log")
        elif axes.get_yscale() == "asinh":
            width = axes.yaxis.get_transform().linear_width  # type: ignore[attr-defined]
            axes.set_xscale("asinh", linear_width=width)
        ticks = axes.get_yticks()
        axes.set_xticks(ticks, [style.number(tick) for tick in ticks])
        axes.minorticks_off()
        axes.plot(axes.get_ylim(), axes.get_ylim(), "-", color=style.RULE, linewidth=0.8, zorder=0)
        axes.set_xlabel(f"realised {name}")

    return finish


def _kurtosis_panel(axes: Axes, entries: Sequence[Entry], look: Look, shift: float) -> None:
    y = _values(entries, "offdiagonal_kurtosis")
    _points(axes, _layers(entries, shift), y, look, markersize=2.8)


def _share_panel(axes: Axes, entries: Sequence[Entry], look: Look, shift: float) -> None:
    """Draw the share in beta * I (filled) and in directions above the noise's edge (open)."""
    x = _layers(entries, shift)
    _points(axes, x, _values(entries, "share_identity"), look, markersize=3.0)
    _points(axes, x, _values(entries, "share_low_rank"), look, markersize=3.0, fillstyle="none", markeredgewidth=0.8)


def _share_axes(axes: Axes, entries: Sequence[Entry], bottom: bool) -> None:
    scales.layer_axis(axes, sorted({entry.layer for entry in entries}), labelled=bottom)
    axes.set_ylim(-0.03, 1.03)


def _by_layer(name: str) -> Callable[[Axes, Sequence[Entry], bool], None]:
    def finish(axes: Axes, entries: Sequence[Entry], bottom: bool) -> None:
        scales.layer_axis(axes, sorted({entry.layer for entry in entries}), labelled=bottom)
        ends = [f"{name}_low", f"{name}_high"] if name in ("alpha", "beta") else [name]
        value_axis(axes, name, np.concatenate([_values(entries, end) for end in ends]))

    return finish


def _values(entries: Sequence[Entry], name: str) -> Array:
    """Return a statistic of every entry, NaN where it is not defined."""
    return np.array([getattr(entry, name) for entry in entries], dtype=np.float64)


def value_axis(axes: Axes, name: str, values: Array, room: str = "y") -> None:
    """Scale y for a statistic: alpha logarithmic, what has both signs or long tails linear around 0 only."""
    values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    positive = values[values > 0]
    if name == "alpha" and positive.size:
        scales.log_y_axis(axes, float(positive.min()), float(positive.max()), room)
        return
    axes.axhline(0, color=style.FAINT, linewidth=0.7, zorder=0.5)
    if name == "offdiagonal_kurtosis":
        scales.arcsinh_axis(axes, values, linear_width=1.0)
    elif name == "beta":
        scales.arcsinh_axis(axes, values, linear_width=float(np.median(np.abs(values))) or 1.0, room=room)
    else:
        scales.linear_y_axis(axes, min(-0.1, float(values.min())), max(0.1, float(values.max())))
