"""Batches that outlive the next one."""

from __future__ import annotations

from collections.abc import Iterable

from hookx.run.lane import Batch


def kept(batches: Iterable[Batch]) -> list[Batch]:
    """Return all batches, each with a copy of its pixels: their memory is used again for later ones."""
    copies = []
    for batch in batches:
        if batch.pixels_NCHW is not None:
            batch.pixels_NCHW = batch.pixels_NCHW.clone()
        copies.append(batch)
    return copies
