"""The bands of an image beyond grey, RGB, CMYK and their alpha, which Pillow would drop or does not know."""

from __future__ import annotations

import contextlib
import logging
import struct
from collections.abc import Iterator, Mapping
from io import BufferedReader
from typing import Any, BinaryIO

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3, 9: 3, 10: 3, 32844: 1, 32845: 3}  # by photometric
_PHOTOMETRIC, _SAMPLES, _EXTRA_SAMPLES = 262, 277, 338  # tags of a TIFF
_ALPHA = (1, 2, 999)  # kinds of extra samples: premultiplied alpha, alpha, and what Corel Draw calls alpha
_JP2, _CODESTREAM = b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"
_COMPONENTS_AT = 40  # in a codestream
_COLOURS_OF_SPACES = {12: 4, 16: 3, 17: 1, 18: 3}  # by number in the box 'colr'
_MAX_HEADER_BYTES = 2**20
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


def undeclared_bands(content: BufferedReader) -> str:
    """Return why a JPEG 2000 at its beginning has bands that are not colour or alpha; '' for all other files.

    Pillow takes a fourth component for alpha. Only the box 'cdef' of a file can say so; a bare codestream has none.
    """
    beginning = content.peek(len(_JP2))
    if not beginning.startswith((_JP2, _CODESTREAM)):
        return ""
    with contextlib.suppress(Exception):  # Corrupt boxes can hold anything; the decoder finds that out.
        if beginning.startswith(_CODESTREAM):
            (bands,) = struct.unpack(">H", content.read(_COMPONENTS_AT + 2)[_COMPONENTS_AT:])
            return _describe_bands(bands, 1 if bands < 3 else 3, 0)
        header = next(box for name, box in _boxes(content.read(_MAX_HEADER_BYTES)) if name == b"jp2h")
        boxes = dict(reversed(list(_boxes(header))))  # The first of several descriptions of the colours counts.
        if b"pclr" in boxes:  # A palette
            return ""
        (bands,) = struct.unpack(">H", boxes[b"ihdr"][8:10])
        method, _, _, space = struct.unpack(">BBBI", boxes[b"colr"][:7])
        colours = _COLOURS_OF_SPACES.get(space) if method == 1 else None
        kinds = [kind for _, kind, _ in struct.iter_unpack(">HHH", boxes.get(b"cdef", b"")[2:])]
        alphas = sum(kind in (1, 2) for kind in kinds)
        return _describe_bands(bands, colours or (1 if bands - alphas < 3 else 3), alphas)
    return ""


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the names and contents of the boxes that data begin with."""
    start = 0
    while start + 8 <= len(data):
        length, name = struct.unpack(">I4s", data[start : start + 8])
        if length < 8:  # of 64 bits, or up to the end: the image itself
            return
        yield name, data[start + 8 : start + length]
        start += length


def _describe(tags: Mapping[int, Any]) -> str:
    colours, kinds = _COLOURS.get(tags.get(_PHOTOMETRIC, 0), 3), tags.get(_EXTRA_SAMPLES, ())
    return _describe_bands(tags.get(_SAMPLES, 1), colours, int(len(kinds) == 1 and kinds[0] in _ALPHA))


def _describe_bands(bands: int, colours: int, alphas: int) -> str:
    extra = bands - colours
    if extra <= 0 or extra == alphas == 1:
        return ""
    what = {1: "grey", 3: "RGB", 4: "CMYK"}[colours]
    return (
        f"{bands} bands, and {extra} of them {'are' if extra != 1 else 'is'} neither {what} nor alpha: read them with "
        "a function of your own, --loader"
    )
