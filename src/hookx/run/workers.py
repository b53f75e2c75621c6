"""A list of images -> batches, by worker processes that decode ahead of the main process, or run a lane themselves.

A file can make a decoder hang, or crash its process. That costs the one image: a worker notes which image it has in
hand. If the worker crashes, that image is a failure, and all workers are started again without it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader

from hookx.errors import ImageError
from hookx.images.decoding import known_formats
from hookx.images.listing import ImageList
from hookx.plan import Preprocessing
from hookx.run.lane import Batch, Lane
from hookx.run.worker import CRASHES, FINISHED, NOTHING, InHand, Worker
from hookx.signals import defer_signals

DECODE_TIMEOUT_SECONDS = 60.0
_CPU = torch.device("cpu")
_POLL_SECONDS = 0.2
_WAIT_FOR_EXIT_SECONDS, _WAIT_FOR_DISK_SECONDS = 20, 60


def batches(
    images: ImageList,
    positions: Sequence[range],
    preprocessing: Preprocessing,
    *,
    workers: int,
    decode_timeout_seconds: float = DECODE_TIMEOUT_SECONDS,
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
        in_worker: runs once in each worker.
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
        rest = positions[first:]
        worker = Worker(images, rest, preprocessing, transform, lane, reasons, in_hand, in_worker)
        return _Processes(worker, workers=workers, pin_memory=pin_memory)

    known_formats()  # Imports the decoders: not in every worker, and not in the time of its first image.
    processes = start(0)

    def in_order() -> Generator[Batch]:
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
                batch.decode_rest(preprocessing, device)
                batch.look_up_keys(images)
                yield batch
        finally:
            processes.end()

    return in_order()


class _Processes:
    """The worker processes of a DataLoader, from their start to their end. Without workers there are none."""

    def __init__(self, worker: Worker, *, workers: int, pin_memory: bool) -> None:
        self._in_hand = worker.in_hand
        self._early: dict[range, Batch] = {}  # received before its turn
        others = set(multiprocessing.active_children())
        loader = DataLoader(
            worker,
            batch_size=None,  # The dataset's items are batches already: they follow the shards.
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=worker.start,
            in_order=worker.lane is None,
            timeout=_POLL_SECONDS if workers else 0,
            # Forked workers share the list of images and start in milliseconds; they never touch a GPU.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        self._processes: list[multiprocessing.process.BaseProcess] = []
        try:
            with defer_signals(), _keep_child_signals():
                self._batches: Iterator[Batch] = iter(loader)
                self._processes = [process for process in multiprocessing.active_children() if process not in others]
        except BaseException:
            self.end()
            raise

    def receive(self, positions: range) -> Batch | None:
        """Return the batch at these positions, or None if a worker has crashed or was killed."""
        while positions not in self._early:
            if (batch := self._receive_any()) is None:
                return None
            self._early[batch.positions] = batch
        return self._early.pop(positions)

    def _receive_any(self) -> Batch | None:
        while True:
            try:
                return next(self._batches)
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

    def fatal_images(self) -> dict[int, str]:
        """Return the positions of the images that crashed their workers, each with the reason.

        Raises:
            ImageError: a process was killed from outside, or had no image in hand.
        """
        fatal = {}
        for exit_code, position in self._crashed():
            how = signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"
            if position == NOTHING or not (exit_code >= 0 or -exit_code in (signal.SIGALRM, *CRASHES)):
                raise _out_of_memory(f"a worker exited unexpectedly: {how}")
            if exit_code == -signal.SIGALRM:
                fatal[position] = f"took longer than {self._in_hand.timeout_seconds:g} s to decode"
            else:
                fatal[position] = f"the decoder crashed ({how})"
        return fatal

    def _crashed(self) -> Iterator[tuple[int, int]]:
        """Yield the exit code of every process that ended before its work did, and the position it had in hand."""
        for process in self._processes:
            if process.exitcode is not None and (position := self._in_hand.of(process.pid)) != FINISHED:
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
