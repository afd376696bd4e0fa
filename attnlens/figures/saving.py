"""Writing figures: whole files only, and the same bytes for the same figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from attnlens.atomic import Writer, write_atomic
from attnlens.errors import UsageError
from attnlens.figures import style


def save_figures(
    figures: Mapping[str, Figure],
    folder: str | os.PathLike[str],
    format: str = "png",  # noqa: A002  (the word savefig uses)
    dpi: int = style.DPI,
    into: Writer = write_atomic,
) -> list[Path]:
    """Write every figure as ``<name>.<format>`` into ``folder``, each atomically, and return the paths.

    ``format`` is png, pdf or svg; ``dpi`` sets the pixels of png; ``into`` may be the ``write`` of a `FileSet`. Files
    carry no date and no software version. In pdf and svg, text stays text and images keep one pixel an entry. Raises
    `UsageError` for another format, before anything is written, and `OutputError` when a file cannot be written.
    """
    if format not in WRITERS:
        raise UsageError(f"figures cannot be written as {format!r}: choose {', '.join(WRITERS)}")
    write = WRITERS[format]
    with style.look():
        return [
            into(Path(folder) / f"{name}.{format}", partial(write, figure, dpi)) for name, figure in figures.items()
        ]


def _write_png(figure: Figure, dpi: float, file: IO[bytes]) -> None:
    """Render once and encode: `Figure.savefig` lays everything out twice, and its RGBA takes longer to compress."""
    canvas = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    usual = figure.get_dpi()
    try:
        figure.set_dpi(dpi)
        canvas.draw()
        pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    finally:
        figure.set_dpi(usual)
    drawn_by = PngInfo()
    drawn_by.add_text("Software", "attnlens")
    pixels.save(file, format="png", dpi=(dpi, dpi), compress_level=2, pnginfo=drawn_by)


def _write_pdf(figure: Figure, dpi: float, file: IO[bytes]) -> None:
    figure.savefig(
        file, format="pdf", dpi=dpi, metadata={"CreationDate": None, "Creator": "attnlens", "Producer": None}
    )


def _write_svg(figure: Figure, dpi: float, file: IO[bytes]) -> None:
    figure.savefig(file, format="svg", dpi=dpi, metadata={"Date": None, "Creator": "attnlens"})


WRITERS: dict[str, Callable[[Figure, float, IO[bytes]], None]] = {
    "png": _write_png,
    "pdf": _write_pdf,
    "svg": _write_svg,
}
