"""Activations of batches -> shards on the disk, batch by batch. The only file that writes shards.

A batch is computed into a slot: memory that workers share with the process which writes. It goes to its place in the
shard's file at once, and the slot to a later batch; nothing ever holds a whole shard. Memory that was never touched is
what costs: on a virtual machine more than computing an early layer, in a process as in the system's page cache. So
slots are few, and large pieces go from them to the disk past the page cache.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import itertools
import json
import math
import mmap
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hookx.errors import StoreError
from hookx.plan import DTYPES, LayerSpec, Plan, Shard
from hookx.store import (
    HEADER_BYTES_AT_MOST,
    RunDirectory,
    ShardRecord,
    aside_of,
    bytes_of,
    checksum,
    put_in_place,
    told_as_store_error,
)

_PAGE_BYTES = mmap.PAGESIZE
_DIRECT_FROM_BYTES = 2**20  # Smaller pieces are not worth a trip to the disk each.
_SPARE_BYTES = 512 * 2**20  # of slots that only wait to be written
_MOVED_AT_ONCE_BYTES = 16 * 2**20
_POLL_SECONDS = 0.001  # between looks at whether a slot is free
_LARGEST_CHECKSUM, _LARGEST_COUNT = 2**32 - 1, 2**63


# --- the format ----------------------------------------------------------------------------------------------------


def shard_header(layers: Sequence[LayerSpec], rows: int, metadata: Mapping[str, str], header_bytes: int = 0) -> bytes:
    """Return what a safetensors file begins with: 8 bytes of length and a JSON header, padded to `header_bytes`.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    places = _places(layers, rows)
    for layer in _in_file_order(layers):
        start = places[layer.address]
        header[layer.address] = {
            "dtype": DTYPES[layer.dtype][0],
            "shape": [rows, *layer.shape],
            "data_offsets": [start, start + rows * layer.bytes_per_image],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * max(header_bytes - 8 - len(text), -len(text) % 8)
    if len(text) > HEADER_BYTES_AT_MOST:
        raise StoreError(
            f"the names of a shard's images and layers take {len(text):,} bytes; {HEADER_BYTES_AT_MOST:,} is the most",
            "choose a smaller --shard-images and another --out",
        )
    return len(text).to_bytes(8, "little") + text


def _in_file_order(layers: Sequence[LayerSpec]) -> list[LayerSpec]:
    """Return layers, wide types first: every tensor begins at a multiple of its element's size."""
    return sorted(layers, key=lambda layer: (-DTYPES[layer.dtype][1], layer.address))


def _places(layers: Sequence[LayerSpec], rows: int) -> dict[str, int]:
    """Return where behind the header each tensor begins.

    Example:
        >>> _places([LayerSpec("mask", (5,), "bool"), LayerSpec("conv", (2, 3), "float32")], rows=10)
        {'conv': 0, 'mask': 240}
    """
    in_order = _in_file_order(layers)
    ends = itertools.accumulate(rows * layer.bytes_per_image for layer in in_order)
    return {layer.address: end - rows * layer.bytes_per_image for layer, end in zip(in_order, ends, strict=True)}


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
    return math.ceil(header_bytes / _PAGE_BYTES) * _PAGE_BYTES


# --- one file ------------------------------------------------------------------------------------------------------


class _ShardFile:
    """The file of one shard, aside until it is whole."""

    def __init__(
        self, directory: RunDirectory, shard: Shard, expected: ShardRecord, checksum_thread: ThreadPoolExecutor
    ) -> None:
        self.plan, self.shard, self._checksum_thread = directory.plan, shard, checksum_thread
        self.path = directory.path / self.plan.shard_file(shard)
        self._rows = 0  # appended so far
        self._places = _places(self.plan.layers, len(shard))
        self._header_bytes = _room_for_header(self.plan, shard, expected)
        self._checksums = dict.fromkeys(self._places, 0)
        aside = aside_of(self.path)
        with told_as_store_error(self.path):
            aside.unlink(missing_ok=True)
            # Exclusive: never through a link that somebody put there.
            self._file = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._direct = _opened_direct(aside)

    def append(self, rows: Mapping[str, Tensor], count: int) -> None:
        """Write the first `count` rows of every tensor behind those that are there."""
        pieces = {address: tensor[:count] for address, tensor in rows.items() if tensor[:count].numel()}
        added = self._checksum_thread.submit(self._add_to_checksums, pieces)  # while the disk is at work
        try:
            with told_as_store_error(self.path):
                for address, piece in pieces.items():
                    self._write(piece, self._header_bytes + self._places[address] + self._rows * piece[0].nbytes)
        finally:
            added.result()  # The rows are the caller's again.
        self._rows += count

    def _add_to_checksums(self, pieces: Mapping[str, Tensor]) -> None:
        for address, piece in pieces.items():
            self._checksums[address] = checksum(piece, self._checksums[address])

    def publish(self, record: ShardRecord) -> None:
        """Close up what unreadable images left empty, write the header, flush all to the disk, and show the file."""
        record.checksums = self._checksums
        metadata = record.to_metadata(self.plan, self.shard)
        header = shard_header(self.plan.layers, self._rows, metadata, self._header_bytes)
        with told_as_store_error(self.path):
            end = self._close_up(len(header))
            _write_all(self._file, memoryview(header), 0)
            os.ftruncate(self._file, end)
            put_in_place(self._file, self.path)

    def close(self) -> None:
        """Let go of the file; if it was not published, nothing remains of it."""
        for descriptor in (self._file, self._direct):
            if descriptor is not None:
                os.close(descriptor)
        aside_of(self.path).unlink(missing_ok=True)

    def _write(self, piece: Tensor, offset: int) -> None:
        """Write a tensor at an offset: its whole pages past the page cache, if they lie in memory as in the file."""
        data = bytes_of(piece)
        first = -offset % _PAGE_BYTES
        last = first + (len(data) - first) // _PAGE_BYTES * _PAGE_BYTES
        if last - first < _DIRECT_FROM_BYTES or (piece.data_ptr() - offset) % _PAGE_BYTES:
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

    def _close_up(self, header_bytes: int) -> int:
        """Move the tensors to where they belong with so many rows, behind such a header; return where the last ends."""
        places, end = _places(self.plan.layers, self._rows), self._header_bytes
        for layer in _in_file_order(self.plan.layers):
            source, target = self._places[layer.address], places[layer.address]
            length = self._rows * layer.bytes_per_image
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


# --- all of them ---------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes shards while later batches are computed: one thread writes, one computes checksums. Owns the slots.

    Slots lie in memory that processes forked later share: any of them may fill the rows of any batch. A batch has its
    slot by its place among all batches, so nobody needs to know what became of those before it. What is written is
    handed over in order: `begin` a shard, `write` each of its batches, `publish` it.

    Leaving the `with` block waits for what was handed over, also after an error: a shard that was published is
    finished work.

    Args:
        directory: where to.
        shards: what will be published, in this order.
        batch_size: of images; each shard is cut into such batches.
        at_once: how many batches are filled at the same time.
        pin_memory: slots that a GPU copies into by itself, which no other process sees.
    """

    def __init__(
        self,
        directory: RunDirectory,
        shards: Sequence[Shard],
        batch_size: int,
        *,
        at_once: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.directory, self.shards, self.batch_size = directory, shards, batch_size
        self.seconds = 0.0  # spent on writing, so far
        self._layers = directory.plan.layers
        self._starts = [shard.start for shard in shards]
        batches = [math.ceil(len(shard) / batch_size) for shard in shards]
        self._first_batches = [0, *itertools.accumulate(batches)]
        self._places = {rows: _places(self._layers, rows) for rows in {len(shard) for shard in shards}}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hookx-writer")
        self._checksum_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hookx-checksums")
        self._handed_over: list[Future[None]] = []
        self._file: _ShardFile | None = None  # the one that is being written
        self._has_failed = False
        self._owner = os.getpid()
        self._batches_written = _shared_bytes(8).view(torch.int64)
        images = min(batch_size, max(map(len, shards)))
        slot_bytes = max(1, images * directory.plan.bytes_per_image)
        slots = at_once + max(1, min(at_once // 2, _SPARE_BYTES // slot_bytes))
        allocate = _pinned_bytes if pin_memory else _shared_bytes
        # Two pages more, so that a piece can begin where in its page it will begin in the file.
        self.slots = [
            {layer.address: allocate(images * layer.bytes_per_image + 2 * _PAGE_BYTES) for layer in self._layers}
            for _ in range(min(slots, sum(batches)))
        ]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)
        self._checksum_thread.shutdown(wait=True)
        self._close_file()

    def rows(self, positions: range) -> dict[str, Tensor]:
        """Return the place of a batch: for every address a tensor (images, *shape). Waits until its slot is free."""
        shard, batch = self._shard_and_batch(positions)
        while self._batches_written[0] <= batch - len(self.slots):
            if os.getpid() == self._owner:
                self._handed_over.pop(0).result()
            elif os.getppid() == self._owner:
                time.sleep(_POLL_SECONDS)
            else:
                raise SystemExit  # The run was killed; nobody will free the slot.
        return self._rows_in_slot(shard, batch, positions)

    def begin(self, shard: Shard, expected: ShardRecord) -> None:
        """Begin a shard; the record tells what it will hold if every image can be read."""
        self._hand_over(self._begin, shard, expected)

    def write(self, positions: range, count: int) -> None:
        """Hand a batch over of which the first `count` rows are filled; the slot is no longer the caller's."""
        self._hand_over(self._append, positions, count)

    def publish(self, record: ShardRecord) -> None:
        """Have the shard appear of which all batches were handed over."""
        self._hand_over(self._publish, record)

    def check(self) -> None:
        """Raise what went wrong in the thread, if anything has."""
        while self._handed_over and self._handed_over[0].done():
            self._handed_over.pop(0).result()

    def finish(self) -> None:
        """Wait until everything that was handed over is on the disk."""
        for future in self._handed_over:
            future.result()

    def _shard_and_batch(self, positions: range) -> tuple[Shard, int]:
        number = bisect.bisect_right(self._starts, positions.start) - 1
        shard = self.shards[number]
        return shard, self._first_batches[number] + (positions.start - shard.start) // self.batch_size

    def _rows_in_slot(self, shard: Shard, batch: int, positions: range) -> dict[str, Tensor]:
        slot, places, rows = self.slots[batch % len(self.slots)], self._places[len(shard)], {}
        for layer in self._layers:
            memory = slot[layer.address]
            # Headers are whole pages, so what counts is the place behind them.
            place = places[layer.address] + (positions.start - shard.start) * layer.bytes_per_image
            first = (place - memory.data_ptr()) % _PAGE_BYTES
            piece = memory[first : first + len(positions) * layer.bytes_per_image]
            rows[layer.address] = piece.view(getattr(torch, layer.dtype)).view(len(positions), *layer.shape)
        return rows

    def _hand_over(self, work: Callable[..., None], *arguments: Any) -> None:
        self.check()
        self._handed_over.append(self._thread.submit(self._timed, work, *arguments))

    # --- in the thread ---------------------------------------------------------------------------------------------

    def _timed(self, work: Callable[..., None], *arguments: Any) -> None:
        start = time.perf_counter()
        try:
            work(*arguments)
        except BaseException:
            self._has_failed = True
            raise
        finally:
            self.seconds += time.perf_counter() - start

    def _begin(self, shard: Shard, expected: ShardRecord) -> None:
        if not self._has_failed:
            self._close_file()
            self._file = _ShardFile(self.directory, shard, expected, self._checksum_thread)

    def _append(self, positions: range, count: int) -> None:
        shard, batch = self._shard_and_batch(positions)
        try:
            if not self._has_failed:
                assert self._file is not None and self._file.shard == shard
                self._file.append(self._rows_in_slot(shard, batch, positions), count)
        finally:
            # Also when it failed: a process that waits for the slot must not wait for ever.
            self._batches_written[0] = batch + 1

    def _publish(self, record: ShardRecord) -> None:
        if not self._has_failed:
            assert self._file is not None
            self._file.publish(record)
            self._close_file()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def _shared_bytes(count: int) -> Tensor:
    """Allocate memory that processes forked later share; no file of a /dev/shm that may be small is behind it."""
    return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)


def _pinned_bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)
