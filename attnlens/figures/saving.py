"""Writing figures: whole files only, and the same bytes for the same figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from attnlens.atomic import Write, Writer, write_atomic
from attnlens.errors import UsageError
from attnlens.figures import style
from attnlens.figures.strips import in_strips
from attnlens.threads import beside

Item = TypeVar("Item")


def save_figures(
    figures: Mapping[str, Figure],
    folder: str | os.PathLike[str],
    format: str | None = None,  # noqa: A002  (the word savefig uses)
    dpi: float | None = None,
    into: Writer = write_atomic,
) -> list[Path]:
    """Write every figure as ``<name>.<format>`` into ``folder``, each atomically, and return the paths.

    ``format`` is png, pdf or svg; ``dpi`` sets the pixels of png; what is left out is as in the current `figure_style`,
    by default png of 150. ``into`` may be the ``write`` of a `FileSet`. Files carry no date and no software version. In
    pdf and svg, text stays text and images keep one pixel an entry. Raises `UsageError` for another format, before
    anything is written, and `OutputError` when a file cannot be written.
    """
    here = style.current()
    suffix, dots = format or here.format, dpi or here.dpi
    if suffix not in WRITERS:
        raise UsageError(f"figures cannot be written as {suffix!r}: choose {', '.join(WRITERS)}")
    with style.look():
        drawn = _one_ahead((name, WRITERS[suffix](figure, dots)) for name, figure in figures.items())
        return [into(Path(folder) / f"{name}.{suffix}", write) for name, write in drawn]


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item when the next one has been made: pixels of two figures are in memory at most."""
    held: list[Item] = []
    for item in items:
        held.append(item)
        if len(held) == 2:
            yield held.pop(0)
    yield from held


def _png(figure: Figure, dpi: float) -> Write:
    """Render once, and encode beside the rendering of the next figure.

    `Figure.savefig` lays everything out twice, and its RGBA takes longer to compress.
    """
    encoded = beside(partial(_encoded, _pixels(figure, dpi), dpi))
    return lambda file: file.write(encoded())


def _pixels(figure: Figure, dpi: float) -> Image.Image:
    before, usual = figure.canvas, figure.get_dpi()
    canvas = before if isinstance(before, FigureCanvasAgg) else FigureCanvasAgg(figure)
    try:
        figure.set_dpi(dpi)
        with in_strips(figure):
            canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    finally:
        figure.set_dpi(usual)
        figure.set_canvas(before)  # the pixels go with the other one, if no text holds on to it
        for text in figure.findobj(Text):
            text._renderer = None  # type: ignore[attr-defined]  # noqa: SLF001  # as matplotlib does before it pickles one


def _encoded(pixels: Image.Image, dpi: float) -> bytes:
    drawn_by = PngInfo()
    drawn_by.add_text("Software", "attnlens")
    found = BytesIO()
    pixels.save(found, format="png", dpi=(dpi, dpi), compress_level=2, pnginfo=drawn_by)
    return found.getvalue()


def _pdf(figure: Figure, dpi: float) -> Write:
    about = {"CreationDate": None, "Creator": "attnlens", "Producer": None}
    return lambda file: figure.savefig(file, format="pdf", dpi=dpi, metadata=about)


def _svg(figure: Figure, dpi: float) -> Write:
    about = {"Date": None, "Creator": "attnlens"}
    return lambda file: figure.savefig(file, format="svg", dpi=dpi, metadata=about)


WRITERS: dict[str, Callable[[Figure, float], Write]] = {"png": _png, "pdf": _pdf, "svg": _svg}
"""By format, what renders a figure where that is a step of its own, and returns how it is written."""
