"""Zarr 3 groups, which are folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hookx.exporting.rows import Rows


def write_zarr(path: Path, rows: Rows) -> None:
    """Write the arrays `activations`, in chunks of one block, and `keys`; attributes hold the origin."""
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
