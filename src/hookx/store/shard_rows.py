"""The rows of one address in one shard, read back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from hookx.errors import StoreError
from hookx.plan import LayerSpec
from hookx.store.files import open_file
from hookx.store.format import check_of_run, open_shard, reading
from hookx.store.location import Location
from hookx.store.objects.path import ObjectPath
from hookx.store.reading import LocalFile, Readable

Stretch: TypeAlias = tuple[int, int, int]  # adjacent rows: the first in its shard, their start and stop in the result


class ShardRows:
    """The rows of one address in one shard; without an open file, so it can be forked and pickled.

    Args:
        count: how many rows the shard's record promises; `StoreError` if it has others by now.
        fingerprint: that of the run, if the record has not been read.
    """

    def __init__(self, file: Location, layer: LayerSpec, count: int, fingerprint: str = "") -> None:
        self.file, self.layer, self.count = file, layer, count
        self.row_bytes = layer.bytes_per_image
        with open_shard(file) as (opened, header):
            if fingerprint:
                check_of_run(file, header, fingerprint)
            place = header.tensors.get(layer.address)
            if place is None or place.stop - place.start != count * self.row_bytes:
                raise self._changed()
            self.offset, self.file_bytes = place.start, opened.size_bytes

    def read(self, stretches: Sequence[Stretch], into: NDArray[np.uint8]) -> None:
        """Read rows into an array (rows of the result, bytes of a row)."""
        # A mapped file would need one line. But on a page fault the system also reads the surroundings, up to
        # megabytes for a row of a few kilobytes, and a disk error would crash the process.
        with self._open() as opened:
            at = [self.offset + first * self.row_bytes for first, _, _ in stretches]
            pieces = [into[start:stop].data.cast("B") for _, start, stop in stretches]
            try:
                opened.read(zip(at, pieces, strict=True))
            except EOFError:
                raise self._changed() from None

    def tensor(self, start: int, stop: int) -> Tensor:
        """Return a copy of some rows: (stop - start, *shape)."""
        rows = np.empty((stop - start, self.row_bytes), dtype=np.uint8)  # numpy lacks some of torch's types.
        if rows.size:
            self.read([(start, 0, stop - start)], rows)
        dtype: torch.dtype = getattr(torch, self.layer.dtype)
        return torch.from_numpy(rows.ravel()).view(dtype).view(stop - start, *self.layer.shape)

    def prefetch(self, stretches: Sequence[Stretch]) -> None:
        """Start reading rows into the system's file cache, and return without waiting."""
        if isinstance(self.file, ObjectPath) or not hasattr(os, "posix_fadvise"):  # macOS lacks it.
            return
        with self._open() as opened:
            if isinstance(opened, LocalFile):
                for first, start, stop in stretches:
                    at, length = self.offset + first * self.row_bytes, (stop - start) * self.row_bytes
                    os.posix_fadvise(opened.descriptor, at, length, os.POSIX_FADV_WILLNEED)

    def map(self) -> Tensor:
        """Map all rows into memory, privately: writing to the tensor never changes the file. Objects are read."""
        if isinstance(self.file, ObjectPath):
            return self.tensor(0, self.count)
        with reading(self.file):
            try:
                with safe_open(self.file, framework="pt") as opened:
                    rows: Tensor = opened.get_tensor(self.layer.address)
            except FileNotFoundError:  # What safetensors says whatever the reason.
                os.close(os.open(self.file, os.O_RDONLY))
                raise OSError("the system refused to open it once, and not again") from None
        if (rows.dtype, rows.shape) != (getattr(torch, self.layer.dtype), (self.count, *self.layer.shape)):
            raise self._changed()
        return rows

    @contextlib.contextmanager
    def _open(self) -> Iterator[Readable]:
        with reading(self.file), open_file(self.file, self.file_bytes) as opened:
            if opened.size_bytes != self.file_bytes:
                raise self._changed()
            yield opened

    def _changed(self) -> StoreError:
        return StoreError(f"{self.file} has changed since the run was opened", "open it again")
