"""The file of one shard while it is being written."""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hookx.plan import KINDS, Plan, Shard, ValueCounts
from hookx.store.directory import RunDirectory
from hookx.store.files import aside_of, put_in_place, report_write_errors
from hookx.store.format import bytes_of, checksum, in_file_order, shard_header, tensor_places
from hookx.store.record import ShardRecord

PAGE_BYTES = mmap.PAGESIZE
_MAX_CHECKSUM, _MAX_COUNT = 2**32 - 1, 2**63


@dataclass(frozen=True)
class Tuning:
    """How a shard is written. Changes speed and memory, and no byte of any shard."""

    spare_bytes: int = 128 * 2**20  # of activations that only wait for the disk, in each process
    direct: bool = True  # Large pieces bypass the page cache where the system can do that.
    min_direct_bytes: int = 2**20  # Smaller pieces are not worth a trip to the disk each.
    move_bytes: int = 16 * 2**20  # in memory at once while tensors are moved within their file


@dataclass(frozen=True)
class Written:
    """A batch that one process has written, as the owner of the run hears of it."""

    first_row: int  # in the shard
    rows: int
    checksums: Mapping[str, int]  # address -> CRC-32 of the batch's bytes
    seconds: float


class ShardFile:
    """The file of one shard, aside until it is whole, as one process has it open."""

    def __init__(self, directory: RunDirectory, shard: Shard, expected: ShardRecord, tuning: Tuning) -> None:
        self.plan, self.shard = directory.plan, shard
        self.path = directory.file_of(shard)
        self.tensor_places = tensor_places(self.plan.layers, len(shard))
        self._tuning = tuning
        self._header_bytes = _max_header_bytes(self.plan, shard, expected)
        aside = aside_of(self.path)
        with report_write_errors(self.path, resumable=True):
            self._file = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._direct = open_direct(aside) if tuning.direct else None

    def write(self, rows: Mapping[str, Tensor], first_row: int) -> dict[str, int]:
        """Write rows of every layer, beginning at `first_row`; return their checksums."""
        checksums = {}
        with report_write_errors(self.path, resumable=True):
            for address, piece in rows.items():
                checksums[address] = checksum(piece)
                if piece.numel():
                    self._write(piece, self._header_bytes + self.tensor_places[address] + first_row * piece[0].nbytes)
        return checksums

    def publish(self, rows: int, record: ShardRecord) -> None:
        """Close the gaps that unreadable images left, write the header, flush, and give the file its name."""
        header = shard_header(self.plan.layers, rows, record.to_metadata(self.plan, self.shard), self._header_bytes)
        with report_write_errors(self.path, resumable=True):
            end = self._close_gaps(rows, len(header))
            _write_all(self._file, memoryview(header), 0)
            os.ftruncate(self._file, end)
            put_in_place(self._file, self.path)

    def close(self) -> None:
        for descriptor in (self._file, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def _write(self, piece: Tensor, offset: int) -> None:
        """Write a tensor; its whole pages bypass the page cache if they are aligned in memory as in the file."""
        data = bytes_of(piece)
        first = -offset % PAGE_BYTES
        last = first + (len(data) - first) // PAGE_BYTES * PAGE_BYTES
        if last - first < self._tuning.min_direct_bytes or (piece.data_ptr() - offset) % PAGE_BYTES:
            _write_all(self._file, data, offset)
            return
        try:
            if self._direct is not None:
                _write_all(self._direct, data[first:last], offset + first)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EFAULT):
                raise
            os.close(self._direct)  # type: ignore[arg-type]  # This file system opens files so, but writes none.
            self._direct = None
        if self._direct is None:
            _write_all(self._file, data[first:last], offset + first)
            if hasattr(os, "posix_fadvise"):  # Starts writing now what fsync would otherwise find all at once.
                os.posix_fadvise(self._file, offset, len(data), os.POSIX_FADV_DONTNEED)
        _write_all(self._file, data[:first], offset)
        _write_all(self._file, data[last:], offset + last)

    def _close_gaps(self, rows: int, header_bytes: int) -> int:
        """Move the tensors to their places for that many rows and header bytes; return where the last one ends."""
        places, end = tensor_places(self.plan.layers, rows), self._header_bytes
        for layer in in_file_order(self.plan.layers):
            source, target = self.tensor_places[layer.address], places[layer.address]
            length = rows * layer.bytes_per_image
            self._move(self._header_bytes + source, self._header_bytes + target, length)
            end = self._header_bytes + target + length
        # The reasons why images could not be read may be longer than the keys that they replace.
        self._move(self._header_bytes, header_bytes, end - self._header_bytes)
        return end - self._header_bytes + header_bytes

    def _move(self, source: int, target: int, length: int) -> None:
        """Move bytes within the file; the two ranges may overlap."""
        if source == target:
            return
        starts = range(0, length, self._tuning.move_bytes)
        for start in starts if target < source else reversed(starts):
            size = min(self._tuning.move_bytes, length - start)
            piece = b""
            while len(piece) < size:
                read = os.pread(self._file, size - len(piece), source + start + len(piece))
                assert read, "the file is shorter than what was written to it"
                piece += read
            _write_all(self._file, memoryview(piece), target + start)


def _max_header_bytes(plan: Plan, shard: Shard, expected: ShardRecord) -> int:
    """Return how long a shard's header can get, in whole pages, if every image can be read."""
    addresses = [layer.address for layer in plan.layers]
    largest = ShardRecord(
        keys=expected.keys,
        sizes_bytes=expected.sizes_bytes,
        made=expected.made,
        rotations_ignored=len(shard),
        counts=ValueCounts({address: dict.fromkeys(KINDS, _MAX_COUNT) for address in addresses}),
        checksums=dict.fromkeys(addresses, _MAX_CHECKSUM),
    )
    # The record's own checksum can get longer, too.
    header_bytes = len(shard_header(plan.layers, len(shard), largest.to_metadata(plan, shard))) + 16
    return math.ceil(header_bytes / PAGE_BYTES) * PAGE_BYTES


def open_direct(path: Path) -> int | None:
    """Open a file for writing past the page cache; None where its file system or the system cannot do that."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
