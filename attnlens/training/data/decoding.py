"""An opened image as uint8 RGB: upright, its first frame, 16-bit values over their whole range."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

_ORIENTATION = 0x0112
"""EXIF's tag of how a camera was held."""
_BROKEN_EXIF = (ValueError, TypeError, LookupError, SyntaxError, OSError, EOFError, struct.error, OverflowError)
"""What Pillow raises for metadata that is damaged while the pixels are not."""
_TO_8_BITS = ((np.arange(1 << 16, dtype=np.uint32) + 128) // 257).astype(np.uint8)
"""uint8 of a 16-bit value: 65,535 becomes 255, what lies between is rounded."""


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Keep Pillow from warning of damaged metadata and the like, in all threads: what matters is counted."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def pixels_of(image: Image, image_size: int | None) -> NDArray[np.uint8]:
    """Return ``[channel, row, column]`` RGB, resized (bicubic) and cropped to a centred square where a size is given.

    Alpha is dropped and grey repeated, as timm's and torchvision's loaders do. Unlike theirs, the camera's orientation
    (EXIF) is applied, and 16-bit values are divided by 257 where Pillow's own conversion cuts them off at 255. Raises
    `ValueError` for values whose range is not known.
    """
    rgb = _rgb(_upright(image))
    if image_size is not None and rgb.size != (image_size, image_size):
        from PIL import ImageOps

        rgb = ImageOps.fit(rgb, (image_size, image_size), method=3)  # bicubic
    return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except _BROKEN_EXIF:
        turned = False
    if not turned:
        return image
    image.load()  # what is damaged in the pixels is told of here, not taken for damaged metadata
    try:
        return ImageOps.exif_transpose(image)
    except _BROKEN_EXIF:
        return image


def _rgb(image: Image) -> Image:
    from PIL import Image as Images

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # of PPM Pillow makes 0..65535
        values: NDArray[Any] = np.asarray(image)
        return Images.fromarray(_TO_8_BITS[np.clip(values, 0, 65535)]).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("it holds 32-bit values of unknown range: save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:  # a palette's alpha cannot be dropped without a warning
        image = image.convert("RGBA")
    return image.convert("RGB")
