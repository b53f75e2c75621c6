"""The signals that stop a command: which they are, how to defer them, and what children do about them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

# Ctrl-C; what `kill` and service managers send; a terminal that closes; the warning of a scheduler. Windows lacks some.
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the thread that forked it ends


def begin_child(parent: int) -> None:
    """Make this process, a fresh child of `parent`, one that ends with it and does not act on its own.

    Terminals and schedulers send a signal to every process; the parent alone decides, and then ends its children.
    SIGTERM is also how one process is ended, so it keeps its meaning.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # The parent was killed already; nobody will ever ask for anything.
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Handle these signals only at the end of the `with` block.

    An exception between a fork and the line that records the child would leave a process that nobody ends. And Ctrl-C
    reaches every process of the terminal: a fresh child that still had its parent's handler would print a traceback.

    Example:
        >>> before = signal.signal(signal.SIGINT, lambda *_: print("interrupted"))
        >>> with defer_signals():
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
        for number in (*STOPPING, signal.SIGALRM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for sent in received:
            signal.raise_signal(sent)
