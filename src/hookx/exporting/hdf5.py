"""HDF5 files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hookx.exporting.rows import Rows
from hookx.keys import key_bytes

_MAX_LAYOUT_BYTES = 2**16  # More than the layout of two datasets takes.


def write_h5(path: Path, rows: Rows) -> None:
    """Write the datasets `activations` and `keys`, each in one piece; attributes hold the origin.

    HDF5 only lays out the file; hookx writes the data. After a failed write, as on a full disk, HDF5 2.0 can crash
    the process with a segmentation fault when it writes its next file.
    """
    import h5py

    longest = max(1, max((len(key_bytes(key)) for key in rows.keys), default=1))
    text = h5py.string_dtype(length=longest)
    with open(path, "xb") as file:  # A disk too small for the layout or the data fails here, outside HDF5.
        file.write(bytes(_MAX_LAYOUT_BYTES))
        file.truncate(_MAX_LAYOUT_BYTES + rows.nbytes + len(rows) * longest)
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
