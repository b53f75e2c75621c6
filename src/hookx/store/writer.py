"""Activations of batches -> shards on the disk, batch by batch.

Whoever computes a batch writes it, at its offset in the file of its shard: many processes write to one file, no process
hands activations to another, and none ever holds a whole shard.

Touching fresh memory costs more than computing an early layer on a virtual machine. So a process has memory for the
batch that it fills and for one on its way to the disk, which it uses again and again.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import math
import mmap
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hookx.errors import THEN_RESUME, StoreError, one_line
from hookx.plan import Shard
from hookx.store.crc import crc32_combine
from hookx.store.directory import RunDirectory
from hookx.store.files import reason_of, report_write_errors, vanished
from hookx.store.format import tensor_places
from hookx.store.record import ShardRecord
from hookx.store.shard_file import PAGE_BYTES, ShardFile, Tuning, close_quietly

_POLL_SECONDS = 0.001  # between looks at what another process does
_CHECK_SECONDS = 0.5  # between looks at whether what is waited for can still happen
_TOUCH_SECONDS = 3600  # Nobody takes what was touched so often for left over.
_THREADS_FOR_CHECKSUMS = 3
MAX_WAITING = 2  # shards on their way to the store, which may be slower than the model
_FILES_AHEAD = 2  # for every process: it may have one batch on its way to the disk, and another in hand

T = TypeVar("T")
Rows = dict[str, Tensor]  # address -> (images of a batch, *shape)


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
        replaced: numbers of the shards that take the place of those that are there.
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
        replaced: Collection[int] = (),
        tuning: Tuning = Tuning(),
    ) -> None:
        self.seconds = 0.0  # of writing, averaged over the processes, and of publishing
        self._directory, self._shards, self._expected = directory, shards, expected
        self._replaced = frozenset(replaced)
        self._batch_size, self._processes, self._pin_memory, self._tuning = batch_size, processes, pin_memory, tuning
        self._layers, self._owner = directory.plan.layers, os.getpid()
        self._starts = [shard.start for shard in shards]
        self._first_batches = [0, *itertools.accumulate(math.ceil(len(shard) / batch_size) for shard in shards)]
        self._tensor_places = {rows: tensor_places(self._layers, rows) for rows in {len(shard) for shard in shards}}
        # One more than the images of a batch that could be read; 0 while nobody knows. Processes forked later share
        # this memory, without a file in a /dev/shm that may be small.
        self._read = torch.frombuffer(_share_memory(4 * self._first_batches[-1]), dtype=torch.int32)
        self._made = _share_memory(len(shards))  # 1 for a shard whose file is there to be written to; shared as well

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
        self._file: ShardFile | None = None  # the last one written to
        self._problem: BaseException | None = None

        # In the owner, counts of shards: those with a file, and those handed over to be published. It keeps the files
        # open, because only then a flush reports what went wrong with the writes of other processes before.
        self._created = self._handed_over = 0
        self._descriptors: dict[int, int] = {}  # of the files of shards, by number
        self._touched = time.monotonic()
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
            sizes = {layer.address: self._images * layer.bytes_per_image + 2 * PAGE_BYTES for layer in self._layers}
            allocate = functools.partial(torch.empty, dtype=torch.uint8, pin_memory=self._pin_memory)
            try:
                memory = {address: allocate(size_bytes) for address, size_bytes in sizes.items()}
            except RuntimeError as error:  # torch has no other error for too little memory
                raise _too_little_memory(sum(sizes.values()), one_line(error)) from None
        rows, places = {}, self._tensor_places[len(shard)]
        for layer in self._layers:
            # Headers are whole pages, so only the place behind them counts; it assumes that no image was unreadable.
            place = places[layer.address] + (positions.start - shard.start) * layer.bytes_per_image
            first = (place - memory[layer.address].data_ptr()) % PAGE_BYTES
            piece = memory[layer.address][first : first + count * layer.bytes_per_image]
            rows[layer.address] = piece.view(getattr(torch, layer.dtype)).view(count, *layer.shape)
        self._filled[positions.start] = memory, rows
        return rows

    def write(self, positions: range, wait_until_filled: Callable[[], None] = lambda: None) -> Future[Written]:
        """Write a batch in the thread, which first waits until a GPU has filled its rows."""
        memory, rows = self._filled.pop(positions.start)
        return _submit(self._thread, self._write, positions, memory, rows, wait_until_filled)

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

    def _open_file(self, shard: Shard) -> ShardFile:
        if self._file is None or self._file.shard != shard:
            self._close_file()
            number = bisect.bisect_right(self._starts, shard.start) - 1
            self._wait_until(lambda: self._made[number] != 0)
            aside = self._directory.aside_of(shard)
            with report_write_errors(self._directory.file_of(shard), resumable=True):
                try:
                    descriptor = os.open(aside, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                except FileNotFoundError:
                    raise vanished(aside) from None
            self._file = ShardFile(self._directory, shard, self._expected(shard), self._tuning, descriptor)
        self._file.check()
        return self._file

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        """Wait for another process, as long as the run goes on and the file in hand is there to be finished."""
        next_check = time.monotonic() + _CHECK_SECONDS
        while not is_so():
            self._check_owner()
            if self._file is not None and time.monotonic() > next_check:
                self._file.check()
                next_check = time.monotonic() + _CHECK_SECONDS
            time.sleep(_POLL_SECONDS)

    def _check_owner(self) -> None:
        if self._owner not in (os.getpid(), os.getppid()):
            raise SystemExit  # The run was killed; what this process waits for will never happen.

    def _close_file(self) -> None:
        file, self._file = self._file, None
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
        for descriptor in self._descriptors.values():
            close_quietly(descriptor)
        for shard in self._shards[: self._created]:
            with contextlib.suppress(OSError):  # What cannot be removed now, a later run removes.
                os.unlink(self._directory.aside_of(shard))

    def check(self) -> None:
        """Raise what went wrong with an earlier shard, if that is known by now."""
        while self._publishing and self._publishing[0].done():
            self._publishing.popleft().result()

    def release(self) -> None:
        """Close what a forked process has inherited of the owner's files."""
        descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            close_quietly(descriptor)

    def publish(self, record: ShardRecord, batches: Sequence[Written | Future[Written] | None]) -> None:
        """Publish the next shard once its batches are on the disk; raises what went wrong with an earlier shard."""
        while len(self._publishing) > MAX_WAITING:
            self._publishing.popleft().result()
        self.check()
        shard = self._shards[self._handed_over]
        self._handed_over += 1
        self._publishing.append(_submit(self._publisher, self._publish, shard, batches, record))
        self._create_files()

    def finish(self) -> None:
        """Wait until everything is on the disk."""
        while self._publishing:
            self._publishing.popleft().result()

    def _create_files(self) -> None:
        while self._created < min(self._handed_over + _FILES_AHEAD * self._processes, len(self._shards)):
            number = self._created
            shard = self._shards[number]
            with report_write_errors(self._directory.file_of(shard), resumable=True):
                self._created += 1  # Counted before it exists, so that it is removed if a signal comes in between.
                # Exclusive: never through a link that someone put there.
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._descriptors[shard.number] = os.open(self._directory.aside_of(shard), flags, 0o666)
            self._made[number] = 1
        if time.monotonic() - self._touched > _TOUCH_SECONDS:
            self._touched = time.monotonic()
            for shard in self._shards[self._handed_over : self._created]:
                with contextlib.suppress(OSError):
                    os.utime(self._directory.aside_of(shard))

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
        descriptor = self._descriptors.pop(shard.number)
        file = ShardFile(self._directory, shard, self._expected(shard), self._tuning, descriptor)
        with contextlib.closing(file):
            file.publish(rows, record, replace=shard.number in self._replaced)
        self.seconds += time.perf_counter() - start


def _share_memory(size_bytes: int) -> mmap.mmap:
    """Return zeros that this process shares with those that it forks."""
    try:
        return mmap.mmap(-1, size_bytes)
    except OSError as error:
        raise _too_little_memory(size_bytes, reason_of(error)) from None


def _too_little_memory(size_bytes: int, reason: str) -> StoreError:
    return StoreError(
        f"the system refuses {size_bytes:,} bytes of memory for activations: {reason}",
        "try a smaller --batch-size or fewer --workers",
        THEN_RESUME,
    )


def _submit(executor: Executor, call: Callable[..., T], *arguments: Any) -> Future[T]:
    """Start work in a thread, or raise `StoreError` if the system refuses another thread."""
    try:
        return executor.submit(call, *arguments)
    except RuntimeError as error:
        raise StoreError(
            f"the system refuses a thread that writes: {one_line(error)}",
            "try fewer --workers, or allow more processes: ulimit -u",
            THEN_RESUME,
        ) from None
