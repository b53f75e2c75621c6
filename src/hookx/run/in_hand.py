"""Which image each process is decoding, for the process that has to know whom to ask if one of them ends."""

from __future__ import annotations

import contextlib
import mmap
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

NOTHING, FINISHED = -1, -2  # in hand, in place of a position


def shared_numbers(count: int) -> Any:  # an array of 64 bits each
    """Return zeros that this process shares with those that it starts."""
    if sys.platform == "linux":  # Not a file in a /dev/shm that may be small or full.
        return memoryview(mmap.mmap(-1, 8 * count)).cast("q")
    return multiprocessing.RawArray("q", count)


class InHand:
    """Which image each process is decoding, in memory that it shares with the process that started it.

    The system ends a process whose image takes longer than `timeout_seconds` (0: any time). The alarm's signal works
    where a decoder written in C keeps Python from running, and where the main process is gone. It is blocked while no
    image is in hand, because the process could hold a lock that others need.
    """

    def __init__(self, processes: int, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self._numbers = shared_numbers(2 * processes + 1)  # of each process: its number, and the position in hand
        self._row: int | None = None  # that of this process; None in one that decodes unprotected

    def begin(self, row: int) -> None:
        """Take a row for this process, which has nothing in hand."""
        self._row = row
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        self._set(NOTHING)
        self._numbers[2 * row] = os.getpid()

    def of(self, process_id: int | None) -> int:
        """Return the position that a process has in hand, `NOTHING`, or `FINISHED`."""
        numbers = list(self._numbers)
        return dict(zip(numbers[::2], numbers[1::2], strict=False)).get(process_id, NOTHING)

    @contextlib.contextmanager
    def holding(self, position: int) -> Iterator[None]:
        """Have an image in hand; it stays there if the block ends this process, or lacks memory."""
        if self._row is None:
            yield
            return
        self._set(position)
        signal.setitimer(signal.ITIMER_REAL, self.timeout_seconds)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        try:
            yield
        except MemoryError:
            raise
        except Exception:
            self._release()
            raise
        self._release()

    def finish(self) -> None:
        """Mark all work of this process as done, so that its exit does not count as a crash."""
        if self._row is not None:
            self._set(FINISHED)

    def pause(self, seconds: float) -> None:
        """Sleep in a way that the alarm's signal can end, with no image in hand."""
        with interruptible():
            time.sleep(seconds)

    def _release(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        self._set(NOTHING)

    def _set(self, position: int) -> None:
        assert self._row is not None
        self._numbers[2 * self._row + 1] = position


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let the alarm's signal end this process, as it may while an image is in hand."""
    blocked_before = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked_before)
