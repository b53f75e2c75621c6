"""One worker process: how it starts, which image it has in hand, what it does with batch after batch."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hookx.errors import HookxError
from hookx.images.decoding import decode, failure_reason
from hookx.images.listing import ImageList
from hookx.plan import Preprocessing
from hookx.run.defaults import keep_freed_memory
from hookx.run.lane import Batch, Lane, stack

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
NOTHING, FINISHED = -1, -2  # in hand, in place of a position
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the thread that forked it ends


class InHand:
    """Which image each worker is decoding, in memory that the workers share with the main process.

    The system ends a worker whose image takes longer than `timeout_seconds` (0: any time). The alarm's signal works
    where a decoder written in C keeps Python from running, and where the main process is gone. It is blocked while no
    image is in hand, because the worker could hold a lock that the main process needs.
    """

    def __init__(self, workers: int, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._table = torch.full((workers, 2), NOTHING).share_memory_()  # one row per worker: its process, its position

    def of(self, process_id: int | None) -> int:
        """Return the position that a worker has in hand, or NOTHING, or FINISHED."""
        return dict(self._table.tolist()).get(process_id, NOTHING)

    def enter(self, worker_number: int) -> None:
        self._table[worker_number, 0] = os.getpid()

    def take(self, position: int) -> None:
        if (worker := get_worker_info()) is not None:
            self._table[worker.id, 1] = position
            signal.setitimer(signal.ITIMER_REAL, self.timeout_seconds)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])

    def release(self, then: int = NOTHING) -> None:
        if (worker := get_worker_info()) is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            self._table[worker.id, 1] = then


@dataclass(eq=False)
class Worker(IterableDataset[Batch]):
    """The batches that one process decodes and, if it has a lane, computes and writes."""

    images: ImageList
    positions: Sequence[range]
    preprocessing: Preprocessing
    transform: Callable[[Image], Tensor] | None
    lane: Lane | None
    reasons: Mapping[int, str]  # position -> why it is not to be decoded
    in_hand: InHand
    in_worker: Callable[[], None]  # runs in each worker before its first batch

    def __post_init__(self) -> None:
        self._parent = os.getpid()
        self._taken = multiprocessing.Value("q", 0)  # how many batches the workers have taken

    def start(self, worker_number: int) -> None:
        """Do what a worker process does first."""
        # The loader's own watch over the parent begins later, and takes whoever is the parent by then for it.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self._parent:
            os._exit(1)  # The parent was killed already; nobody will ever ask for a batch.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        # The terminal sends Ctrl-C to every process; the parent alone decides, and then ends its workers.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # The parent reports a crash; torch's handlers would print lines of their own, and so would Pillow's log.
        for number in (signal.SIGTERM, signal.SIGALRM, *CRASHES):
            signal.signal(number, signal.SIG_DFL)
        logging.getLogger("PIL").setLevel(logging.CRITICAL)
        # Only the thread that hands tensors over raises here, when the parent was killed while it took one.
        sys.excepthook = lambda *_: None
        self.in_hand.enter(worker_number)
        self.in_worker()
        keep_freed_memory()

    def __iter__(self) -> Iterator[Batch]:
        writing: Batch | None = None  # the batch before, which may still be on its way to the disk
        for positions in self._mine():
            batch = self._decode(positions)
            if self.lane is None:
                yield batch
                continue
            if writing is not None and _is_written(writing):
                yield _wait_for_disk(writing)
                writing = None
            with _interruptible():
                try:
                    self.lane.run(batch)
                except HookxError as error:  # Kept: a DataLoader words what a worker raises in its own way.
                    batch.error = error
            if writing is not None:
                yield _wait_for_disk(writing)
            writing = batch
        if writing is not None:
            yield _wait_for_disk(writing)
        self.in_hand.release(FINISHED)

    def _mine(self) -> Iterator[range]:
        """Yield the positions of the batches that this process decodes.

        Some lanes are held up more than others, so each takes the next batch when it has none: no run ends with one
        lane working alone. Batches that are only decoded come in turn, as the loader asks for them; otherwise they
        would pile up behind a slow image.
        """
        worker = get_worker_info()
        if worker is None or self.lane is None:
            first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
            yield from self.positions[first::step]
            return
        while True:
            with self._taken.get_lock():
                number = self._taken.value
                self._taken.value += 1
            if number >= len(self.positions):
                return
            yield self.positions[number]

    def _decode(self, positions: range) -> Batch:
        batch, pixels, encoded, start = Batch(positions), [], {}, time.perf_counter()
        for position in positions:
            if position in self.reasons:
                batch.reasons[position] = self.reasons[position]
                continue
            self.in_hand.take(position)
            try:
                file, listed_bytes = self.images.files[position], self.images.sizes_bytes[position]
                pixels_CHW, rotation_ignored = decode(file, self.preprocessing, listed_bytes, self.transform)
            except Exception as error:  # Whatever a decoder raises on foreign bytes is that image's failure.
                batch.reasons[position] = failure_reason(error)
            else:
                if pixels_CHW.ndim == 1:
                    encoded[position] = pixels_CHW
                else:
                    pixels.append(pixels_CHW)
                batch.rotations_ignored += rotation_ignored
            self.in_hand.release()  # Not in a `finally`: what leaves this loop ends the process, as the image made it.
        batch.pixels_NCHW = stack(pixels)
        if encoded:
            files = torch.tensor([(position, len(content)) for position, content in encoded.items()])
            batch.encoded = torch.cat(list(encoded.values())), files
        if get_worker_info() is not None and self.lane is None:
            batch.share()
        batch.reading_seconds = time.perf_counter() - start
        return batch


def _is_written(batch: Batch) -> bool:
    return not isinstance(batch.written, Future) or batch.written.done()


def _wait_for_disk(batch: Batch) -> Batch:
    """Put what was written, or the error, in place of the future, which cannot be handed over."""
    writing, batch.written = batch.written, None
    if isinstance(writing, Future):
        with _interruptible():
            try:
                batch.written = writing.result()
            except HookxError as error:
                batch.error = error
    return batch


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let the alarm's signal end this process, as it may while an image is in hand: `Processes.end` sends it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
