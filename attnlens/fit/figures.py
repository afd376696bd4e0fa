"""Figures of fitted parameters and of comparisons: depth profiles with intervals and null band, requests, tails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlens.circuits import Fold, Kind
from attnlens.figures import style
from attnlens.filters.closed_form import closed_form
from attnlens.filters.comparison import SHARES, FilterProfile
from attnlens.filters.entries import FilterEntry
from attnlens.filters.figures import Covariance, draw_mosaics
from attnlens.fit.entries import Entry, Source, select
from attnlens.heads import Array
from attnlens.statistics.depth import Profile


def draw_filter_fits(sources: Sequence[Source], filters: Sequence[FilterEntry]) -> dict[str, Figure]:
    """Draw, for each model, the covariances of its depthwise filters above the closed form fitted to each.

    ``filter_fit``, numbered where there are several models.
    """
    figures = {}
    for index, source in enumerate(sources):
        entries = [entry for entry in filters if entry.source == index]
        if not entries:
            continue
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
            figures["filter_fit" if len(sources) == 1 else f"filter_fit_{index}"] = draw_mosaics(
                {"full": full, "closed\nform": form},
                model=source.model,
                title="Covariance of each layer's depthwise filters, and the closed form fitted to it",
            )
    return figures


# Okabe & Ito's colours, one a model; more models take them again with another line.
MODEL_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MODEL_LINES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")

Look = tuple[str, Literal["-", "--", ":"]]
Column = tuple[Kind, Literal["each", "all"], str]
COLUMNS: tuple[Column, ...] = (("qk", "each", "QK, every head"), ("ov", "all", "OV, summed over heads"))
_LEFT, _GAP, _WIDTH, _HEIGHT = 120, 110, 430, 270
_PITCH, _LABELLED_PITCH = 75, 105
"""Device pixels between rows; more where every row has its own x axis."""

Mark = tuple[str, str, Literal["full", "none"]]
_FILLED: Mark = ("share in beta·I", "o", "full")
_OPEN: Mark = ("share above the noise's edge", "o", "none")
_CROSS: Mark = ("beyond the bound of its rank: nearest request", "x", "full")


class _Fits(NamedTuple):
    """Fits of several models, of which those under ``fold`` are drawn."""

    sources: Sequence[Source]
    entries: Sequence[Entry]
    fold: Fold


class _Row(NamedTuple):
    """A row of panels: its label, what draws one model's entries, and what sets the axes once all are drawn."""

    label: str
    draw: Callable[[Axes, Sequence[Entry], str, float], None]
    finish: Callable[[Axes, Sequence[Entry], bool], None]


def draw_fits(sources: Sequence[Source], entries: Sequence[Entry], fold: Fold, level: float) -> dict[str, Figure]:
    """Draw ``fit_profile``, ``realised_requested`` and ``tails`` of fits under ``fold``, a colour a model.

    ``level`` is the coverage of the entries' intervals.
    """
    missed = any(not entry.reachable for entry in entries)
    fits = _Fits(sources, entries, fold)
    with style.look():
        return {
            "fit_profile": _grid(
                fits,
                f"Fit by depth: a point a head with its {level:.0%} interval, a line through the layers' means; "
                "shaded: ±2 sd of beta under the null, the median of a layer's heads",
                [
                    _Row("alpha", _alpha_panel, _by_layer("alpha")),
                    _Row("beta", _beta_panel, _by_layer("beta")),
                ],
                raw=True,
            ),
            "realised_requested": _grid(
                fits,
                "Realised in the model against requested of the initialiser; on the line nothing is lost to the rank",
                [_Row(f"requested {name}", _request_panel(name), _request_axes(name)) for name in ("alpha", "beta")],
                marks=(_CROSS,) if missed else (),
                pitch=_LABELLED_PITCH,
            ),
            "tails": _grid(
                fits,
                "How well two numbers describe each product, by depth: tails of the off-diagonal (0 if Gaussian), and "
                "how much of the squared norm is identity or lies in few directions",
                [
                    _Row("excess kurtosis", _kurtosis_panel, _by_layer("offdiagonal_kurtosis")),
                    _Row("share of squared norm", _share_panel, _share_axes),
                ],
                marks=(_FILLED, _OPEN),
            ),
        }


def draw_filter_comparison(models: Sequence[str], profiles: Sequence[FilterProfile]) -> Figure:
    """Draw the shares and the effective rank of several models' filters side by side, against relative depth."""
    titles = {
        "effective_rank": "effective rank ÷ positions",
        **{share: share.replace("_share", ": share of the trace") for share in SHARES},
    }
    shown = list(dict.fromkeys(profile.model for profile in profiles))
    with style.look():
        names = [(name, _model_look(models.index(name))) for name in shown]
        subject = "Covariance of depthwise filters, by its closed form, against relative depth"
        places = list(titles.items())
        figure, cells = _canvas(" and ".join(shown), subject, [""] * math.ceil(len(places) / 2), names)
        for place, axes in enumerate(axes for row in cells for axes in row):
            if place >= len(places):
                axes.set_axis_off()
                continue
            statistic, title = places[place]
            for profile in profiles:
                if profile.statistic == statistic:
                    _profile_line(axes, models, profile)
            style.linear_y_axis(axes, 0.0, 1.0)
            axes.set_xlim(-0.03, 1.03)
            axes.set_title(title, loc="left", pad=5)
            axes.set_xlabel("relative depth")
    return figure


def _profile_line(axes: Axes, models: Sequence[str], profile: Profile | FilterProfile) -> None:
    colour, line = _model_look(models.index(profile.model))
    axes.plot(profile.depth, profile.values, line, marker="o", markersize=2.5, color=colour, linewidth=1.2)


def draw_comparison(models: Sequence[str], profiles: Sequence[Profile], fold: Fold) -> Figure:
    """Draw the profiles of several models side by side, against relative depth."""
    rows = {"alpha": "alpha (log scale)", "beta": "beta", "identity_share": "identity cosine ÷ bound"}
    with style.look():
        names = [(name, _model_look(i)) for i, name in enumerate(models)]
        subject = f"{fold} products, M ≈ alpha·Z + beta·I, against relative depth"
        figure, cells = _canvas(" and ".join(models), subject, list(rows.values()), names)
        for j, statistic in enumerate(rows):
            for i, (circuit, _, title) in enumerate(COLUMNS):
                axes = cells[j][i]
                shown = [p for p in profiles if (p.circuit, p.statistic) == (circuit, statistic)]
                for profile in shown:
                    _profile_line(axes, models, profile)
                _value_axis(axes, statistic, np.concatenate([p.values for p in shown] or [np.zeros(1)]))
                axes.set_xlim(-0.03, 1.03)
                axes.set_title(title.replace("every head", "mean over heads"), loc="left", pad=5)
                axes.set_xlabel("relative depth" if j == len(rows) - 1 else "")
    return figure


def _grid(
    fits: _Fits,
    subject: str,
    rows: Sequence[_Row],
    *,
    raw: bool = False,
    marks: Sequence[Mark] = (),
    pitch: int = _PITCH,
) -> Figure:
    """Lay out one panel a row and circuit; ``raw`` draws the raw fit of a single model beside."""
    several = len(fits.sources) > 1
    names: list[tuple[str, Look]] = [(source.model, _model_look(i)) for i, source in enumerate(fits.sources)]
    folds: tuple[Fold, ...] = ("raw", fits.fold) if raw and fits.fold != "raw" and not several else (fits.fold,)
    if not several:
        names = [(style.fold_words(fold, ["qk", "ov"]), (style.FOLD_COLOURS[fold], "-")) for fold in folds]
    columns = [column for column in COLUMNS if select(fits.entries, column[0], column[1], fold=fits.fold)]
    title = " and ".join(source.model for source in fits.sources)
    labels = [row.label for row in rows]
    figure, cells = _canvas(title, subject, labels, names, columns=len(columns), marks=marks, pitch=pitch)
    drawn = [(source, fold) for source in range(len(fits.sources)) for fold in folds]
    for j, row in enumerate(rows):
        for i, (circuit, head, label) in enumerate(columns):
            axes = cells[j][i]
            axes.set_title(label, loc="left", pad=5)
            shown: list[Entry] = []
            for index, (source, fold) in enumerate(drawn):
                entries = [e for e in select(fits.entries, circuit, head, fold=fold) if e.source == source]
                if entries:
                    colour = _model_look(source)[0] if several else style.FOLD_COLOURS[fold]
                    row.draw(axes, entries, colour, 0.3 * (index - (len(drawn) - 1) / 2) / len(drawn))
                shown += entries
            row.finish(axes, shown, j == len(rows) - 1)
    return figure


def _canvas(
    title: str,
    subject: str,
    rows: Sequence[str],
    names: Sequence[tuple[str, Look]],
    columns: int = 2,
    marks: Sequence[Mark] = (),
    pitch: int = _PITCH,
) -> tuple[Figure, list[list[Axes]]]:
    """Lay out title, legend (a line a name, a symbol a mark) and a grid of axes."""
    from matplotlib.lines import Line2D

    total = max(_LEFT + columns * (_WIDTH + _GAP) - _GAP + 40, 760)
    heading = style.Heading(total)
    heading.add(title, 10, weight="bold")
    heading.add(subject, 8.5)
    lines = [Line2D([], [], color=colour, linestyle=line, linewidth=1.4) for _, (colour, line) in names]
    symbols = [
        Line2D([], [], color=style.INK, marker=marker, fillstyle=fill, linestyle="none", markersize=4)
        for _, marker, fill in marks
    ]
    entries = [name for name, _ in names] + [words for words, *_ in marks]
    abreast = _abreast(entries, total - 40)
    top = heading.height + 62 + 24 * math.ceil(len(entries) / abreast)
    figure = style.new_figure(total, top + len(rows) * (_HEIGHT + pitch) - pitch + 85)
    heading.write(figure)
    width, height = (size * style.DPI for size in figure.get_size_inches())
    figure.legend(
        [*lines, *symbols],
        entries,
        loc="upper left",
        bbox_to_anchor=(20 / width, 1 - (heading.height + 8) / height),
        ncols=abreast,
        borderpad=0,
        borderaxespad=0,
    )
    cells = []
    for j, label in enumerate(rows):
        row = [
            style.add_axes(figure, _LEFT + i * (_WIDTH + _GAP), top + j * (_HEIGHT + pitch), _WIDTH, _HEIGHT)
            for i in range(columns)
        ]
        row[0].set_ylabel(label)
        row[0].yaxis.set_label_coords(-92 / _WIDTH, 0.5)
        cells.append(row)
    return figure, cells


def _abreast(entries: Sequence[str], width: float) -> int:
    """Return how many legend entries fit side by side: all, or as many as the longest allows."""
    letter, handle = style.pixels(0.57 * 7.5), 70
    if sum(len(entry) * letter + handle for entry in entries) <= width:
        return len(entries)
    return max(1, min(len(entries), int(width / (max(map(len, entries)) * letter + handle))))


def _model_look(index: int) -> Look:
    return MODEL_COLOURS[index % len(MODEL_COLOURS)], MODEL_LINES[index // len(MODEL_COLOURS) % len(MODEL_LINES)]


def _layers(entries: Sequence[Entry], shift: float) -> Array:
    return np.array([entry.layer + shift for entry in entries])


def _bars(axes: Axes, entries: Sequence[Entry], name: str, colour: str, shift: float) -> None:
    """Draw a point an entry with its interval, and a line through the layers' means."""
    x, y = _layers(entries, shift), np.array([getattr(entry, name) for entry in entries])
    low, high = (np.array([getattr(entry, f"{name}_{end}") for entry in entries]) for end in ("low", "high"))
    axes.vlines(x, low, high, color=colour, linewidth=0.8, alpha=0.5)
    axes.plot(x, y, "o", color=colour, markersize=2.6, alpha=0.75, markeredgewidth=0)
    layers = np.unique([entry.layer for entry in entries])
    means = [y[[entry.layer == layer for entry in entries]].mean() for layer in layers]
    axes.plot(layers + shift, means, "-", color=colour, linewidth=1.2)


def _alpha_panel(axes: Axes, entries: Sequence[Entry], colour: str, shift: float) -> None:
    _bars(axes, entries, "alpha", colour, shift)


def _beta_panel(axes: Axes, entries: Sequence[Entry], colour: str, shift: float) -> None:
    """Draw beta over the band of +-2 null standard deviations, the median of a layer's heads."""
    layers = sorted({entry.layer for entry in entries})
    band = np.array([2 * np.median([e.null_sd for e in entries if e.layer == layer]) for layer in layers])
    axes.fill_between(np.array(layers) + shift, -band, band, color=colour, alpha=0.13, linewidth=0, step="mid")
    _bars(axes, entries, "beta", colour, shift)


def _request_panel(name: str) -> Callable[[Axes, Sequence[Entry], str, float], None]:
    def draw(axes: Axes, entries: Sequence[Entry], colour: str, shift: float) -> None:  # noqa: ARG001
        x, y = (np.array([getattr(entry, field) for entry in entries]) for field in (name, f"request_{name}"))
        reached = np.array([entry.reachable for entry in entries], dtype=bool)
        axes.plot(x[reached], y[reached], "o", color=colour, markersize=3, alpha=0.7, markeredgewidth=0)
        axes.plot(x[~reached], y[~reached], "x", color=colour, markersize=4)

    return draw


def _request_axes(name: str) -> Callable[[Axes, Sequence[Entry], bool], None]:
    def finish(axes: Axes, entries: Sequence[Entry], bottom: bool) -> None:  # noqa: ARG001
        """Give both axes one scale and one range, so that the line of equality is the diagonal."""
        values = np.array([getattr(entry, field) for entry in entries for field in (name, f"request_{name}")])
        _value_axis(axes, name, values)
        if axes.get_yscale() == "log":
            axes.set_xscale("log")
        elif axes.get_yscale() == "asinh":
            width = axes.yaxis.get_transform().linear_width  # type: ignore[attr-defined]
            axes.set_xscale("asinh", linear_width=width)
        ticks = axes.get_yticks()
        axes.set_xlim(axes.get_ylim())
        axes.set_xticks(ticks, [style.number(tick) for tick in ticks])
        axes.minorticks_off()
        axes.plot(axes.get_ylim(), axes.get_ylim(), "-", color=style.RULE, linewidth=0.8, zorder=0)
        axes.set_xlabel(f"realised {name}")

    return finish


def _kurtosis_panel(axes: Axes, entries: Sequence[Entry], colour: str, shift: float) -> None:
    y = _values(entries, "offdiagonal_kurtosis")
    axes.plot(_layers(entries, shift), y, "o", color=colour, markersize=2.8, alpha=0.7, markeredgewidth=0)


def _share_panel(axes: Axes, entries: Sequence[Entry], colour: str, shift: float) -> None:
    """Draw the share in beta * I (filled) and in directions above the noise's edge (open)."""
    x = _layers(entries, shift)
    look: Any = {"color": colour, "markersize": 3.0, "linestyle": "none", "marker": "o"}
    axes.plot(x, _values(entries, "share_identity"), alpha=0.75, markeredgewidth=0, **look)
    axes.plot(x, _values(entries, "share_low_rank"), fillstyle="none", markeredgewidth=0.8, **look)


def _share_axes(axes: Axes, entries: Sequence[Entry], bottom: bool) -> None:
    style.layer_axis(axes, sorted({entry.layer for entry in entries}), _WIDTH, labelled=bottom)
    axes.set_ylim(-0.03, 1.03)


def _by_layer(name: str) -> Callable[[Axes, Sequence[Entry], bool], None]:
    def finish(axes: Axes, entries: Sequence[Entry], bottom: bool) -> None:
        style.layer_axis(axes, sorted({entry.layer for entry in entries}), _WIDTH, labelled=bottom)
        ends = [f"{name}_low", f"{name}_high"] if name in ("alpha", "beta") else [name]
        _value_axis(axes, name, np.concatenate([_values(entries, end) for end in ends]))

    return finish


def _values(entries: Sequence[Entry], name: str) -> Array:
    """Return a statistic of every entry, NaN where it is not defined."""
    return np.array([getattr(entry, name) for entry in entries], dtype=np.float64)


def _value_axis(axes: Axes, name: str, values: Array) -> None:
    """Scale y for a statistic: alpha logarithmic, what has both signs or long tails linear around 0 only."""
    values = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    positive = values[values > 0]
    if name == "alpha" and positive.size:
        style.log_y_axis(axes, float(positive.min()), float(positive.max()))
        return
    axes.axhline(0, color=style.FAINT, linewidth=0.7, zorder=0.5)
    if name == "offdiagonal_kurtosis":
        style.arcsinh_y_axis(axes, values, linear_width=1.0)
    elif name == "beta":
        style.arcsinh_y_axis(axes, values, linear_width=float(np.median(np.abs(values))) or 1.0)
    else:
        style.linear_y_axis(axes, min(-0.1, float(values.min())), max(0.1, float(values.max())))
