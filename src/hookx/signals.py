"""Defer SIGINT, SIGTERM and SIGALRM while child processes start."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Handle these signals only at the end of the `with` block.

    An exception between a fork and the line that records the child would leave a process that nobody ends. And Ctrl-C
    reaches every process of the terminal: a fresh child that still had its parent's handler would print a traceback.

    Example:
        >>> before = signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
        >>> with held_back():
        ...     signal.raise_signal(signal.SIGINT)
        ...     print("whole")
        whole
        interrupted
        >>> _ = signal.signal(signal.SIGINT, before)
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only.
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for sent in received:
            signal.raise_signal(sent)
