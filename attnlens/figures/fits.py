"""Figures of fitted parameters and of comparisons: depth profiles with intervals and null band, requests, tails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlens.circuits import Fold, Kind
from attnlens.comparing import Comparison
from attnlens.figures import style
from attnlens.params import Entry, InitParams

# Okabe & Ito's colours, one a model; more models take them again with another line.
MODEL_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MODEL_LINES: tuple[Literal["-", "--", ":"], ...] = ("-", "--", ":")

Look = tuple[str, Literal["-", "--", ":"]]
Column = tuple[Kind, Literal["each", "all"], str]
COLUMNS: tuple[Column, ...] = (("qk", "each", "QK, every head"), ("ov", "all", "OV, summed over heads"))
_LEFT, _GAP, _WIDTH, _HEIGHT = 120, 110, 430, 270


def draw_fits(params: InitParams) -> dict[str, Figure]:
    """Draw ``fit_profile``, ``realised_requested`` and ``tails`` of a parameter file, a colour a model."""
    with style.look():
        return {
            "fit_profile": _grid(
                params,
                "Fit by depth: bars are intervals of the fit, the grey band is what beta is under the null",
                {"alpha": _alpha_panel, "beta": _beta_panel},
                raw=True,
            ),
            "realised_requested": _grid(
                params,
                "Realised in the model against requested of the initialiser; on the line nothing is lost to the rank",
                {"alpha": _request_panel("alpha"), "beta": _request_panel("beta")},
            ),
            "tails": _grid(
                params,
                "How well two numbers describe each product, by depth",
                {"kurtosis": _kurtosis_panel, "share of squared norm": _share_panel},
            ),
        }


def draw_comparison(comparison: Comparison) -> Figure:
    """Draw the profiles of several models side by side, against relative depth."""
    rows = {"alpha": "alpha (log scale)", "beta": "beta", "identity_share": "identity cosine ÷ bound"}
    with style.look():
        names = [(name, _model_look(i)) for i, name in enumerate(comparison.models)]
        subject = f"{comparison.fold} products, M ≈ alpha·Z + beta·I, against relative depth"
        figure, cells = _canvas(" and ".join(comparison.models), subject, list(rows.values()), names)
        for j, statistic in enumerate(rows):
            for i, (circuit, _, title) in enumerate(COLUMNS):
                axes = cells[j][i]
                found = comparison.select(circuit, statistic)
                for profile in found:
                    colour, line = _model_look(comparison.models.index(profile.model))
                    axes.plot(
                        profile.depth, profile.values, line, marker="o", markersize=2.5, color=colour, linewidth=1.2
                    )
                _finish(axes, statistic, np.concatenate([p.values for p in found] or [np.zeros(1)]))
                axes.set_xlim(-0.03, 1.03)
                axes.set_title(title.replace("every head", "mean over heads"), loc="left", pad=5)
                axes.set_xlabel("relative depth" if j == len(rows) - 1 else "")
    return figure


def _grid(
    params: InitParams,
    subject: str,
    rows: dict[str, Callable[[Axes, Sequence[Entry], str, float], None]],
    *,
    raw: bool = False,
) -> Figure:
    """Lay out one panel a statistic and circuit; ``raw`` draws the raw fit beside, in grey and to the left."""
    several = len(params.sources) > 1
    names: list[tuple[str, Look]] = [(source.model, _model_look(i)) for i, source in enumerate(params.sources)]
    folds: tuple[Fold, ...] = ("raw", params.fold) if raw and params.fold != "raw" else (params.fold,)
    if not several:
        names = [(style.fold_words(fold, ["qk", "ov"]), (style.FOLD_COLOURS[fold], "-")) for fold in folds]
    columns = [column for column in COLUMNS if params.select(column[0], column[1])]
    title = " and ".join(source.model for source in params.sources)
    figure, cells = _canvas(title, subject, list(rows), names, columns=len(columns))
    for j, draw in enumerate(rows.values()):
        for i, (circuit, head, label) in enumerate(columns):
            axes = cells[j][i]
            axes.set_title(label, loc="left", pad=5)
            shown: list[Entry] = []
            for place, fold in enumerate(folds if not several else folds[-1:]):
                for source in range(len(params.sources)):
                    entries = [e for e in params.select(circuit, head, fold=fold) if e.source == source]
                    colour = _model_look(source)[0] if several else style.FOLD_COLOURS[fold]
                    count = len(params.sources) if several else len(folds)
                    shift = 0.3 * ((source if several else place) - (count - 1) / 2) / count
                    draw(axes, entries, colour, shift)
                    shown += entries
            _scale(axes, list(rows)[j], shown, bottom=j == len(rows) - 1)
    return figure


def _canvas(
    title: str, subject: str, rows: Sequence[str], names: Sequence[tuple[str, Look]], columns: int = 2
) -> tuple[Figure, list[list[Axes]]]:
    from matplotlib.lines import Line2D

    total = max(_LEFT + columns * (_WIDTH + _GAP) - _GAP + 40, 760)
    heading = style.Heading(total)
    heading.add(title, 10, weight="bold")
    heading.add(subject, 8.5)
    top = heading.height + 85
    figure = style.new_figure(total, top + len(rows) * (_HEIGHT + 75) + 20)
    heading.write(figure)
    width, height = (size * style.DPI for size in figure.get_size_inches())
    figure.legend(
        [Line2D([], [], color=colour, linestyle=line, linewidth=1.4) for _, (colour, line) in names],
        [name for name, _ in names],
        loc="upper left",
        bbox_to_anchor=(20 / width, 1 - (heading.height + 8) / height),
        ncols=min(len(names), 3),
        borderpad=0,
        borderaxespad=0,
    )
    cells = []
    for j, label in enumerate(rows):
        row = [
            style.add_axes(figure, _LEFT + i * (_WIDTH + _GAP), top + j * (_HEIGHT + 75), _WIDTH, _HEIGHT)
            for i in range(columns)
        ]
        row[0].set_ylabel(label)
        row[0].yaxis.set_label_coords(-92 / _WIDTH, 0.5)
        cells.append(row)
    return figure, cells


def _model_look(place: int) -> Look:
    return MODEL_COLOURS[place % len(MODEL_COLOURS)], MODEL_LINES[place // len(MODEL_COLOURS) % len(MODEL_LINES)]


def _layers(entries: Sequence[Entry], shift: float) -> np.ndarray:
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
    """Draw beta over the band of +-2 null standard deviations, the widest of a layer's heads."""
    layers = sorted({entry.layer for entry in entries})
    band = np.array([max(2 * e.null_sd for e in entries if e.layer == layer) for layer in layers])
    axes.fill_between(np.array(layers) + shift, -band, band, color=colour, alpha=0.13, linewidth=0, step="mid")
    _bars(axes, entries, "beta", colour, shift)


def _request_panel(name: str) -> Callable[[Axes, Sequence[Entry], str, float], None]:
    def draw(axes: Axes, entries: Sequence[Entry], colour: str, shift: float) -> None:  # noqa: ARG001
        x, y = (np.array([getattr(entry, field) for entry in entries]) for field in (name, f"request_{name}"))
        reached = np.array([entry.reachable for entry in entries], dtype=bool)
        axes.plot(x[reached], y[reached], "o", color=colour, markersize=3, alpha=0.7, markeredgewidth=0)
        axes.plot(x[~reached], y[~reached], "x", color=colour, markersize=4)

    return draw


def _kurtosis_panel(axes: Axes, entries: Sequence[Entry], colour: str, shift: float) -> None:
    y = [entry.offdiagonal_kurtosis for entry in entries]
    axes.plot(_layers(entries, shift), y, "o", color=colour, markersize=2.8, alpha=0.7, markeredgewidth=0)


def _share_panel(axes: Axes, entries: Sequence[Entry], colour: str, shift: float) -> None:
    """Draw the share in beta * I (filled) and in directions above the noise's edge (open)."""
    x = _layers(entries, shift)
    look: Any = {"color": colour, "markersize": 3.0, "linestyle": "none"}
    axes.plot(x, [e.share_identity for e in entries], marker="o", alpha=0.75, markeredgewidth=0, **look)
    axes.plot(x, [e.share_low_rank for e in entries], marker="o", fillstyle="none", markeredgewidth=0.8, **look)


def _scale(axes: Axes, row: str, entries: Sequence[Entry], bottom: bool) -> None:
    requested = bool(axes.lines) and row in ("alpha", "beta") and not axes.collections
    if requested:
        x, y = (np.array([getattr(e, field) for e in entries]) for field in (row, f"request_{row}"))
        ends = np.array([min(x.min(), y.min()), max(x.max(), y.max())])
        axes.plot(ends, ends, "-", color=style.RULE, linewidth=0.8, zorder=0)
        axes.set_xlabel(f"realised {row}")
        axes.set_ylabel(f"requested {row}" if axes.get_ylabel() else "")
        return
    layers = sorted({entry.layer for entry in entries})
    style.layer_axis(axes, layers, _WIDTH, labelled=bottom)
    if row == "share of squared norm":
        axes.set_ylim(-0.03, 1.03)
        return
    values = {"kurtosis": "offdiagonal_kurtosis"}.get(row, row)
    _finish(axes, row, np.array([getattr(entry, values) for entry in entries]))


def _finish(axes: Axes, row: str, values: np.ndarray) -> None:
    positive = values[values > 0]
    if row == "alpha" and positive.size:
        style.log_y_axis(axes, float(positive.min()), float(positive.max()))
        return
    axes.axhline(0, color=style.FAINT, linewidth=0.7, zorder=0.5)
    if row == "kurtosis":
        style.arcsinh_y_axis(axes, values, linear_width=1.0)
    elif row == "beta":
        style.arcsinh_y_axis(axes, values, linear_width=float(np.median(np.abs(values))) or 1.0)
    else:
        style.linear_y_axis(axes, min(-0.1, float(values.min())), max(0.1, float(values.max())))
