"""MATLAB files, level 5, by scipy."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hookx.errors import UsageError
from hookx.exporting.rows import Rows
from hookx.keys import key_bytes

MAX_VARIABLE_BYTES = 2**31 - 1  # MATLAB's own limit at this level.
_CELL_BYTES = 64  # What a cell takes beside its text, padding included.


def check_mat(rows: Rows) -> None:
    """Raise `UsageError` for more than the format can hold."""
    if rows.nbytes > MAX_VARIABLE_BYTES:
        raise UsageError(
            f".mat holds at most 2 GiB, and {rows.origin['layer']} of {len(rows):,} images takes {rows.nbytes:,} bytes",
            "choose .h5, which MATLAB reads with h5read, or a layer that was reduced when it was extracted",
        )
    if sum(len(key_bytes(key)) + _CELL_BYTES for key in rows.keys) > MAX_VARIABLE_BYTES:
        raise UsageError(f".mat holds at most 2 GiB, and the keys of {len(rows):,} images take more", "choose .h5")


def write_mat(path: Path, rows: Rows) -> None:
    """Write `activations` in their shape here, `keys` as a cell array, and a text for each fact of the origin.

    scipy writes a variable from memory and copies it once, so this takes twice the size of the activations.
    """
    from scipy.io import savemat

    activations = np.empty(rows.shape, rows.dtype, order="F")
    for span, block in rows.blocks():
        activations[span] = block
    if activations.ndim == 1:
        activations = activations[:, None]  # MATLAB has no fewer than two dimensions.
    keys = np.empty((len(rows), 1), dtype=object)
    for span in rows.spans():
        for row, key in enumerate(rows.texts(span), span.start):
            keys[row, 0] = np.frombuffer(key, np.uint8)[None] if isinstance(key, bytes) else key
    with open(path, "xb") as file:
        savemat(file, {"activations": activations, "keys": keys, **rows.origin})
