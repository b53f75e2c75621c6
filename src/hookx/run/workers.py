"""A list of images -> batches, by worker processes that decode ahead of the main process, or run a lane themselves.

A file can make a decoder hang, or crash its process. That costs the one image: a worker notes which image it has in
hand. If the worker crashes, that image is a failure, and all workers are started again without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hookx.errors import HookxError, ImageError
from hookx.images.decoding import decode, failure_reason, known_formats
from hookx.images.listing import ImageList
from hookx.plan import Preprocessing
from hookx.run.defaults import keep_freed_memory
from hookx.run.lane import Batch, Lane, stack
from hookx.run.nvjpeg import decode_rest
from hookx.signals import defer_signals

if TYPE_CHECKING:
    from PIL.Image import Image

_CPU = torch.device("cpu")
_POLL_SECONDS, _POLL_FOR_CONSUMER_SECONDS = 0.2, 0.002
_WAIT_FOR_EXIT_SECONDS, _WAIT_FOR_DISK_SECONDS = 20, 60
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_NOTHING, _FINISHED = -1, -2  # in hand, in place of a position
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the thread that forked it ends


def batches(
    images: ImageList,
    positions: Sequence[range],
    preprocessing: Preprocessing,
    *,
    workers: int,
    decode_timeout_seconds: float = 0,
    pin_memory: bool = False,
    in_worker: Callable[[], None] = lambda: None,
    transform: Callable[[Image], Tensor] | None = None,
    lane: Lane | None = None,
    device: torch.device = _CPU,
) -> Generator[Batch]:
    """Decode the given ranges of positions, one batch a range, in order, `workers` processes ahead of the consumer.

    An image that takes longer than `decode_timeout_seconds` (0: any time), or that crashes its process, is a failure
    like any other. Without workers this process decodes, unprotected. The workers are forked by this call, not by the
    first batch, so that a caller can fork them before there are threads. Those started after a crash are forked among
    threads, which Linux allows: they wait for no lock that one of them holds.

    Args:
        in_worker: runs in each worker before its first batch.
        transform: a model's own preprocessing, in place of what `preprocessing` says.
        lane: what each worker runs its batches through; they come without pixels then, but written.
        device: where nvjpeg decodes, if the preprocessing says so; the pixels are there then.

    Raises:
        ImageError: (while iterating) a worker crashed or was killed, and no image is to blame.
        HookxError: (while iterating) whatever stopped a lane.
    """
    reasons: dict[int, str] = {}  # why the images at these positions are not to be tried again

    def start(first: int) -> _Processes:
        in_hand = InHand(workers, decode_timeout_seconds)
        worker = Worker(images, positions[first:], preprocessing, transform, lane, reasons, in_hand, in_worker)
        return _Processes(worker, workers=workers, pin_memory=pin_memory)

    known_formats()  # Imports the decoders: not in every worker, and not in the time of its first image.
    processes = start(0)

    def received() -> Generator[Batch]:
        nonlocal processes
        try:
            for number, expected in enumerate(positions):
                while (batch := processes.receive(expected)) is None:
                    reasons.update(processes.fatal_images())
                    all_ended = processes.end(wait_seconds=_WAIT_FOR_DISK_SECONDS if lane else 1)
                    if lane is not None:
                        if not all_ended:  # What it still writes could replace what is written again.
                            raise ImageError("a worker that was killed does not exit", "does the disk still answer?")
                        lane.writer.forget(expected)
                    processes = start(number)
                if batch.error is not None:
                    raise batch.error
                yield batch
        finally:
            processes.end()

    def in_order() -> Generator[Batch]:
        with (
            contextlib.closing(received()) as whole_or_in_part,
            contextlib.closing(decode_rest(whole_or_in_part, preprocessing, device)) as decoded,
        ):
            for batch in decoded:
                batch.keys = [images.keys[position] for position in batch.positions if position not in batch.reasons]
                batch.failures = [(images.keys[position], reason) for position, reason in batch.reasons.items()]
                yield batch

    return in_order()


class _Processes:
    """The worker processes of a DataLoader, from their start to their end. Without workers there are none."""

    def __init__(self, worker: Worker, *, workers: int, pin_memory: bool) -> None:
        self._in_hand, self._consumed = worker.in_hand, worker.consumed
        self._early: dict[range, Batch] = {}  # received before its turn
        others = set(multiprocessing.active_children())
        loader = DataLoader(
            worker,
            batch_size=None,  # The dataset's items are batches already: they follow the shards.
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=worker.start,
            in_order=False,  # `receive` puts the batches in order.
            timeout=_POLL_SECONDS if workers else 0,
            # Forked workers share the list of images and start in milliseconds; they never touch a GPU.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        self._processes: list[multiprocessing.process.BaseProcess] = []
        try:
            with defer_signals(), _keep_child_signals(), _nothing_inherited_is_collected():
                self._batches: Iterator[Batch] = iter(loader)
                self._processes = [process for process in multiprocessing.active_children() if process not in others]
        except BaseException:
            self.end()
            raise

    def receive(self, positions: range) -> Batch | None:
        """Return the batch at these positions, or None if a worker has crashed or was killed."""
        while positions not in self._early:
            try:
                batch = next(self._batches)
                self._early[batch.positions] = batch
            except MemoryError:
                raise _out_of_memory("a worker has no memory for its batch") from None
            except TimeoutError:
                raise  # An alarm of the caller's: a crashed process never raises it here.
            except Exception as error:
                if str(error).startswith("DataLoader timed out"):
                    continue  # Nothing is ready and none has crashed: the loader looks every _POLL_SECONDS.
                # A process that crashes leaves unreadable messages behind, sometimes a while before it has exited.
                deadline = time.monotonic() + _WAIT_FOR_EXIT_SECONDS
                while self._processes and (seconds_left := deadline - time.monotonic()) > 0:
                    # List the running before looking for the crashed, or a crash in between would not end the wait.
                    alive = [process.sentinel for process in self._processes if process.exitcode is None]
                    if any(self._crashed()):
                        return None
                    multiprocessing.connection.wait(alive, timeout=seconds_left)
                raise
        self._consumed.value += 1
        return self._early.pop(positions)

    def fatal_images(self) -> dict[int, str]:
        """Return position -> why its image crashed a worker; `ImageError` if no image is to blame."""
        fatal = {}
        for exit_code, position in self._crashed():
            how = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
            if position == _NOTHING or not (exit_code >= 0 or -exit_code in (signal.SIGALRM, *_CRASHES)):
                raise _out_of_memory(f"a worker exited unexpectedly: {how}")
            if exit_code == -signal.SIGALRM:
                fatal[position] = f"took longer than {self._in_hand.timeout_seconds:g} s to decode"
            else:
                fatal[position] = f"the decoder crashed ({how})"
        return fatal

    def _crashed(self) -> Iterator[tuple[int, int]]:
        """Yield the exit code of every process that ended before its work did, and the position it had in hand."""
        for process in self._processes:
            if process.exitcode is not None and (position := self._in_hand.of(process.pid)) != _FINISHED:
                yield process.exitcode, position

    def end(self, wait_seconds: float = 1) -> bool:
        """End what still runs, without waiting for a slow image; return whether all of it ended in time."""
        for process in self._processes:
            if process.is_alive() and process.pid:
                os.kill(process.pid, signal.SIGALRM)
        if self._processes:
            # What the loader does when it is deleted. Here it may be kept alive, by the traceback of an exception.
            self._batches._shutdown_workers()  # type: ignore[attr-defined]
        for process in self._processes:
            process.kill()
            process.join(timeout=wait_seconds)  # What is stuck in the kernel cannot be killed.
        return not any(process.is_alive() for process in self._processes)


def _out_of_memory(problem: str) -> ImageError:
    return ImageError(
        problem,
        "most often the machine ran out of memory: try fewer --workers or a smaller --batch-size",
        "finished shards are kept; run the same command again to resume",
    )


@contextlib.contextmanager
def _keep_child_signals() -> Iterator[None]:
    """Undo the DataLoader's SIGCHLD handler, which raises in the middle of whatever the consumer does.

    Without it the loader finds a crashed worker when it waits for its batch.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)


@contextlib.contextmanager
def _nothing_inherited_is_collected() -> Iterator[None]:
    """Keep the garbage collector of forked processes from what they inherit.

    Garbage can hold tensors of a GPU, and a forked process that frees one is aborted by CUDA, whatever image it has in
    hand. It also keeps the pages shared that a collection would write to.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()  # In this process alone: the others have been forked by now.


class InHand:
    """Which image each worker is decoding, in memory that the workers share with the main process.

    The system ends a worker whose image takes longer than `timeout_seconds` (0: any time). The alarm's signal works
    where a decoder written in C keeps Python from running, and where the main process is gone. It is blocked while no
    image is in hand, because the worker could hold a lock that the main process needs.
    """

    def __init__(self, workers: int, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.table = torch.full((workers, 2), _NOTHING).share_memory_()  # one row per worker: its process, its position

    def of(self, process_id: int | None) -> int:
        return dict(self.table.tolist()).get(process_id, _NOTHING)

    def take(self, position: int) -> None:
        if (worker := get_worker_info()) is not None:
            self.table[worker.id, 1] = position
            signal.setitimer(signal.ITIMER_REAL, self.timeout_seconds)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])

    def release(self, then: int = _NOTHING) -> None:
        if (worker := get_worker_info()) is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
            self.table[worker.id, 1] = then


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
    in_worker: Callable[[], None]

    def __post_init__(self) -> None:
        self._parent = os.getpid()
        # Batches: those that the workers have taken, and those that the consumer has.
        self._taken, self.consumed = multiprocessing.Value("q", 0), multiprocessing.Value("q", 0, lock=False)

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
        for number in (signal.SIGTERM, signal.SIGALRM, *_CRASHES):
            signal.signal(number, signal.SIG_DFL)
        logging.getLogger("PIL").setLevel(logging.CRITICAL)
        # Only the thread that hands tensors over raises here, when the parent was killed while it took one.
        sys.excepthook = lambda *_: None
        self.in_hand.table[worker_number, 0] = os.getpid()
        self.in_worker()
        keep_freed_memory()

    def __iter__(self) -> Iterator[Batch]:
        writing: Batch | None = None  # the batch before, which may still be on its way to the disk
        for positions in self._mine():
            batch = self._decode(positions)
            if self.lane is None:
                yield batch
                continue
            if writing is not None and (not isinstance(writing.written, Future) or writing.written.done()):
                yield _wait_for_disk(writing)
                writing = None
            with _interruptible(batch):
                self.lane.run(batch)
            if writing is not None:
                yield _wait_for_disk(writing)
            writing = batch
        if writing is not None:
            if self.lane is not None and writing.error is None:
                with _interruptible(writing):
                    self.lane.finish()
            yield _wait_for_disk(writing)
        self.in_hand.release(_FINISHED)

    def _mine(self) -> Iterator[range]:
        """Yield the positions of the batches that this process decodes.

        Some processes are held up more than others, so each takes the next batch when it has none. Batches that are
        only decoded are large: they must not pile up behind a slow image.
        """
        worker = get_worker_info()
        if worker is None:
            yield from self.positions
            return
        while True:
            with self._taken.get_lock():
                number = self._taken.value
                self._taken.value += 1
            if number >= len(self.positions):
                return
            if self.lane is None:
                # One in the hands of each, and for every second one that waits for its turn.
                while number > self.consumed.value + worker.num_workers * 3 // 2:
                    time.sleep(_POLL_FOR_CONSUMER_SECONDS)
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


def _wait_for_disk(batch: Batch) -> Batch:
    """Put what was written, or the error, in place of the future, which cannot be handed over."""
    writing, batch.written = batch.written, None
    if isinstance(writing, Future):
        with _interruptible(batch):
            batch.written = writing.result()
    return batch


@contextlib.contextmanager
def _interruptible(batch: Batch) -> Iterator[None]:
    """Let the alarm's signal end this process, as it may while an image is in hand: `_Processes.end` sends it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        yield
    except HookxError as error:  # Kept: a DataLoader words what a worker raises in its own way.
        batch.error = error
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
