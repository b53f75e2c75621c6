"""The file of one shard while it is written, as one process has it open.

Large pieces go to the disk past the page cache: touching fresh memory there costs more than computing an early layer.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from hookx.plan import KINDS, Plan, Shard, ValueCounts
from hookx.store.crc import crc32, crc32_combine
from hookx.store.directory import RunDirectory
from hookx.store.files import check_same, put_in_place, report_write_errors, vanished
from hookx.store.format import bytes_of, checksum, checksum_in_file, in_file_order, shard_header, tensor_places
from hookx.store.reading import LocalFile
from hookx.store.record import ShardRecord

PAGE_BYTES = mmap.PAGESIZE
_CHECKSUM_BYTES = 8 * 2**20  # by one thread at a time
_MAX_CHECKSUM, _MAX_COUNT = 2**32 - 1, 2**63


@dataclass(frozen=True)
class Tuning:
    """How shards are written. Changes speed and memory, and no byte of any shard."""

    spare_bytes: int = 128 * 2**20  # of activations that only wait for the disk, in each process
    direct: bool = True  # Large pieces bypass the page cache where the system can do that.
    min_direct_bytes: int = 2**20  # Smaller pieces are not worth a trip to the disk each.
    move_bytes: int = 16 * 2**20  # in memory at once while tensors are moved within their file


class ShardFile:
    """The file of one shard, aside until it is whole, as one process has it open."""

    def __init__(
        self, directory: RunDirectory, shard: Shard, expected: ShardRecord, tuning: Tuning, descriptor: int
    ) -> None:
        self.shard = shard
        self._plan, self._path, self._tuning = directory.plan, directory.file_of(shard), tuning
        self._aside, self._file = directory.aside_of(shard), descriptor
        self._tensor_places = tensor_places(self._plan.layers, len(shard))
        self._header_bytes = _max_header_bytes(self._plan, shard, expected)
        self._direct = open_direct(self._aside, descriptor) if tuning.direct else None
        self._written_bytes = 0  # How long the file is, at least.

    def check(self) -> None:
        """Raise `StoreError` if the file was removed, replaced or cut by something else."""
        with report_write_errors(self._path, resumable=True):
            check_same(self._file, self._aside)
            if os.fstat(self._file).st_size < self._written_bytes:
                raise vanished(self._aside, "was cut short")

    def write(self, rows: Mapping[str, Tensor], first_row: int, beside: Executor | None = None) -> dict[str, int]:
        """Write rows of every layer, beginning at `first_row`; return their checksums, computed `beside` if given."""
        later = {address: _checksum_beside(piece, beside) for address, piece in rows.items()} if beside else {}
        checksums = {}
        with report_write_errors(self._path, resumable=True):
            for address, piece in rows.items():
                if not beside:
                    checksums[address] = checksum(piece)
                if piece.numel():
                    place = self._header_bytes + self._tensor_places[address] + first_row * piece[0].nbytes
                    self._write(piece, place)
                    self._written_bytes = max(self._written_bytes, place + piece.nbytes)
        return checksums | {address: computed() for address, computed in later.items()}

    def publish(self, rows: int, record: ShardRecord, *, replace: bool) -> None:
        """Close the gaps that unreadable images left, write the header, flush, and give the file its name."""
        header = shard_header(self._plan.layers, rows, record.to_metadata(self._plan, self.shard), self._header_bytes)
        with report_write_errors(self._path, resumable=True):
            check_same(self._file, self._aside)
            end = self._close_gaps(rows, len(header))
            _write_all(self._file, memoryview(header), 0)
            if os.fstat(self._file).st_size < end:
                raise vanished(self._aside, "was cut short")
            os.ftruncate(self._file, end)
            self._check_holes(record, len(header), rows)
            put_in_place(self._file, self._aside, self._path, replace=replace)

    def _check_holes(self, record: ShardRecord, header_bytes: int, rows: int) -> None:
        """Raise `StoreError` if parts of a file that was written whole are missing, as when it was cut meanwhile."""
        size_bytes = os.fstat(self._file).st_size
        try:
            has_holes = os.lseek(self._file, 0, os.SEEK_HOLE) < size_bytes
        except OSError:  # Not every file system tells.
            return
        if not has_holes:
            return
        for address, place in tensor_places(self._plan.layers, rows).items():  # Some leave zeros out by themselves.
            layer_bytes = rows * next(one.bytes_per_image for one in self._plan.layers if one.address == address)
            start = header_bytes + place
            if checksum_in_file(LocalFile(self._file), start, start + layer_bytes) != record.checksums[address]:
                raise vanished(self._aside, "was cut short")

    def close(self) -> None:
        for descriptor in (self._file, self._direct):
            if descriptor is not None:
                close_quietly(descriptor)

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
            close_quietly(self._direct)  # type: ignore[arg-type]  # This file system opens files so, but writes none.
            self._direct = None
        if self._direct is None:
            _write_all(self._file, data[first:last], offset + first)
            if hasattr(os, "posix_fadvise"):  # Starts writing now what fsync would otherwise find all at once.
                with contextlib.suppress(OSError):
                    os.posix_fadvise(self._file, offset, len(data), os.POSIX_FADV_DONTNEED)
        _write_all(self._file, data[:first], offset)
        _write_all(self._file, data[last:], offset + last)

    def _close_gaps(self, rows: int, header_bytes: int) -> int:
        """Move the tensors to their places for that many rows and header bytes; return where the last one ends."""
        places, end = tensor_places(self._plan.layers, rows), self._header_bytes
        for layer in in_file_order(self._plan.layers):
            source, target = self._tensor_places[layer.address], places[layer.address]
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
                if not read:
                    raise vanished(self._aside, "was cut short")
                piece += read
            _write_all(self._file, memoryview(piece), target + start)


def _max_header_bytes(plan: Plan, shard: Shard, expected: ShardRecord) -> int:
    """Return how long a shard's header can get, in whole pages, if every image can be read."""
    addresses = [layer.address for layer in plan.layers]
    largest = replace(
        expected,
        rotations_ignored=len(shard),
        counts=ValueCounts({address: dict.fromkeys(KINDS, _MAX_COUNT) for address in addresses}),
        checksums=dict.fromkeys(addresses, _MAX_CHECKSUM),
    )
    # The record's own checksum can get longer, too.
    header_bytes = len(shard_header(plan.layers, len(shard), largest.to_metadata(plan, shard))) + 16
    return math.ceil(header_bytes / PAGE_BYTES) * PAGE_BYTES


def open_direct(path: Path, descriptor: int) -> int | None:
    """Open an open file again, for writing past the page cache; None where its file system cannot do that."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(direct), os.fstat(descriptor)):
            return direct
    close_quietly(direct)
    return None


def _checksum_beside(tensor: Tensor, threads: Executor) -> Callable[[], int]:
    """Begin to compute a tensor's checksum in threads; return what waits for it."""
    pieces = bytes_of(tensor) if tensor.numel() else memoryview(b"")
    starts = range(0, len(pieces), _CHECKSUM_BYTES)
    sums = [threads.submit(crc32, pieces[start : start + _CHECKSUM_BYTES]) for start in starts]

    def wait() -> int:
        total = 0
        for start, one in zip(starts, sums, strict=True):
            total = crc32_combine(total, one.result(), min(_CHECKSUM_BYTES, len(pieces) - start))
        return total

    return wait


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        if not written:  # It would be so forever.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        data, offset = data[written:], offset + written


def close_quietly(descriptor: int) -> None:
    """Close a file that was flushed, or whose errors the owner's flush reports."""
    with contextlib.suppress(OSError):
        os.close(descriptor)
