"""numpy's own formats: `.npy`, which holds one array and leaves the keys to a file beside it, and `.npz`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

import numpy as np
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

from hookx.exporting.rows import Rows
from hookx.exporting.tables import quote_key


def write_npy(path: Path, rows: Rows) -> None:
    """Write the activations as one array, and the keys to a CSV file beside it."""
    with open(keys_file(path), "xb") as file:
        file.writelines(keys_csv(rows))
    with open(path, "xb") as file:
        _write_activations(file, rows)


def keys_file(path: Path) -> Path:
    """Return where the keys of a `.npy` file are."""
    return path.with_suffix(".keys.csv")


def keys_csv(rows: Rows) -> Iterator[bytes]:
    """Yield the lines of the file of keys."""
    yield b"key\n"
    for span in rows.spans():
        for key in rows.keys[span]:
            yield quote_key(key) + b"\n"


def write_npz(path: Path, rows: Rows) -> None:
    """Write the arrays `activations` and `keys`; the latter as fixed-length text, which loads without pickle."""
    longest = np.dtype(f"<U{max(map(len, rows.keys), default=1)}")
    with ZipFile(path, "x") as archive:
        with archive.open("activations.npy", "w", force_zip64=True) as file:
            _write_activations(file, rows)
        with archive.open("keys.npy", "w", force_zip64=True) as file:
            _write_header(file, (len(rows),), longest)
            for span in rows.spans():
                file.write(np.array(list(rows.keys[span]), longest).data)


def _write_activations(file: IO[bytes], rows: Rows) -> None:
    _write_header(file, rows.shape, rows.dtype)
    for _, block in rows.blocks():
        file.write(block.data)


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    header = {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    write_array_header_1_0(file, header)
