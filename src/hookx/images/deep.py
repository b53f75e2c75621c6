"""Both bytes of the values in an image with 16 bits per channel, where Pillow keeps 8 bits.

Pillow has no mode for 16 bits per channel: it unpacks the more significant byte of each value. The less significant
bytes come from decoding the file once more, as if its bytes were in the other order.
"""

from __future__ import annotations

import re
import sys
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile

_HIGH, _LOW = ("L", "B") if sys.byteorder == "little" else ("B", "L")
_OTHER_BYTE = {"B": "L", "L": "B", "N": _LOW}  # N: the order of this machine, in which libtiff decodes
_BITS_PER_SAMPLE = 258  # a tag of a TIFF


class DeepColour:
    """The less significant bytes of an image with 16 bits per channel; made before the image is loaded."""

    def __init__(self, rawmodes: list[str] | None, formats: list[str]) -> None:
        self._rawmodes, self._formats = rawmodes, formats  # of the less significant bytes; None for grey with alpha
        self._low: Image.Image | None = None

    def load(self, content: BinaryIO) -> None:
        """Decode the less significant bytes."""
        if self._rawmodes is None:
            return
        content.seek(0)
        low = Image.open(content, "r", self._formats)
        _set_rawmodes(low, self._rawmodes)
        low.load()
        self._low = low

    def values(self, high: Image.Image, box: tuple[int, int, int, int]) -> np.ndarray[Any, np.dtype[np.uint16]]:
        """Return the values in a box, (height, width[, channels]); `high` has their more significant bytes."""
        above = np.asarray(high).astype(np.uint16) << 8
        if self._low is None:  # Grey with alpha, the two bytes of which are the first two channels.
            return above[..., 0] | np.asarray(high)[..., 1]
        channels = 4 if high.mode == "CMYK" else 3
        return (above | np.asarray(self._low.crop(box)))[..., :channels]

    def close(self) -> None:
        """Give the memory back."""
        self._low = None


def find_deep_colour(image: ImageFile, formats: list[str]) -> DeepColour | None:
    """Return what reads both bytes of an image that has been opened and has 16 bits per channel; None for others.

    PNG and TIFF are read so. Pillow itself scales PPM to 8 bits; in JPEG 2000 and SGI it keeps the upper 8 bits, and so
    does libtiff of planes that are compressed, whose two bytes are the same here.
    """
    if image.format not in ("PNG", "TIFF") or not image.tile:
        return None
    arguments: list[Any] = [tile[3] for tile in image.tile]
    rawmodes = [one if isinstance(one, str) else one[0] for one in arguments]
    if rawmodes == ["LA;16B"]:
        _set_rawmodes(image, ["RGBA"])
        return DeepColour(None, formats)
    if image.format == "TIFF" and set(rawmodes) <= set("RGBACMYK") and _is_of_16_bits(image):
        # Planes that are not compressed; Pillow would take the bytes of their values for values.
        order = "L" if getattr(image, "tag_v2").prefix == b"II" else "B"  # noqa: B009 - only a TIFF has it
        rawmodes = [f"{rawmode};16{order}" for rawmode in rawmodes]
        _set_rawmodes(image, rawmodes)
    if not all(re.fullmatch(r"(RGB[AX]?|CMYK|[RGBACMYK]);16[BLN]", rawmode) for rawmode in rawmodes):
        return None
    return DeepColour([rawmode[:-1] + _OTHER_BYTE[rawmode[-1]] for rawmode in rawmodes], formats)


def _is_of_16_bits(image: ImageFile) -> bool:
    return set(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, ())) == {16}


def _set_rawmodes(image: ImageFile, rawmodes: list[str]) -> None:
    tiles: list[Any] = list(image.tile)
    for number, (tile, rawmode) in enumerate(zip(tiles, rawmodes, strict=True)):
        arguments = rawmode if isinstance(tile[3], str) else (rawmode, *tile[3][1:])
        tiles[number] = tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments)
    image.tile = tiles
