"""What every result offers that has figures: all of them by name, or one, for a screen, a paper or given axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attnlens.figures.drawings import Drawing
    from attnlens.figures.panels import Given


class Drawn:
    """A result with figures; `_drawings` returns what draws each, by name."""

    def _drawings(self) -> dict[str, Drawing]:
        raise NotImplementedError

    def figures(self, *, style: str | None = None, width: str | float | None = None) -> dict[str, Figure]:
        """Draw every figure, by name; ``style`` and ``width`` are those of `attnlens.figures.figure_style`."""
        from attnlens.figures.drawings import draw_all

        return draw_all(self._drawings(), style, width)

    def figure(
        self, name: str, *, ax: Given | None = None, style: str | None = None, width: str | float | None = None
    ) -> Figure:
        """Draw one of `figures` by its name, into ``ax`` where it is given: see `Inspection.figure`."""
        from attnlens.figures.drawings import draw_one

        return draw_one(self._drawings(), name, ax, style, width)
