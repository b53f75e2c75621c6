"""The batches that one process decodes and, if it has a lane, computes and writes."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.queues
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hookx.errors import THEN_RESUME, HookxError, ImageError
from hookx.run.alone import read_alone
from hookx.run.children import NO_MEMORY, NO_MESSAGE, begin_decoding
from hookx.run.defaults import keep_freed_memory
from hookx.run.in_hand import InHand, interruptible, shared_numbers
from hookx.run.lane import Batch, Lane, stack
from hookx.run.reader import Decoded, Reader
from hookx.run.slots import Piece, Slots


def _is_never_copied(_position: int) -> bool:
    return False


@dataclass(eq=False)
class Worker(IterableDataset[Batch]):
    """What each of several processes does: take the next batch, and decode or compute it; iterating yields batches."""

    reader: Reader
    pieces: Sequence[Piece]
    lane: Lane | None
    known: Mapping[int, Decoded]  # by position: what became of images that are not to be decoded again
    in_hand: InHand
    in_worker: Callable[[], None]
    is_copied: Callable[[int], bool] = _is_never_copied  # by position: an image that need not be read
    slots: Slots | None = None  # where to leave pixels, if another process runs the model

    def __post_init__(self) -> None:
        self._parent, self._lock, self._taken = os.getpid(), multiprocessing.Lock(), shared_numbers(1)

    def start(self, worker_number: int) -> None:
        """Do what a worker process does first."""
        begin_decoding(self._parent)
        # Only the thread that hands tensors over raises here, when the parent was killed while it took one.
        sys.excepthook = lambda *_: None
        # That thread would print what it cannot send, and the parent would wait for it forever.
        multiprocessing.queues.Queue._on_queue_feeder_error = _end_without_message  # type: ignore[attr-defined]
        multiprocessing.queues.Queue._start_thread = _start_or_end  # type: ignore[attr-defined]
        self.in_hand.begin(worker_number)
        self.in_worker()
        keep_freed_memory()

    def __iter__(self) -> Iterator[Batch]:
        writing: Batch | None = None  # the batch before, which may still be on its way to the disk
        for piece in self._mine():
            batch = self._decode(piece)
            if self.lane is None or batch.error is not None:
                yield batch
                continue
            if writing is not None and (not isinstance(writing.written, Future) or writing.written.done()):
                yield _wait_for_disk(writing)
                writing = None
            with _errors_kept(batch), interruptible():
                self.lane.run(batch)
            if writing is not None:
                yield _wait_for_disk(writing)
            writing = batch
        if writing is not None:
            if self.lane is not None and writing.error is None:
                with _errors_kept(writing), interruptible():
                    self.lane.finish()
            yield _wait_for_disk(writing)
        self.in_hand.finish()

    def _mine(self) -> Iterator[Piece]:
        """Yield what this process decodes.

        Some processes are held up more than others, so each takes the next piece when it has none. What is only decoded
        is large: it must not pile up behind a slow image.
        """
        if get_worker_info() is None:
            yield from self.pieces
            return
        while True:
            with self._lock:
                number = self._taken[0]
                self._taken[0] += 1
            if number >= len(self.pieces):
                return
            if self.slots is not None:
                self.slots.wait_for(self.pieces[number])
            yield self.pieces[number]

    def _decode(self, piece: Piece) -> Batch:
        batch, pixels, encoded, start = Batch(piece.positions), list[Tensor](), dict[int, Tensor](), time.perf_counter()
        with _errors_kept(batch):
            for position in piece.positions:
                if self.is_copied(position):
                    continue
                decoded = self.known.get(position) or self._read(position)
                batch.failed_first = batch.failed_first or decoded.failed_first
                batch.rotations_ignored += decoded.rotation_ignored
                if decoded.range_use is not None:
                    batch.ranges.add_image(position, decoded.range_use)
                if decoded.pixels_CHW is None:
                    batch.reasons[position] = decoded.reason
                elif decoded.pixels_CHW.ndim == 1:
                    encoded[position] = decoded.pixels_CHW
                else:
                    pixels.append(decoded.pixels_CHW)
            files = [(position, len(content)) for position, content in encoded.items()]
            if self.slots is not None and bool(pixels) != bool(encoded):  # not some of each
                batch.placed = self.slots.place(piece, pixels or list(encoded.values()))
            if batch.placed is not None:
                batch.encoded = [(None, files)] if files else []
            else:
                batch.pixels_NCHW = stack(pixels)
                batch.encoded = [(torch.cat(list(encoded.values())), files)] if files else []
                if get_worker_info() is not None and self.lane is None:
                    batch.share()
        batch.reading_seconds = time.perf_counter() - start
        return batch

    def _read(self, position: int) -> Decoded:
        try:
            return self.reader.read(position, self.in_hand)
        except MemoryError:
            if get_worker_info() is not None:
                os._exit(NO_MEMORY)  # With the image in hand, so that it is tried alone.
            return read_alone(self.reader, position, self.in_hand.timeout_seconds)


def _end_without_message(*_: object) -> None:
    os._exit(NO_MESSAGE)


_start_thread: Callable[[object], None] = multiprocessing.queues.Queue._start_thread  # type: ignore[attr-defined]


def _start_or_end(queue: object) -> None:
    """Start the thread that hands messages over; if the system refuses one, end, and leave the report to the parent."""
    try:
        _start_thread(queue)
    except RuntimeError:
        os._exit(NO_MESSAGE)


def _wait_for_disk(batch: Batch) -> Batch:
    """Put what was written, or the error, in place of the future, which cannot be handed over."""
    writing, batch.written = batch.written, None
    if isinstance(writing, Future):
        with _errors_kept(batch), interruptible():
            batch.written = writing.result()
    return batch


@contextlib.contextmanager
def _errors_kept(batch: Batch) -> Iterator[None]:
    """Keep an error in its batch: a DataLoader words what a worker raises in its own way."""
    try:
        yield
    except HookxError as error:
        batch.error, batch.pixels_NCHW, batch.encoded = error, None, []
    except MemoryError:
        if get_worker_info() is not None:
            os._exit(NO_MEMORY)
        batch.error = ImageError("too little memory for a batch", "try a smaller --batch-size", THEN_RESUME)
