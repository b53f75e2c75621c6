"""What a process that decodes does first, and with which codes it ends."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when the thread that forked it ends
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
NO_MEMORY, NO_MESSAGE = 112, 113  # exit codes: too little memory; a message to the parent could not be sent


def begin_child(parent: int) -> None:
    """Make this process, a fresh child of `parent`, one that ends with it and leaves every report to it."""
    # The loader's own watch over the parent begins later, and takes whoever is the parent by then for it.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)  # The parent was killed already; nobody will ever ask for anything.
    # The terminal sends Ctrl-C to every process; the parent alone decides, and then ends its children.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent reports a crash; torch's handlers would print lines of their own, and so would Pillow's log.
    for number in (signal.SIGTERM, signal.SIGALRM, *CRASHES):
        signal.signal(number, signal.SIG_DFL)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def how_it_ended(exit_code: int) -> str:
    """Put a process's exit code into words.

    Example:
        >>> how_it_ended(-11), how_it_ended(7)
        ('SIGSEGV', 'exit code 7')
    """
    if exit_code == NO_MEMORY:
        return "out of memory"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:  # one of those for real time
        return f"signal {-exit_code}"
