"""Activations of batches -> shards on the disk, batch by batch. The only file that writes shards.

Whoever computes a batch writes it, to its place in the file of its shard: many processes write into one file, none
hands activations to another, and none ever holds a whole shard. One of them, the owner, makes the files, and shows a
shard when all its batches are there.

Memory that was never touched is what costs: on a virtual machine more than computing an early layer, in a process as
in the system's page cache. So a process has one place for the batch that it fills and one for a batch on its way to
the disk, and large pieces go there past the page cache.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import mmap
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from hookx.plan import Shard
from hookx.store.directory import RunDirectory
from hookx.store.files import aside_of, report_write_errors
from hookx.store.format import checksum_of_both, tensor_places
from hookx.store.record import ShardRecord
from hookx.store.shard_file import PAGE_BYTES, ShardFile, Written

_SPARE_BYTES = 128 * 2**20  # of activations that only wait for the disk, in each process
_POLL_SECONDS = 0.001  # between looks at what another process does
_MADE_AHEAD = 2  # files for every process: it may have one batch on its way to the disk, and another in hand


class BatchWriter:
    """Writes batches while later ones are computed, in a thread: in the owner, or in processes forked from it.

    The rows of a batch lie behind those of the batches before it, of which some images may be unreadable. So every
    process tells all others how many images of a batch it could read, as soon as it knows.

    Args:
        directory: where to.
        shards: those that are written, in order.
        batch_size: of images; each shard is cut into such batches.
        expected: tells what a shard will hold if every image can be read.
        at_once: how many batches one process fills at the same time.
        pin_memory: rows that a GPU copies into by itself.
    """

    def __init__(
        self,
        directory: RunDirectory,
        shards: Sequence[Shard],
        batch_size: int,
        expected: Callable[[Shard], ShardRecord],
        *,
        at_once: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.directory, self.shards, self.expected, self._batch_size = directory, shards, expected, batch_size
        self._layers, self._pin_memory = directory.plan.layers, pin_memory
        self._starts = [shard.start for shard in shards]
        batches = [math.ceil(len(shard) / batch_size) for shard in shards]
        self._first_batches = [0, *itertools.accumulate(batches)]
        self.tensor_places = {rows: tensor_places(self._layers, rows) for rows in {len(shard) for shard in shards}}
        # One more than how many images of a batch could be read; 0 while nobody knows.
        self._read = _shared_bytes(4 * sum(batches)).view(torch.int32)
        self._owner = os.getpid()
        self._images = min(batch_size, max(map(len, shards)))
        spare = self._images * directory.plan.bytes_per_image <= _SPARE_BYTES
        # The last that became free is the next: none is touched before it is needed.
        self._free: queue.LifoQueue[dict[str, Tensor] | None] = queue.LifoQueue()
        for _ in range(at_once + spare):
            self._free.put(None)  # Allocated where and when it is needed.
        self._filled: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        # It has no thread before its first work, so each process gets one of its own.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hookx-writer")
        self._file: ShardFile | None = None  # the one that was written last
        self._problem: BaseException | None = None

    def rows(self, positions: range, count: int) -> dict[str, Tensor]:
        """Return where to put a batch of which `count` images could be read: a tensor (count, *shape) an address.

        Waits until there is memory for it; raises what went wrong with those before it.
        """
        if self._problem is not None:
            raise self._problem
        shard, batch = self._shard_and_batch(positions)
        self._read[batch] = count + 1
        memory = self._free.get()
        if memory is None:
            # Two pages more, so that a piece can begin where in its page it will begin in the file.
            sizes = {layer.address: self._images * layer.bytes_per_image + 2 * PAGE_BYTES for layer in self._layers}
            memory = {
                address: torch.empty(size, dtype=torch.uint8, pin_memory=self._pin_memory)
                for address, size in sizes.items()
            }
        rows = {}
        for layer in self._layers:
            # Headers are whole pages, so what counts is the place behind them; if all before it could be read.
            place = (
                self.tensor_places[len(shard)][layer.address] + (positions.start - shard.start) * layer.bytes_per_image
            )
            first = (place - memory[layer.address].data_ptr()) % PAGE_BYTES
            piece = memory[layer.address][first : first + count * layer.bytes_per_image]
            rows[layer.address] = piece.view(getattr(torch, layer.dtype)).view(count, *layer.shape)
        self._filled[positions.start] = memory, rows
        return rows

    def write(self, positions: range) -> Future[Written]:
        """Have a batch written of which the rows are filled; they are no longer the caller's."""
        memory, rows = self._filled.pop(positions.start)
        return self._thread.submit(self._write, positions, memory, rows)

    def forget(self, positions: range) -> None:
        """Have nobody rely on what was known of this batch and those behind it: they are read again."""
        self._read[self._shard_and_batch(positions)[1] :] = 0

    def close(self) -> None:
        """Wait for what this process writes, and let go of its file."""
        self._thread.shutdown(wait=True)
        self._close_file()

    def _shard_and_batch(self, positions: range) -> tuple[Shard, int]:
        number = bisect.bisect_right(self._starts, positions.start) - 1
        shard = self.shards[number]
        return shard, self._first_batches[number] + (positions.start - shard.start) // self._batch_size

    # --- in the thread ---------------------------------------------------------------------------------------------

    def _write(self, positions: range, memory: dict[str, Tensor], rows: dict[str, Tensor]) -> Written:
        try:
            file = self._file_of(positions)
            first_row = self._first_row(positions)
            start = time.perf_counter()
            checksums = file.write(rows, first_row)
            count = len(next(iter(rows.values())))
            return Written(first_row, count, checksums, time.perf_counter() - start)
        except BaseException as error:
            self._problem = error
            raise
        finally:
            self._free.put(memory)

    def _file_of(self, positions: range) -> ShardFile:
        shard, _ = self._shard_and_batch(positions)
        if self._file is None or self._file.shard != shard:
            self._close_file()
            aside = aside_of(self.directory.file_of(shard))
            self._wait_until(aside.exists)
            self._file = ShardFile(self.directory, shard, self.expected(shard))
            # Where the owner still lives, it held the directory when this was opened: no other run has made the file.
            self._check_owner()
        return self._file

    def _first_row(self, positions: range) -> int:
        shard, batch = self._shard_and_batch(positions)
        before = self._read[batch - (positions.start - shard.start) // self._batch_size : batch]
        self._wait_until(lambda: bool((before > 0).all()))
        return int(before.sum()) - len(before)

    def _wait_until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._check_owner()
            time.sleep(_POLL_SECONDS)

    def _check_owner(self) -> None:
        if self._owner not in (os.getpid(), os.getppid()):
            raise SystemExit  # The run was killed; nobody will do what is waited for.

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()


def _shared_bytes(count: int) -> Tensor:
    """Allocate zeroed memory that processes forked later share, with no file of a /dev/shm that may be small."""
    return torch.frombuffer(mmap.mmap(-1, count), dtype=torch.uint8)


class ShardWriter:
    """Makes the files that `batches` are written to, and publishes each when all of it is there, in a thread.

    Leaving the `with` block waits for what is to be published, also after an error: a shard that was published is
    finished work. Of all others nothing remains; by then, no other process may write any more.

    Args:
        batches: what writes them, in this process and in those that are forked from it.
        processes: how many of them write.
    """

    def __init__(self, batches: BatchWriter, *, processes: int = 1) -> None:
        self.batches = batches
        self.seconds = 0.0  # for which each process has written, on average, and the owner published
        self._directory, self._shards, self._expected = batches.directory, batches.shards, batches.expected
        self._processes = processes
        self._made = self._handed_over = 0  # shards, in order: of those with a file, and of those to be published
        self._added: list[Written | Future[Written]] = []  # batches of the next shard to be published
        self._publishing: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hookx-publisher")

    def __enter__(self) -> ShardWriter:
        try:
            self._make_files()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True)
        self.batches.close()
        for shard in self._shards[: self._made]:
            aside_of(self._directory.file_of(shard)).unlink(missing_ok=True)

    def add(self, written: Written | Future[Written]) -> None:
        """Add the next batch of the shard; it may still be on its way to the disk."""
        self._added.append(written)

    def publish(self, record: ShardRecord) -> None:
        """Have the next shard appear, of which all batches were added. Raises what went wrong with those before it."""
        while self._publishing and self._publishing[0].done():
            self._publishing.popleft().result()
        shard, added = self._shards[self._handed_over], self._added
        self._handed_over, self._added = self._handed_over + 1, []
        self._publishing.append(self._thread.submit(self._publish, shard, added, record))
        self._make_files()

    def finish(self) -> None:
        """Wait until everything is on the disk."""
        while self._publishing:
            self._publishing.popleft().result()

    def _make_files(self) -> None:
        while self._made < min(self._handed_over + _MADE_AHEAD * self._processes, len(self._shards)):
            path = self._directory.file_of(self._shards[self._made])
            with report_write_errors(path, resumable=True):
                aside_of(path).unlink(missing_ok=True)
                self._made += 1  # Before it is: what a signal interrupts is removed, too.
                # Exclusive: never through a link that somebody put there.
                os.close(os.open(aside_of(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))

    # --- in the thread ---------------------------------------------------------------------------------------------

    def _publish(self, shard: Shard, added: Sequence[Written | Future[Written]], record: ShardRecord) -> None:
        layers, rows = self._directory.plan.layers, 0
        record.checksums = {layer.address: 0 for layer in layers}
        for batch in added:
            written = batch.result() if isinstance(batch, Future) else batch
            assert written.first_row == rows, "a batch was written to another place than its own"
            for layer in layers:
                before, of_batch = record.checksums[layer.address], written.checksums[layer.address]
                length = written.rows * layer.bytes_per_image
                record.checksums[layer.address] = checksum_of_both(before, of_batch, length)
            rows += written.rows
            self.seconds += written.seconds / self._processes
        start = time.perf_counter()
        file = ShardFile(self._directory, shard, self._expected(shard))
        try:
            file.publish(rows, record)
        finally:
            file.close()
            self.seconds += time.perf_counter() - start
