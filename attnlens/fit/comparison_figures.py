"""Figures of comparisons: profiles of several models against relative depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from attnlens.circuits import Fold
from attnlens.figures import scales, style
from attnlens.figures.panels import Given, open_panels
from attnlens.filters.comparison import SHARES, FilterProfile
from attnlens.fit.figures import COLUMNS, PAPER_COLUMNS, PITCH, handle_of, label_row, look_of, place_of, value_axis
from attnlens.statistics.depth import Profile


def draw_filter_comparison(
    models: Sequence[str], profiles: Sequence[FilterProfile], *, ax: Given | None = None
) -> Figure:
    """Draw the shares and the effective rank of several models' filters side by side, against relative depth.

    A panel a statistic, by its name.
    """
    titles = {
        "effective_rank": "effective rank ÷ positions",
        **{share: share.replace("_share", ": share of the trace") for share in SHARES},
    }
    shown = list(dict.fromkeys(profile.model for profile in profiles))
    names = list(titles)
    rows = [names[start : start + 2] for start in range(0, len(names), 2)]
    subject = "Covariance of depthwise filters, by its closed form, against relative depth"
    with style.look():
        panels = open_panels(
            rows,
            place_of(PITCH),
            [(" and ".join(shown), 10), (subject, 8.5)],
            legend=[(handle_of(look_of(models.index(name))), name) for name in shown],
            ax=ax,
        )
        for name, axes in panels.axes.items():
            for profile in profiles:
                if profile.statistic == name:
                    _profile_line(axes, models, profile)
            scales.linear_y_axis(axes, 0.0, 1.0)
            _depth_axis(axes, panels.is_last(name))
            short = titles[name].replace(": share of the trace", " share").replace(" ÷ positions", "")
            panels.title(name, short if style.current().paper else titles[name])
        return panels.finish()


def draw_comparison(
    models: Sequence[str], profiles: Sequence[Profile], fold: Fold, *, ax: Given | None = None
) -> Figure:
    """Draw the profiles of several models side by side, against relative depth.

    Panels: ``alpha``, ``beta`` and ``identity_share`` of ``qk`` and ``ov``, as in ``"beta ov"``.
    """
    rows = {
        "alpha": ("alpha (log scale)", "alpha (log)"),
        "beta": ("beta (arcsinh scale)", "beta (arcsinh)"),
        "identity_share": ("identity cosine ÷ bound", "cosine ÷ bound"),
    }
    titles = {str(circuit): title.replace("every head", "mean over heads") for circuit, _, title in COLUMNS}
    paper = style.current().paper
    subject = f"{fold} products, M ≈ alpha·Z + beta·I, against relative depth"
    with style.look():
        panels = open_panels(
            [[f"{statistic} {circuit}" for circuit, *_ in COLUMNS] for statistic in rows],
            place_of(PITCH),
            [(" and ".join(models), 10), (subject, 8.5)],
            legend=[(handle_of(look_of(index)), name) for index, name in enumerate(models)],
            ax=ax,
        )
        for name, axes in panels.axes.items():
            statistic, circuit = name.split()
            shown = [p for p in profiles if (p.circuit, p.statistic) == (circuit, statistic)]
            values = scales.drawable(np.concatenate([p.values for p in shown] or [np.zeros(1)]))
            for profile in shown:
                _profile_line(axes, models, profile)
            value_axis(axes, statistic, values)
            _depth_axis(axes, panels.is_last(name))
            label_row(panels, name, rows[statistic][paper])
            if not paper or statistic == "alpha":
                panels.title(name, PAPER_COLUMNS[circuit] if paper else titles[circuit])
        return panels.finish()


def _profile_line(axes: Axes, models: Sequence[str], profile: Profile | FilterProfile) -> None:
    look = look_of(models.index(profile.model))
    axes.plot(profile.depth, profile.values, **{**look, "markersize": 2.8}, linewidth=1.2)


def _depth_axis(axes: Axes, labelled: bool) -> None:
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.set_xlabel("relative depth" if labelled else "")
