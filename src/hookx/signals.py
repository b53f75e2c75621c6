"""What Ctrl-C, SIGTERM and an alarm do while processes are being started: nothing yet."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Put off what these signals do until the end of the `with` block.

    An exception between a fork and the note of it would leave a process that nobody ends. And a terminal sends Ctrl-C
    to every process: one that was just forked would tell of it in a traceback, if it still did what its parent does.

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
        yield  # No other thread runs a handler.
        return
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _frame: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for sent in held:
            signal.raise_signal(sent)
