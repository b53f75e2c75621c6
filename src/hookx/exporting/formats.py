"""The formats but MATLAB's, a function each: rows in, a file out, never more than some blocks of it in memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

import numpy as np
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

from hookx.errors import UsageError
from hookx.exporting.rows import Rows
from hookx.keys import key_bytes
from hookx.layers.address import Address, Reduction

_HDF5_LAYOUT_BYTES = 2**16  # More than it takes.

# --- numpy ---------------------------------------------------------------------------------------------------------


def write_npy(path: Path, rows: Rows) -> None:
    """Write an array, and beside it, because the format holds no more than one, the keys."""
    with open(keys_file(path), "xb") as file:
        file.writelines(keys_csv(rows))
    with open(path, "xb") as file:
        _write_activations(file, rows)


def keys_file(path: Path) -> Path:
    return path.with_suffix(".keys.csv")


def keys_csv(rows: Rows) -> Iterator[bytes]:
    yield b"key\n"
    for span in rows.spans():
        for key in rows.keys[span]:
            yield _quoted(key) + b"\n"


def write_npz(path: Path, rows: Rows) -> None:
    """Write `activations` and `keys`, an array of numpy's own texts, which are of one length, and any they can be."""
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


# --- tables --------------------------------------------------------------------------------------------------------


def check_csv(rows: Rows) -> None:
    """Raise `UsageError` unless the activation of an image is a vector, or a single number."""
    check_table(rows)
    shape = rows.shape[1:]
    if sum(length != 1 for length in shape) > 1:
        layer = Address.parse(rows.origin["layer"])
        steps = ["choose another format, as in --to activations.npy"]
        if layer.reduction is None:
            steps.append(f"or extract {layer} reduced: {Reduction('mean', ()).spellings_for(shape)}")
        shown = ",".join(map(str, shape))
        raise UsageError(f".csv holds vectors, and {layer} is {shown} for every image", *steps)


def check_table(rows: Rows) -> None:
    """Raise `UsageError` for what no column holds."""
    if rows.dtype.kind == "c":
        raise UsageError(f"{rows.origin['layer']} is complex, and tables hold real numbers", "choose .npy or .h5")
    if not rows.values_per_row:
        raise UsageError(f"{rows.origin['layer']} has no values, and tables hold some", "choose .npy or .h5")


def write_csv(path: Path, rows: Rows) -> None:
    """Write a line an image; every number is the shortest that is read back as the same one."""
    with open(path, "xb") as file:
        file.write(",".join(["key", *map(str, range(rows.values_per_row))]).encode() + b"\n")
        for span, block in rows.blocks():
            for key, row in zip(rows.keys[span], block.reshape(len(block), -1), strict=True):
                file.write(_quoted(key) + b"," + ",".join(map(str, row)).encode() + b"\n")


def _quoted(key: str) -> bytes:
    if re.search('[",\r\n]', key):
        key = '"{}"'.format(key.replace('"', '""'))
    return key_bytes(key)


def write_parquet(path: Path, rows: Rows) -> None:
    """Write a row group a block, of the columns `key` and `activation`; where they come from is in the metadata.

    Nothing is compressed: activations hardly shrink. The keys' statistics let a reader skip row groups.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    number = pa.field("element", pa.from_numpy_dtype(rows.dtype), nullable=False)
    key, activation = pa.string() if rows.keys_are_text else pa.binary(), pa.list_(number, rows.values_per_row)
    columns = [pa.field("key", key, nullable=False), pa.field("activation", activation, nullable=False)]
    schema = pa.schema(columns, metadata={**rows.origin, "shape": str(list(rows.shape[1:]))})
    with ParquetWriter(path, schema, compression="none", use_dictionary=False, write_statistics=["key"]) as file:
        for span, block in rows.blocks():
            numbers = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), type=activation)
            file.write_batch(pa.record_batch([pa.array(rows.texts(span), key), numbers], schema=schema))


# --- hierarchies ---------------------------------------------------------------------------------------------------


def write_h5(path: Path, rows: Rows) -> None:
    """Write the datasets `activations` and `keys`, each in one piece; attributes say whence.

    HDF5 only lays the file out, and hookx fills it: where HDF5 has once failed to write, on a full disk, its next file
    can end the process (a segmentation fault in HDF5 2.0).
    """
    import h5py

    longest = max(1, max((len(key_bytes(key)) for key in rows.keys), default=1))
    text = h5py.string_dtype(length=longest)
    with open(path, "xb") as file:  # A disk that takes no such file, or not even its layout, says so here.
        file.write(bytes(_HDF5_LAYOUT_BYTES))
        file.truncate(_HDF5_LAYOUT_BYTES + rows.nbytes + len(rows) * longest)
    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    with h5py.File(path, "w") as hierarchy:
        hierarchy.attrs.update(rows.origin)
        activations = hierarchy.create_dataset("activations", rows.shape, rows.dtype, dcpl=layout).id.get_offset()
        keys = hierarchy.create_dataset("keys", len(rows), text, dcpl=layout).id.get_offset()
    with open(path, "r+b") as file:
        if rows.nbytes:
            file.seek(activations)
        for _, block in rows.blocks():
            file.write(block.data)
        for span in rows.spans():
            file.seek(keys + span.start * longest)
            file.write(np.array(list(map(key_bytes, rows.keys[span])), f"S{longest}").data)


def write_zarr(path: Path, rows: Rows) -> None:
    """Write a group of `activations`, in chunks of some 16 MiB of rows, and `keys`; attributes say whence."""
    import zarr
    from zarr.dtype import VariableLengthBytes

    chunks = tuple(max(1, length) for length in (rows.rows_per_block, *rows.shape[1:]))
    group = zarr.create_group(path, zarr_format=3, attributes=dict(rows.origin))
    activations = group.create_array("activations", shape=rows.shape, dtype=rows.dtype, chunks=chunks, compressors=None)
    kind = str if rows.keys_are_text else VariableLengthBytes()
    keys = group.create_array("keys", shape=(len(rows),), dtype=kind, chunks=chunks[:1])
    for span, block in rows.blocks():
        activations[span] = block
        keys[span] = np.array(rows.texts(span), dtype=object)
