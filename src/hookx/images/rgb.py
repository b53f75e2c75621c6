"""Any image as 8-bit RGB, which models are trained on, in at most three times its bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

_STRIP_PIXELS = 2**18


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB; `ValueError` if it holds values that are not finite.

    Images with 1 or 8 bits per channel go through Pillow's `convert("RGB")`, as in the published preprocessing: grey is
    repeated; alpha channels and transparent colours are dropped, not blended; CMYK, YCCK, Lab and HSV are converted
    without their profiles. Pillow itself reads the upper 8 bits of colour with 16 bits per channel.

    Grey with more than 8 bits is scaled and rounded, because `convert` would clip everything above 255 to white. White
    is 65535 if the values are integers between 0 and that; 1 or 255 if they are floating-point numbers between 0 and
    that. Otherwise the image's minimum becomes 0 and its maximum 255.

    Example:
        >>> deep = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
        >>> np.asarray(to_rgb(deep))[0].tolist()
        [[0, 0, 0], [1, 1, 1], [255, 255, 255]]
    """
    if image.mode == "La":  # Premultiplied grey, which Pillow converts to LA only.
        return _joined(image.size, ((top, strip.convert("LA").convert("RGB")) for top, strip in _strips(image)))
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return image.convert("RGB")
    ranges = [(float(values.min()), float(values.max())) for values in map(_values, _only_strips(image))]
    if not np.isfinite(ranges).all():
        raise ValueError("the image holds values that are not finite")
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    whites = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    if low >= 0 and high <= whites[-1]:
        low, high = 0.0, next(white for white in whites if high <= white)
    factor = 255 / (high - low or 1)  # A uniform image has no contrast: black.

    def grey(strip: Image.Image) -> Image.Image:
        return Image.fromarray(np.rint((_values(strip) - low) * factor).astype(np.uint8)).convert("RGB")

    return _joined(image.size, ((top, grey(strip)) for top, strip in _strips(image)))


def _values(strip: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.asarray(strip).astype(np.float64)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield where a strip begins, and the strip."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(top + rows, height)))


def _only_strips(image: Image.Image) -> Iterator[Image.Image]:
    return (strip for _, strip in _strips(image))


def _joined(size: tuple[int, int], strips: Iterator[tuple[int, Image.Image]]) -> Image.Image:
    whole = Image.new("RGB", size)
    for top, strip in strips:
        whole.paste(strip, (0, top))
    return whole
