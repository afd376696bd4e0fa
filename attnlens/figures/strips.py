"""Large images in strips of rows: matplotlib takes 130 bytes an entry of what it colours at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

ENTRIES = 1 << 18
"""Entries of a strip"""


@contextmanager
def in_strips(figure: Figure) -> Iterator[None]:
    """Draw every large image of a figure in strips; only where a canvas has pixels is it the same."""
    images = [image for axes in figure.axes for image in axes.images if _entries(image) > ENTRIES]
    for image in images:
        image.draw = partial(_draw, image)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for image in images:
            del image.draw  # the class's own is seen again


def _entries(image: AxesImage) -> int:
    values = image.get_array()
    return 0 if values is None else values.size


def _draw(image: AxesImage, renderer: RendererBase) -> None:
    values = image.get_array()
    assert values is not None
    rows, columns = values.shape[:2]
    left, right, bottom, top = image.get_extent()
    step = max(1, ENTRIES // columns)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        low, high = (top + (bottom - top) * edge / rows for edge in (stop, start))
        strip = AxesImage(image.axes, interpolation="none", origin="upper", extent=(left, right, low, high))
        strip.set_cmap(image.cmap)
        strip.set_norm(image.norm)
        strip.set_figure(image.figure)
        strip.set_transform(image.get_transform())
        strip.set_clip_path(image.axes.patch)
        strip.set_data(values[start:stop])
        strip.draw(renderer)
