"""Panels of a figure: laid out for the screen or for a paper, or a caller's axes; with legend and colour bar."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure

from attnlens.errors import UsageError
from attnlens.figures import style
from attnlens.printable import printable

Given = Axes | Sequence[Any] | Mapping[str, Axes]
"""Axes of a caller: one for a figure of one panel, one a panel in reading order, or some by the panels' names."""
Legend = Sequence[tuple[Artist, str]]

_LETTER = 0.57
"""Mean width of a letter of DejaVu Sans, in its size"""
_LONGEST = 9.0
"""Inches: the height of a page"""


@dataclass(frozen=True)
class Place:
    """Where a grid of panels stands on the screen's figure, in device pixels at `style.DPI`."""

    left: float
    width: float
    height: float
    gap: float = 0.0
    """Between columns"""
    pitch: float = 0.0
    """Between rows"""
    above: float = 40.0
    """Between heading, or legend, and panels"""
    below: float = 70.0
    right: float = 30.0
    bar: float = 0.0
    """What a colour bar takes on the right"""
    shape: float = 0.7
    """Height of a panel by its width, in a paper"""
    lowest: float = 0.0
    """Inches that a panel is high at least, in a paper"""
    least: float = 760.0
    """Narrowest figure, so that its heading can be read"""


@dataclass
class Panels:
    """Axes by the names of the panels to draw."""

    figure: Figure
    axes: dict[str, Axes]
    given: bool
    """Whether the axes are a caller's: they get no title, and everything that tells them apart is labelled"""
    rows: Sequence[Sequence[str]]
    place: Place
    bars: list[Colorbar] = field(default_factory=list)

    def is_first(self, name: str) -> bool:
        """Whether the y axis of a panel is to be labelled: it is its row's first."""
        return self.given or any(name == row[0] for row in self.rows)

    def is_last(self, name: str) -> bool:
        """Whether the x axis of a panel is to be labelled: nothing is below it."""
        column = {name: place for row in self.rows for place, name in enumerate(row)}
        below = [row for row in self.rows if len(row) > column[name]]
        return self.given or below[-1][column[name]] == name

    def title(self, name: str, text: str) -> None:
        """Name a panel, unless the axes are a caller's."""
        if not self.given:
            self.axes[name].set_title(text, loc="left", pad=3 if style.current().paper else 5)

    def colour_bar(self, drawn: ScalarMappable, label: str, extend: str = "neither") -> tuple[Colorbar, Axes]:
        """Draw a colour bar beside all panels and return it with its axes."""
        if self.given or style.current().paper:
            how: dict[str, Any] = {"ax": list(self.axes.values()), "pad": 0.02, "fraction": 0.06}
            how["aspect"] = 25 * len(self.rows)
        else:
            first, place = next(iter(self.axes.values())), self.place
            across = max(len(row) for row in self.rows)
            left = place.left + across * (place.width + place.gap) - place.gap + 30
            top = self.figure.bbox.height * style.DPI / self.figure.dpi - first.get_window_extent().y1
            rows = len(self.rows)
            whole = rows * (place.height + place.pitch) - place.pitch
            height = place.height if place.height >= 150 else min(whole, 260)
            how = {"cax": style.add_axes(self.figure, left, top, 18, height)}
        bar = self.figure.colorbar(drawn, extend=extend, **how)
        bar.outline.set_linewidth(0.5)
        bar.ax.set_ylabel(label)
        self.bars.append(bar)
        return bar, bar.ax

    def finish(self) -> Figure:
        """Return the figure; one of a paper is first made so high that its panels have their shape."""
        if not self.given and style.current().paper:
            fit_height(self.figure, list(self.axes.values()), self.place, len(self.rows))
        return self.figure


def open_panels(
    rows: Sequence[Sequence[str]],
    place: Place,
    heading: Sequence[tuple[str, float]],
    *,
    notes: str = "",
    legend: Legend = (),
    ax: Given | None = None,
) -> Panels:
    """Return axes for the panels named in ``rows``: the caller's ``ax``, or a new figure's in the current style.

    ``heading`` holds text and points, the first in bold, small ones faint; it and ``notes`` are of the screen's style.
    They and ``legend`` are literal text, of which every character that is not `printable` is escaped. Raises
    `UsageError` where ``ax`` does not suit the panels.
    """
    legend = [(handle, printable(text)) for handle, text in legend]
    if ax is not None:
        axes = given_axes([name for row in rows for name in row], ax)
        first = next(iter(axes.values()))
        if len(legend) > 1:
            _add_legend(first, legend, loc="best")
        return Panels(_figure_of(first), axes, True, rows, place)
    if style.current().paper:
        return _of_a_paper(rows, place, legend)
    return _of_a_screen(rows, place, heading, notes, legend)


def given_axes(names: Sequence[str], ax: Given) -> dict[str, Axes]:
    """Return a caller's axes by the panels' names."""
    if isinstance(ax, Mapping):
        unknown = next((name for name in ax if name not in names), None)
        if unknown is not None or not ax:
            asked = "no panel is named" if unknown is None else f"panel {unknown!r} is not known"
            raise UsageError(f"ax: {asked}: choose {', '.join(names)}")
        return dict(ax)
    flat = [ax] if isinstance(ax, Axes) else list(getattr(ax, "flat", ax))
    if len(flat) != len(names) or not all(isinstance(one, Axes) for one in flat):
        raise UsageError(
            f"ax holds {len(flat)} axes for {len(names)} panels: give one of each, or a dict of some of these names to "
            f"axes: {', '.join(names)}"
        )
    return dict(zip(names, flat, strict=True))


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert isinstance(figure, Figure)
    return figure


def paper_figure(rows: int, columns: int, shape: float) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure of the current width with a grid of axes, laid out by matplotlib once all is drawn."""
    width = style.current().width
    height = min(_LONGEST, rows * (0.8 * width / columns * shape + 0.35) + 0.3)
    figure = Figure(figsize=(width, height), dpi=style.DPI, layout="constrained")
    FigureCanvasAgg(figure)
    cells = figure.subplots(rows, columns, squeeze=False).tolist()
    for axes in figure.axes:  # ticks may be made when the settings are no longer those of the style
        axes.tick_params(labelsize=style.PAPER_POINTS)
    return figure, cells


def fit_height(figure: Figure, axes: Sequence[Axes], place: Place, rows: int) -> None:
    """Make the figure so high that the first of its axes, in so many rows, has the shape of its place.

    Higher where the label of a y axis is longer than that, or that of a colour bar longer than all rows.
    """
    for _ in range(2):
        figure.draw_without_rendering()
        box = axes[0].get_window_extent()
        labels = {one: one.yaxis.label.get_window_extent().height for one in figure.axes if one.get_ylabel()}
        longest = max(size if one in axes else size / rows for one, size in {axes[0]: 0.0, **labels}.items())
        wanted = max(place.shape * box.width, place.lowest * figure.dpi, longest + 4)
        missing = rows * (wanted - box.height) / figure.dpi
        figure.set_figheight(max(0.8, min(_LONGEST, figure.get_figheight() + missing)))


def _of_a_paper(rows: Sequence[Sequence[str]], place: Place, legend: Legend) -> Panels:
    columns = max(map(len, rows))
    if len(rows) == 1 and columns > 2 and style.current().width < 5:
        rows = [[name] for name in rows[0]]
        columns, place = 1, replace(place, shape=0.6 * place.shape)
    figure, cells = paper_figure(len(rows), columns, place.shape)
    axes: dict[str, Axes] = {}
    for names, row in zip(rows, cells, strict=True):
        axes |= dict(zip(names, row, strict=False))
        for unused in row[len(names) :]:
            unused.set_axis_off()
    if len(legend) > 1:
        abreast = columns_of([text for _, text in legend], style.current().width * 72, style.PAPER_POINTS, 24)
        # legends are read row by row, and laid out by columns
        _add_legend(figure, _by_rows(legend, abreast), loc="outside upper left", ncols=abreast)
    return Panels(figure, axes, False, rows, place)


def _of_a_screen(
    rows: Sequence[Sequence[str]],
    place: Place,
    lines: Sequence[tuple[str, float]],
    notes: str,
    legend: Legend,
) -> Panels:
    across = max(map(len, rows))
    total = max(place.left + across * (place.width + place.gap) - place.gap + place.right + place.bar, place.least)
    heading = style.Heading(total)
    for index, (text, points) in enumerate(lines):
        faint: dict[str, Any] = {"color": style.FAINT} if points < 8 else {}
        heading.add(text, points, **({"weight": "bold"} if index == 0 else faint))
    abreast = columns_of([text for _, text in legend], (total - 40) * 72 / style.DPI, 7.5, 24)
    lines_of_legend = math.ceil(len(legend) / abreast)
    top = heading.height + place.above + 24 * lines_of_legend
    notes = style.wrapped(notes, total - 40, 7)
    bottom = top + len(rows) * (place.height + place.pitch) - place.pitch + place.below
    figure = style.new_figure(total, bottom + 15 + style.text_height(notes, 7))
    heading.write(figure)
    style.add_text(figure, 20, bottom, notes, 7, color=style.FAINT)
    if legend:
        width, height = (size * style.DPI for size in figure.get_size_inches())
        corner = (20 / width, 1 - (heading.height + 8) / height)
        how: dict[str, Any] = {"borderpad": 0, "borderaxespad": 0, "columnspacing": 1.6, "handlelength": 2.4}
        how |= {"loc": "upper left", "bbox_to_anchor": corner, "ncols": abreast}
        _add_legend(figure, _by_rows(legend, abreast), **how)
    across_pitch, down_pitch = place.width + place.gap, place.height + place.pitch
    places = {
        name: (place.left + column * across_pitch, top + row * down_pitch)
        for row, names in enumerate(rows)
        for column, name in enumerate(names)
    }
    axes = {name: style.add_axes(figure, *places[name], place.width, place.height) for name in places}
    return Panels(figure, axes, False, rows, place)


def _add_legend(owner: Axes | Figure, entries: Legend, **how: Any) -> None:
    """Add a legend of literal text: no ``$`` begins mathtext, and no ``_`` leaves an entry out, as in matplotlib's."""
    drawn = owner.legend([handle for handle, _ in entries], [str(place) for place in range(len(entries))], **how)
    for text, (_, label) in zip(drawn.get_texts(), entries, strict=True):
        text.set(text=label, parse_math=False)


def columns_of(entries: Sequence[str], width: float, points: float, handle: float) -> int:
    """Return how many legend entries fit side by side, row by row, in a width in points; at least one."""
    sizes = [len(entry) * _LETTER * points + handle + 2 * points for entry in entries]
    fits = (n for n in range(len(sizes), 1, -1) if sum(max(sizes[column::n]) for column in range(n)) <= width)
    return next(fits, 1)


def _by_rows(legend: Legend, abreast: int) -> list[tuple[Artist, str]]:
    """Return entries in the order in which matplotlib, column by column, lays them out row by row."""
    down = math.ceil(len(legend) / abreast)
    whole = len(legend) % abreast or abreast
    heights = [down if column < whole else down - 1 for column in range(abreast)]
    return [legend[row * abreast + column] for column, height in enumerate(heights) for row in range(height)]
