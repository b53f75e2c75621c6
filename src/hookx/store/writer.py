"""Activations of batches -> shards on the disk, batch by batch. The only module that writes shards.

Whoever computes a batch writes it, at its offset in the file of its shard: many processes write to one file, no process
hands activations to another, and none ever holds a whole shard.

Touching fresh memory is what costs: on a virtual machine more than computing an early layer, in a process as in the
system's page cache. So a process has memory for the batch that it fills and for one on its way to the disk, which it
uses again and again, and large pieces go to the disk past the page cache.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import functools
import itertools
import math
import mmap
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hookx.plan import KINDS, Plan, Shard, ValueCounts
from hookx.store.crc import crc32, crc32_combine
from hookx.store.directory import RunDirectory
from hookx.store.files import aside_of, put_in_place, report_write_errors
from hookx.store.format import bytes_of, checksum, in_file_order, shard_header, tensor_places
from hookx.store.record import ShardRecord

_PAGE_BYTES = mmap.PAGESIZE
_MAX_CHECKSUM, _MAX_COUNT = 2**32 - 1, 2**63
_POLL_SECONDS = 0.001  # between looks at what another process does
_THREADS_FOR_CHECKSUMS, _CHECKSUM_BYTES = 3, 8 * 2**20
_FILES_AHEAD = 2  # for every process: it may have one batch on its way to the disk, and another in hand

Rows = dict[str, Tensor]  # address -> (images of a batch, *shape)


@dataclass(frozen=True)
class Tuning:
    """How shards are written. Changes speed and memory, and no byte of any shard."""

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


class ShardWriter:
    """Writes the shards of a run, batch by batch, from the process that made it and from those forked from it.

    In any process, `rows` gives the memory for a batch, and `write` writes it in a thread while the next is computed.
    The owner, which made the writer, enters it, creates the files, and publishes one shard after the other. Leaving
    the `with` block waits for what is being published, even after an error: a published shard is finished work.
    Nothing else remains; by then no other process may write any more.

    The rows of a batch follow those of the batches before it, in which some images may be unreadable. So every process
    tells all others how many images of a batch it could read, as soon as it knows.

    Args:
        shards: those to write, in order; each is cut into batches of `batch_size` images.
        expected: returns what a shard will hold if every image can be read.
        processes: how many of them write.
        filled_at_once: how many batches one process fills at the same time; more than one beside a GPU.
        pin_memory: allocate rows that a GPU can copy into by itself.
    """

    def __init__(
        self,
        directory: RunDirectory,
        shards: Sequence[Shard],
        batch_size: int,
        expected: Callable[[Shard], ShardRecord],
        *,
        processes: int = 1,
        filled_at_once: int = 1,
        pin_memory: bool = False,
        tuning: Tuning = Tuning(),
    ) -> None:
        self.seconds = 0.0  # of writing, averaged over the processes, and of publishing
        self._directory, self._shards, self._expected = directory, shards, expected
        self._batch_size, self._processes, self._pin_memory, self._tuning = batch_size, processes, pin_memory, tuning
        self._layers, self._owner = directory.plan.layers, os.getpid()
        self._starts = [shard.start for shard in shards]
        self._first_batches = [0, *itertools.accumulate(math.ceil(len(shard) / batch_size) for shard in shards)]
        self._tensor_places = {rows: tensor_places(self._layers, rows) for rows in {len(shard) for shard in shards}}
        # One more than the images of a batch that could be read; 0 while nobody knows. Processes forked later share
        # this memory, without a file in a /dev/shm that may be small.
        self._read = torch.frombuffer(mmap.mmap(-1, 4 * self._first_batches[-1]), dtype=torch.int32)

        # In each process:
        self._images = min(batch_size, max(map(len, shards)))
        has_spare = self._images * directory.plan.bytes_per_image <= tuning.spare_bytes
        # The last that was freed is used next: none is touched before it is needed.
        self._free: queue.LifoQueue[Rows | None] = queue.LifoQueue()
        for _ in range(filled_at_once + has_spare):
            self._free.put(None)  # Allocated where and when it is needed.
        self._filled: dict[int, tuple[Rows, Rows]] = {}  # first position -> its memory, and the rows in it
        # An executor starts its thread with its first work, so each process gets a thread of its own.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hookx-writer")
        # Beside a GPU one process writes everything, so it computes checksums while it waits for the disk.
        self._beside = ThreadPoolExecutor(_THREADS_FOR_CHECKSUMS, "hookx-checksums") if filled_at_once > 1 else None
        self._file: _ShardFile | None = None  # the last one written to
        self._problem: BaseException | None = None

        # In the owner, counts of shards: those with a file, and those handed over to be published.
        self._created = self._handed_over = 0
        self._publishing: deque[Future[None]] = deque()
        self._publisher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hookx-publisher")

    # --- in any process --------------------------------------------------------------------------------------------

    def rows(self, positions: range, count: int) -> Rows:
        """Return where to put a batch of which `count` images could be read: a tensor (count, *shape) an address.

        Waits until there is memory for it; raises what went wrong with an earlier batch.
        """
        if self._problem is not None:
            raise self._problem
        shard, batch = self._shard_and_batch(positions)
        self._read[batch] = count + 1
        memory = self._free.get()
        if memory is None:
            # Two more pages, so that a piece can have the same alignment as its place in the file.
            sizes = {layer.address: self._images * layer.bytes_per_image + 2 * _PAGE_BYTES for layer in self._layers}
            allocate = functools.partial(torch.empty, dtype=torch.uint8, pin_memory=self._pin_memory)
            memory = {address: allocate(size_bytes) for address, size_bytes in sizes.items()}
        rows, places = {}, self._tensor_places[len(shard)]
        for layer in self._layers:
            # Headers are whole pages, so only the place behind them counts; it assumes that no image was unreadable.
            place = places[layer.address] + (positions.start - shard.start) * layer.bytes_per_image
            first = (place - memory[layer.address].data_ptr()) % _PAGE_BYTES
            piece = memory[layer.address][first : first + count * layer.bytes_per_image]
            rows[layer.address] = piece.view(getattr(torch, layer.dtype)).view(count, *layer.shape)
        self._filled[positions.start] = memory, rows
        return rows

    def write(self, positions: range, wait_until_filled: Callable[[], None] = lambda: None) -> Future[Written]:
        """Write a batch in the thread, which first waits until a GPU has filled its rows."""
        memory, rows = self._filled.pop(positions.start)
        return self._thread.submit(self._write, positions, memory, rows, wait_until_filled)

    def forget(self, positions: range) -> None:
        """Forget what other processes have read of this batch and those behind it: they are read again."""
        self._read[self._shard_and_batch(positions)[1] :] = 0

    def close(self) -> None:
        """Wait for what this process is writing, and close its file."""
        self._thread.shutdown(wait=True)
        if self._beside is not None:
            self._beside.shutdown(wait=True)
        self._close_file()

    def _shard_and_batch(self, positions: range) -> tuple[Shard, int]:
        number = bisect.bisect_right(self._starts, positions.start) - 1
        shard = self._shards[number]
        return shard, self._first_batches[number] + (positions.start - shard.start) // self._batch_size

    # --- in its writing thread -------------------------------------------------------------------------------------

    def _write(self, positions: range, memory: Rows, rows: Rows, wait_until_filled: Callable[[], None]) -> Written:
        try:
            wait_until_filled()
            shard, batch = self._shard_and_batch(positions)
            file = self._open_file(shard)
            before = self._read[batch - (positions.start - shard.start) // self._batch_size : batch]
            self._wait_until(lambda: bool((before > 0).all()))
            first_row = int(before.sum()) - len(before)
            start = time.perf_counter()
            checksums = file.write(rows, first_row, self._beside)
            count = len(next(iter(rows.values())))
            return Written(first_row, count, checksums, time.perf_counter() - start)
        except BaseException as error:
            self._problem = error
            raise
        finally:
            self._free.put(memory)

    def _open_file(self, shard: Shard) -> _ShardFile:
        if self._file is None or self._file.shard != shard:
            self._close_file()
            self._wait_until(aside_of(self._directory.file_of(shard)).exists)
            self._file = _ShardFile(self._directory, shard, self._expected(shard), self._tuning)
            # If the owner is still alive, it held the directory when this was opened: no other run made the file.
            self._check_owner()
        return self._file

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._check_owner()
            time.sleep(_POLL_SECONDS)

    def _check_owner(self) -> None:
        if self._owner not in (os.getpid(), os.getppid()):
            raise SystemExit  # The run was killed; what this process waits for will never happen.

    def _close_file(self) -> None:
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()

    # --- in the owner ----------------------------------------------------------------------------------------------

    def __enter__(self) -> ShardWriter:
        try:
            self._create_files()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._publisher.shutdown(wait=True)
        self.close()
        for shard in self._shards[: self._created]:
            aside_of(self._directory.file_of(shard)).unlink(missing_ok=True)

    def publish(self, record: ShardRecord, batches: Sequence[Written | Future[Written] | None]) -> None:
        """Publish the next shard once its batches are on the disk; raises what went wrong with an earlier shard."""
        while self._publishing and self._publishing[0].done():
            self._publishing.popleft().result()
        shard = self._shards[self._handed_over]
        self._handed_over += 1
        self._publishing.append(self._publisher.submit(self._publish, shard, batches, record))
        self._create_files()

    def finish(self) -> None:
        """Wait until everything is on the disk."""
        while self._publishing:
            self._publishing.popleft().result()

    def _create_files(self) -> None:
        while self._created < min(self._handed_over + _FILES_AHEAD * self._processes, len(self._shards)):
            path = self._directory.file_of(self._shards[self._created])
            with report_write_errors(path, resumable=True):
                aside_of(path).unlink(missing_ok=True)
                self._created += 1  # Counted before it exists, so that it is removed if a signal comes in between.
                # Exclusive: never through a link that someone put there.
                os.close(os.open(aside_of(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))

    def _publish(self, shard: Shard, batches: Sequence[Written | Future[Written] | None], record: ShardRecord) -> None:
        rows = 0
        record.checksums = {layer.address: 0 for layer in self._layers}
        for batch in batches:
            written = batch.result() if isinstance(batch, Future) else batch
            assert written is not None and written.first_row == rows, "a batch was written to the place of another"
            for layer in self._layers:
                before, added = record.checksums[layer.address], written.checksums[layer.address]
                added_bytes = written.rows * layer.bytes_per_image
                record.checksums[layer.address] = crc32_combine(before, added, added_bytes)
            rows += written.rows
            self.seconds += written.seconds / self._processes
        start = time.perf_counter()
        with contextlib.closing(_ShardFile(self._directory, shard, self._expected(shard), self._tuning)) as file:
            file.publish(rows, record)
        self.seconds += time.perf_counter() - start


class _ShardFile:
    """The file of one shard, aside until it is whole, as one process has it open."""

    def __init__(self, directory: RunDirectory, shard: Shard, expected: ShardRecord, tuning: Tuning) -> None:
        self.shard = shard
        self._plan, self._path, self._tuning = directory.plan, directory.file_of(shard), tuning
        self._tensor_places = tensor_places(self._plan.layers, len(shard))
        self._header_bytes = _max_header_bytes(self._plan, shard, expected)
        aside = aside_of(self._path)
        with report_write_errors(self._path, resumable=True):
            self._file = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        self._direct = open_direct(aside) if tuning.direct else None

    def write(self, rows: Mapping[str, Tensor], first_row: int, beside: Executor | None = None) -> dict[str, int]:
        """Write rows of every layer, beginning at `first_row`; return their checksums, computed `beside` if given."""
        later = {address: _checksum_beside(piece, beside) for address, piece in rows.items()} if beside else {}
        checksums = {}
        with report_write_errors(self._path, resumable=True):
            for address, piece in rows.items():
                if not beside:
                    checksums[address] = checksum(piece)
                if piece.numel():
                    self._write(piece, self._header_bytes + self._tensor_places[address] + first_row * piece[0].nbytes)
        return checksums | {address: computed() for address, computed in later.items()}

    def publish(self, rows: int, record: ShardRecord) -> None:
        """Close the gaps that unreadable images left, write the header, flush, and give the file its name."""
        header = shard_header(self._plan.layers, rows, record.to_metadata(self._plan, self.shard), self._header_bytes)
        with report_write_errors(self._path, resumable=True):
            end = self._close_gaps(rows, len(header))
            _write_all(self._file, memoryview(header), 0)
            os.ftruncate(self._file, end)
            put_in_place(self._file, self._path)

    def close(self) -> None:
        for descriptor in (self._file, self._direct):
            if descriptor is not None:
                os.close(descriptor)

    def _write(self, piece: Tensor, offset: int) -> None:
        """Write a tensor; its whole pages bypass the page cache if they are aligned in memory as in the file."""
        data = bytes_of(piece)
        first = -offset % _PAGE_BYTES
        last = first + (len(data) - first) // _PAGE_BYTES * _PAGE_BYTES
        if last - first < self._tuning.min_direct_bytes or (piece.data_ptr() - offset) % _PAGE_BYTES:
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
                assert read, "the file is shorter than what was written to it"
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
    return math.ceil(header_bytes / _PAGE_BYTES) * _PAGE_BYTES


def open_direct(path: Path) -> int | None:
    """Open a file for writing past the page cache; None where its file system or the system cannot do that."""
    if hasattr(os, "O_DIRECT"):
        with contextlib.suppress(OSError):
            return os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
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
        data, offset = data[written:], offset + written
