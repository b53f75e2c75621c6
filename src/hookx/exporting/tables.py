"""Tables with one image per row: CSV and Parquet."""

from __future__ import annotations

import re
from pathlib import Path

from hookx.errors import UsageError
from hookx.exporting.rows import Rows
from hookx.keys import key_bytes
from hookx.layers.address import Address, Reduction


def check_csv(rows: Rows) -> None:
    """Raise `UsageError` unless each image has a vector or a single number."""
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
    """Raise `UsageError` for values that a column cannot hold."""
    if rows.dtype.kind == "c":
        raise UsageError(f"{rows.origin['layer']} is complex, and tables hold real numbers", "choose .npy or .h5")
    if not rows.values_per_row:
        raise UsageError(f"{rows.origin['layer']} has no values to put in a table", "choose .npy or .h5")


def write_csv(path: Path, rows: Rows) -> None:
    """Write one line per image; each number is the shortest text that reads back as the same number."""
    with open(path, "xb") as file:
        file.write(",".join(["key", *map(str, range(rows.values_per_row))]).encode() + b"\n")
        for span, block in rows.blocks():
            for key, row in zip(rows.keys[span], block.reshape(len(block), -1), strict=True):
                file.write(quote_key(key) + b"," + ",".join(map(str, row)).encode() + b"\n")


def quote_key(key: str) -> bytes:
    """Return a key as a field of a CSV line, byte for byte."""
    if re.search('[",\r\n]', key):
        key = '"{}"'.format(key.replace('"', '""'))
    return key_bytes(key)


def write_parquet(path: Path, rows: Rows) -> None:
    """Write the columns `key` and `activation`, one row group per block; the metadata holds the shape and the origin.

    Nothing is compressed, because activations hardly shrink. The statistics of the keys let a reader skip row groups.
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
