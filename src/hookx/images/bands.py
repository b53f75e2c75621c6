"""The bands of an image beyond grey, RGB, CMYK and their alpha, which Pillow would drop or does not know."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, BinaryIO

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3, 9: 3, 10: 3, 32844: 1, 32845: 3}  # by photometric
_PHOTOMETRIC, _SAMPLES, _EXTRA_SAMPLES = 262, 277, 338  # tags of a TIFF
_ALPHA = (1, 2, 999)  # kinds of extra samples: premultiplied alpha, alpha, and what Corel Draw calls alpha
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0")  # Pillow reads no BigTIFF whose bytes are in the other order.
# It logs the number of bands as an error, and without a handler that would go to standard error for every image.
logging.getLogger("PIL.TiffImagePlugin").addHandler(logging.NullHandler())


def unread_bands(image: Image.Image) -> str:
    """Return why an image that has been opened has bands that are not colour or alpha; '' if all are."""
    return _describe(getattr(image, "tag_v2", {})) if image.format == "TIFF" else ""


def unknown_bands(content: BinaryIO) -> str:
    """Return why a file that Pillow does not know has unusual bands; '' if it has none, or is not a TIFF."""
    with contextlib.suppress(Exception):  # Corrupt headers can raise anything; the file is not an image, then.
        content.seek(0)
        header = content.read(8)
        if header[:4] not in _MAGIC:
            return ""
        if header[2:4] == b"+\0":
            header += content.read(8)
        directory = ImageFileDirectory_v2(header)
        content.seek(directory.next)
        directory.load(content)
        return _describe(directory)
    return ""


def _describe(tags: Mapping[int, Any]) -> str:
    bands = tags.get(_SAMPLES, 1)
    colours = _COLOURS.get(tags.get(_PHOTOMETRIC, 0), 3)
    kinds = tags.get(_EXTRA_SAMPLES, ())
    extra = bands - colours
    if extra <= 0 or (extra == 1 and len(kinds) == 1 and kinds[0] in _ALPHA):
        return ""
    what = {1: "grey", 3: "RGB", 4: "CMYK"}[colours]
    return (
        f"{bands} bands, and {extra} of them {'are' if extra != 1 else 'is'} neither {what} nor alpha: read them with "
        "a function of your own, --loader"
    )
