"""Any image as 8-bit RGB, which models are trained on, in at most three times its bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from hookx.images.deep import DeepColour
from hookx.plan.grey import NARROW_SHARE, RangeUse

_STRIP_PIXELS = 2**18
_BITS_PER_SAMPLE, _SAMPLE_FORMAT = 258, 339  # tags of a TIFF
_UNSIGNED = 1

Values = np.ndarray[Any, np.dtype[Any]]


def to_rgb(
    image: Image.Image, grey_range: str = "full", deep: DeepColour | None = None
) -> tuple[Image.Image, RangeUse | None]:
    """Convert an image to 8-bit RGB; `ValueError` if it holds values that are not finite.

    Images with 1 or 8 bits per channel go through Pillow's `convert("RGB")`, as in the published preprocessing: grey is
    repeated; alpha channels and transparent colours are dropped, not blended; CMYK, YCCK, Lab and HSV are converted
    without their profiles.

    Values of more than 8 bits are scaled and rounded, because `convert` would clip everything above 255 to white. With
    the grey range 'full', black is 0, and white is what the type can hold: 4095 for a TIFF of 12 bits, 65535 for other
    integers, 1 for floating-point numbers. If an image has values outside of that, which signed or wide integers and
    floating-point numbers can, its least value is black and its greatest white. With 'minmax' that goes for every
    image. Two numbers, '0,4095', are black and white, and values outside are clipped. All channels of an image with 16
    bits per channel are scaled alike, CMYK as with 'full'.

    Args:
        image: the image; if there is `deep`, the more significant bytes, which are overwritten.
        grey_range: 'full', 'minmax' or two numbers, as `Preprocessing` has it.
        deep: the less significant bytes of an image with 16 bits per channel.

    Returns:
        The image, and how it uses its range if that is worth a word.

    Example:
        >>> values = Image.fromarray(np.array([[0, 257, 65535]], np.uint16))
        >>> np.asarray(to_rgb(values)[0])[0].tolist()
        [[0, 0, 0], [1, 1, 1], [255, 255, 255]]
        >>> rgb, use = to_rgb(Image.fromarray(np.array([[0, 2048, 4095]], np.uint16)), "0,4095")
        >>> np.asarray(rgb)[0, :, 0].tolist(), use
        ([0, 128, 255], None)
    """
    if deep is not None:
        return _scale_colour(image, grey_range, deep)
    if image.mode == "La":  # Premultiplied grey, which Pillow converts to LA only.
        return _joined(image.size, ((box, image.crop(box).convert("LA").convert("RGB")) for box in _boxes(image))), None
    if not (image.mode in ("I", "F") or image.mode.startswith("I;16")):
        return image.convert("RGB"), None
    read = _reader_of(image)
    scale, use = _choose_scale(image, grey_range, (1.0 if image.mode == "F" else _greatest_integer(image)), read)
    strips = ((box, Image.fromarray(scale(read(box))).convert("RGB")) for box in _boxes(image))
    return _joined(image.size, strips), use


def _scale_colour(image: Image.Image, grey_range: str, deep: DeepColour) -> tuple[Image.Image, RangeUse | None]:
    """Scale an image with 16 bits per channel in place: the result takes no memory of its own."""
    is_ink = image.mode == "CMYK"
    scale, use = _choose_scale(
        image, "full" if is_ink else grey_range, 65535.0, lambda box: deep.values(image.crop(box), box)
    )
    for box in _boxes(image):
        values = scale(deep.values(image.crop(box), box))
        image.paste(Image.fromarray(values, "CMYK" if is_ink else None).convert(image.mode), box)
    deep.close()
    return image.convert("RGB"), None if is_ink else use


def _choose_scale(
    image: Image.Image, grey_range: str, greatest: float, read: Callable[[tuple[int, int, int, int]], Values]
) -> tuple[Callable[[Values], Values], RangeUse | None]:
    """Return what makes 8 bits of an image's values, and how the values use their range if that is worth a word."""
    ranges = [(float(values.min()), float(values.max())) for values in map(read, _boxes(image))]
    if not np.isfinite(ranges).all():
        raise ValueError("the image holds values that are not finite")
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    black, white, use = 0.0, greatest, None
    if grey_range == "minmax":
        black, white = low, high
    elif grey_range != "full":
        black, white = map(float, grey_range.split(","))
    elif low < black or high > white:
        use = RangeUse("beyond", low, high, black, white)
        black, white = low, high
    if use is None and grey_range != "minmax":
        used = min(high, white) - max(low, black)
        use = RangeUse("narrow", low, high, black, white) if used < NARROW_SHARE * (white - black) else None
    factor = 255 / (white - black or 1)  # A uniform image has no contrast: black.

    def scale(values: Values) -> Values:
        return np.rint((np.clip(values.astype(np.float64), black, white) - black) * factor).astype(np.uint8)

    return scale, use


def _greatest_integer(image: Image.Image) -> float:
    """Return the greatest value of the type that a file stores its integers in; 65535 for all but 12 bits."""
    return 4095.0 if getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE) == (12,) else 65535.0


def _reader_of(image: Image.Image) -> Callable[[tuple[int, int, int, int]], Values]:
    """Return what reads the values in a box of an image; Pillow takes unsigned integers of 32 bits for signed ones."""
    tags = getattr(image, "tag_v2", {})
    is_unsigned = tags.get(_BITS_PER_SAMPLE) == (32,) and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] == _UNSIGNED

    def read(box: tuple[int, int, int, int]) -> Values:
        values = np.asarray(image.crop(box))
        return values.view(np.uint32) if is_unsigned and image.mode == "I" else values

    return read


def _boxes(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Yield the boxes of strips that make up an image, from its top."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _joined(size: tuple[int, int], strips: Iterator[tuple[tuple[int, int, int, int], Image.Image]]) -> Image.Image:
    whole = Image.new("RGB", size)
    for box, strip in strips:
        whole.paste(strip, box)
    return whole
