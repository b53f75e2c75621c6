"""MATLAB's own format, level 5, which is what every reader knows: an array in column-major order, in bounded memory.

Source: "MAT-File Format", The MathWorks, https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf. scipy can
write it too, but only what it has in memory as a whole; a test holds these files against scipy's, byte for byte.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from hookx.errors import UsageError
from hookx.exporting.rows import Rows

_VARIABLE_BYTES_AT_MOST = 2**31 - 1  # MATLAB's own limit at this level.
_PASS_BYTES = 2**28

# The numbers that the format gives to the types of elements and to the classes of arrays.
_INT8, _UINT8, _INT32, _UINT32, _MATRIX, _UTF8 = 1, 2, 5, 6, 14, 16
_CELL_CLASS, _CHAR_CLASS, _UINT8_CLASS = 1, 4, 9
_NUMBERS = {  # numpy's name of a type -> (element, class)
    "float64": (9, 6),
    "float32": (7, 7),
    "int8": (1, 8),
    "uint8": (2, 9),
    "int16": (3, 10),
    "int32": (5, 12),
    "int64": (12, 14),
}
_LOGICAL, _COMPLEX = 1 << 9, 1 << 11


def check_mat(rows: Rows) -> None:
    """Raise `UsageError` for activations that the format cannot hold."""
    if rows.nbytes > _VARIABLE_BYTES_AT_MOST:
        raise UsageError(
            f".mat holds 2 GiB at most, and {rows.origin['layer']} of {len(rows):,} images takes {rows.nbytes:,} bytes",
            "choose .h5, which MATLAB reads with h5read, or a layer that was reduced when it was extracted",
        )


def write_mat(path: Path, rows: Rows) -> None:
    """Write `activations`, in the shape that they have here, `keys` (a cell array), and where they come from."""
    with open(path, "xb") as file:
        file.write(b"MATLAB 5.0 MAT-file, written by hookx".ljust(124) + struct.pack("<HH", 0x0100, 0x4D49))
        with _sized(file, _MATRIX):
            _write_activations(file, rows)
        cell: Callable[[Any], bytes] = _text if rows.keys_are_text else _bytes
        with _sized(file, _MATRIX):
            file.write(_head("keys", _CELL_CLASS, (len(rows), 1)))
            for span in rows.spans():
                file.writelines(map(cell, rows.texts(span)))
        for name, text in rows.origin.items():
            file.write(_text(text, name))


def _write_activations(file: BinaryIO, rows: Rows) -> None:
    parts: list[Callable[[NDArray[Any]], NDArray[Any]]] = [lambda values: values]
    part_dtype, flags = rows.dtype, 0
    if rows.dtype.kind == "b":
        part_dtype, flags = np.dtype(np.uint8), _LOGICAL
    elif rows.dtype.kind == "c":
        part_dtype, flags = np.dtype(np.float32), _COMPLEX
        parts = [np.real, np.imag]
    element, array_class = _NUMBERS[part_dtype.name]
    file.write(_head("activations", array_class | flags, rows.shape if len(rows.shape) > 1 else (len(rows), 1)))
    for part in parts:
        columns = _columns(rows, part_dtype, part, is_last_part=part is parts[-1])
        if math.prod(rows.shape) * part_dtype.itemsize <= 4:
            file.write(_element(element, b"".join(map(bytes, columns))))
        else:
            with _sized(file, element):
                file.writelines(columns)


def _columns(
    rows: Rows, dtype: np.dtype[Any], part: Callable[[NDArray[Any]], NDArray[Any]], *, is_last_part: bool
) -> Iterator[memoryview]:
    """Yield the values in column-major order, which puts those of all images that stand in one place side by side.

    So the run is read several times, and each time some of the places are taken out of every image.
    """
    places = np.arange(rows.values_per_row).reshape(rows.shape[1:]).ravel(order="F")
    places_per_pass = max(1, _PASS_BYTES // max(1, len(rows) * dtype.itemsize))
    buffer = np.empty((min(places_per_pass, len(places)), len(rows)), dtype)
    for start in range(0, max(1, len(places)), places_per_pass):
        some = places[start : start + places_per_pass]
        is_last_pass = is_last_part and start + places_per_pass >= len(places)
        columns = buffer[: len(some)]
        for span, block in rows.blocks(is_last_pass=is_last_pass):
            columns[:, span] = part(block.reshape(len(block), -1)[:, some]).T
        yield columns.data


@contextlib.contextmanager
def _sized(file: BinaryIO, kind: int) -> Iterator[None]:
    """Write an element whose length is known once its contents, the body of the `with` block, are written."""
    file.write(struct.pack("<II", kind, 0))
    start = file.tell()
    yield
    size_bytes = file.tell() - start
    if size_bytes > _VARIABLE_BYTES_AT_MOST:
        raise UsageError("the keys of the run take more than the 2 GiB that .mat can hold", "choose .h5")
    file.write(bytes(-size_bytes % 8))
    file.seek(start - 4)
    file.write(struct.pack("<I", size_bytes))
    file.seek(0, 2)


def _head(name: str, class_and_flags: int, dimensions: tuple[int, ...]) -> bytes:
    return (
        _element(_UINT32, struct.pack("<II", class_and_flags, 0))
        + _element(_INT32, struct.pack(f"<{len(dimensions)}i", *dimensions))
        + _element(_INT8, name.encode())
    )


def _element(kind: int, contents: bytes) -> bytes:
    if len(contents) <= 4:
        return struct.pack("<I4s", len(contents) << 16 | kind, contents)
    return struct.pack("<II", kind, len(contents)) + contents + bytes(-len(contents) % 8)


def _text(text: str, name: str = "") -> bytes:
    dimensions = (1, len(text)) if text else (0, 0)
    return _element(_MATRIX, _head(name, _CHAR_CLASS, dimensions) + _element(_UTF8, text.encode()))


def _bytes(contents: bytes) -> bytes:
    return _element(_MATRIX, _head("", _UINT8_CLASS, (1, len(contents))) + _element(_UINT8, contents))
