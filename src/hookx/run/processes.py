"""The worker processes of a run, from their start to their end."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator

from torch.utils.data import DataLoader

from hookx.run.in_hand import FINISHED, NOTHING
from hookx.run.lane import Batch
from hookx.run.worker import Worker
from hookx.signals import defer_signals

_POLL_SECONDS, _WAIT_FOR_EXIT_SECONDS = 0.2, 20
# What this process says when it cannot take a message: it has too many files open, or too little memory.
_LOST = re.compile("open files|ancdata|shared memory|mmap|allocate memory|Errno", re.IGNORECASE)


class Processes:
    """The worker processes of a DataLoader, from their start to their end. Without workers there are none."""

    def __init__(self, worker: Worker, *, workers: int) -> None:
        self._in_hand = worker.in_hand
        self._early: dict[range, Batch] = {}  # received before its turn
        self.problem: Exception | None = None  # why a message could not be taken
        others = set(multiprocessing.active_children())
        with _any_number_of_workers():
            loader = DataLoader(
                worker,
                batch_size=None,  # The dataset's items are batches already: they follow the shards.
                num_workers=workers,
                worker_init_fn=worker.start,
                in_order=False,  # `receive` puts the batches in order.
                timeout=_POLL_SECONDS if workers else 0,
                # Forked workers share the list of images and start in milliseconds; they never touch a GPU.
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            )
        self._batches: Iterator[Batch] | None = None
        self._processes: list[multiprocessing.process.BaseProcess] = []
        try:
            with defer_signals(), _keep_child_signals(), _nothing_inherited_is_collected(), _any_number_of_workers():
                try:
                    self._batches = iter(loader)
                except OSError as error:
                    _forget_frames(error)
                    raise
                finally:  # All of them, or those before the one that the system refused.
                    now = multiprocessing.active_children()
                    self._processes = [process for process in now if process not in others]
        except BaseException:
            self.end()
            raise

    def receive(self, positions: range) -> Batch | None:
        """Return the batch at these positions, or None if it will not come: see `crashes` and `problem`."""
        assert self._batches is not None
        while positions not in self._early:
            try:
                batch = next(self._batches)
                self._early[batch.positions] = batch
            except Exception as error:
                if isinstance(error, TimeoutError) and not error.errno:
                    raise  # An alarm of the caller's.
                if str(error).startswith("DataLoader timed out"):
                    continue  # Nothing is ready and none has crashed: the loader looks every _POLL_SECONDS.
                if self._processes and self._has_crashed_by_now():
                    return None
                if not self._processes or not _LOST.search(str(error)):
                    raise
                self.problem = error  # The message is gone, and with it a batch.
                return None
        return self._early.pop(positions)

    def crashes(self) -> list[tuple[int, int]]:
        """Return the exit code of every process that ended before its work did, and the position it had in hand."""
        return list(self._crashed())

    def _has_crashed_by_now(self) -> bool:
        # A process that crashes leaves unreadable messages behind, sometimes a while before it has exited.
        deadline = time.monotonic() + _WAIT_FOR_EXIT_SECONDS
        while (seconds_left := deadline - time.monotonic()) > 0:
            # List the running before looking for the crashed, or a crash in between would not end the wait.
            alive = [process.sentinel for process in self._processes if process.exitcode is None]
            if any(self._crashed()):
                return True
            multiprocessing.connection.wait(alive, timeout=seconds_left)
        return False

    def _crashed(self) -> Iterator[tuple[int, int]]:
        """Yield the exit code of every process that ended before its work did, and the position it had in hand."""
        for process in self._processes:
            position = self._in_hand.of(process.pid)
            # One that had finished may have taken its last message with it.
            if process.exitcode is not None and (position != FINISHED or process.exitcode != 0):
                yield process.exitcode, max(position, NOTHING)

    def end(self, wait_seconds: float = 1) -> bool:
        """End what still runs, without waiting for a slow image; return whether all of it ended in time."""
        for process in self._processes:
            if process.is_alive() and process.pid:
                _alarm(process.pid)
        if self._processes and self._batches is not None:
            # What the loader does when it is deleted. Here it may be kept alive, by the traceback of an exception.
            self._batches._shutdown_workers()  # type: ignore[attr-defined]
        for process in self._processes:
            process.kill()
            process.join(timeout=wait_seconds)  # What is stuck in the kernel cannot be killed.
        return not any(process.is_alive() for process in self._processes)


def _alarm(process_id: int) -> None:
    """Send a process the alarm's signal, which its main thread blocks while it may hold a lock that others need.

    A thread that was started while the signal was let in would take it for the whole process at any moment.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "tgkill"):  # Linux, where the main thread has the number of its process.
        libc.tgkill(process_id, process_id, signal.SIGALRM)
    else:
        os.kill(process_id, signal.SIGALRM)


@contextlib.contextmanager
def _any_number_of_workers() -> Iterator[None]:
    """Keep the loader from warning of more workers than cores: the user chose that number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _forget_frames(error: OSError) -> None:
    """Free what an error keeps alive: a loader that was not made whole, which complains of that when it is deleted."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        error.with_traceback(None)
        gc.collect()
    finally:
        sys.unraisablehook = before


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
