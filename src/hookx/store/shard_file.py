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

from hookx.plan import Plan, Shard
from hookx.store.directory import RunDirectory
from hookx.store.files import aside_of, put_in_place, report_write_errors
from hookx.store.format import (
    bytes_of,
    checksum,
    in_file_order,
    shard_header,
    tensor_places,
)
from hookx.store.record import ShardRecord

PAGE_BYTES = mmap.PAGESIZE
_DIRECT_FROM_BYTES = 2**20  # Smaller pieces are not worth a trip to the disk each.
_MOVED_AT_ONCE_BYTES = 16 * 2**20
_LARGEST_CHECKSUM, _LARGEST_COUNT = 2**32 - 1, 2**63


def _room_for_header(plan: Plan, shard: Shard, expected: ShardRecord) -> int:
    """Return how long a shard's header can get, in whole pages, if every image can be read."""
    addresses = [layer.address for layer in plan.layers]
    kinds = dict.fromkeys(("non_finite", "all_zero", "overflowed", "flushed"), _LARGEST_COUNT)
    largest = ShardRecord(
        keys=expected.keys,
        sizes_bytes=expected.sizes_bytes,
        made=expected.made,
        rotations_ignored=len(shard),
        counts=dict.fromkeys(addresses, kinds),
        checksums=dict.fromkeys(addresses, _LARGEST_CHECKSUM),
    )
    # The record's own checksum can get longer, too.
    header_bytes = len(shard_header(plan.layers, len(shard), largest.to_metadata(plan, shard))) + 16
    return math.ceil(header_bytes / PAGE_BYTES) * PAGE_BYTES


@dataclass(frozen=True)
class Written:
    """What one process tells the owner of a batch that it has written."""

    first_row: int  # in the shard
    rows: int
    checksums: Mapping[str, int]  # address -> CRC-32 of the batch's bytes
    seconds: float


class ShardFile:
    """The file of one shard, aside until it is whole, as one process has it open."""

    def __init__(self, directory: RunDirectory, shard: Shard, expected: ShardRecord) -> None:
        self.plan, self.shard = directory.plan, shard
        self.path = directory.file_of(shard)
        self.tensor_places = tensor_places(self.plan.layers, len(shard))
        self._header_bytes = _room_for_header(self.plan, shard, expected)
        aside = aside_of(self.path)
        with report_write_errors(self.path, resumable=True):
            self._file = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._direct = _opened_direct(aside)

    def write(self, rows: Mapping[str, Tensor], first_row: int) -> dict[str, int]:
        """Write rows of every layer, from the given one on; return their checksums."""
        checksums = {}
        with report_write_errors(self.path, resumable=True):
            for address, piece in rows.items():
                checksums[address] = checksum(piece)
                if piece.numel():
                    self._write(piece, self._header_bytes + self.tensor_places[address] + first_row * piece[0].nbytes)
        return checksums

    def publish(self, rows: int, record: ShardRecord) -> None:
        """Close up what unreadable images left empty, write the header, flush all to the disk, and show the file."""
        header = shard_header(self.plan.layers, rows, record.to_metadata(self.plan, self.shard), self._header_bytes)
        with report_write_errors(self.path, resumable=True):
            end = self._close_up(rows, len(header))
            _write_all(self._file, memoryview(header), 0)
            os.ftruncate(self._file, end)
            put_in_place(self._file, self.path)

    def close(self) -> None:
        """Let go of the file."""
        for descriptor in (self._file, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def _write(self, piece: Tensor, offset: int) -> None:
        """Write a tensor at an offset: its whole pages past the page cache, if they lie in memory as in the file."""
        data = bytes_of(piece)
        first = -offset % PAGE_BYTES
        last = first + (len(data) - first) // PAGE_BYTES * PAGE_BYTES
        if last - first < _DIRECT_FROM_BYTES or (piece.data_ptr() - offset) % PAGE_BYTES:
            _write_all(self._file, data, offset)
            return
        try:
            if self._direct is not None:
                _write_all(self._direct, data[first:last], offset + first)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EFAULT):
                raise
            os.close(self._direct)  # type: ignore[arg-type]  # This file system opens files so, and writes none.
            self._direct = None
        if self._direct is None:
            _write_all(self._file, data[first:last], offset + first)
            if hasattr(os, "posix_fadvise"):  # Begins to write now what fsync would otherwise find all at once.
                os.posix_fadvise(self._file, offset, len(data), os.POSIX_FADV_DONTNEED)
        _write_all(self._file, data[:first], offset)
        _write_all(self._file, data[last:], offset + last)

    def _close_up(self, rows: int, header_bytes: int) -> int:
        """Move the tensors to where they belong with so many rows, behind such a header; return where the last ends."""
        places, end = tensor_places(self.plan.layers, rows), self._header_bytes
        for layer in in_file_order(self.plan.layers):
            source, target = self.tensor_places[layer.address], places[layer.address]
            length = rows * layer.bytes_per_image
            _move(self._file, self._header_bytes + source, self._header_bytes + target, length)
            end = self._header_bytes + target + length
        # Reasons why images could not be read may be longer than their keys.
        _move(self._file, self._header_bytes, header_bytes, end - self._header_bytes)
        return end - self._header_bytes + header_bytes


def _opened_direct(path: Path) -> int | None:
    """Open a file past the page cache, if its file system and the system know that."""
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


def _move(descriptor: int, source: int, target: int, length: int) -> None:
    """Move bytes within a file; the two ranges may overlap."""
    if source == target:
        return
    starts = range(0, length, _MOVED_AT_ONCE_BYTES)
    for start in starts if target < source else reversed(starts):
        size = min(_MOVED_AT_ONCE_BYTES, length - start)
        piece = b""
        while len(piece) < size:
            read = os.pread(descriptor, size - len(piece), source + start + len(piece))
            assert read, "a file that is being written is shorter than what was written"
            piece += read
        _write_all(descriptor, memoryview(piece), target + start)
