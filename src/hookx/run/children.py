"""How a process that decodes begins, and how it ended, in words."""

from __future__ import annotations

import logging
import signal

from hookx.signals import begin_child

CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
NO_MEMORY, NO_MESSAGE = 112, 113  # exit codes: too little memory; a message to the parent could not be sent


def begin_decoding(parent: int) -> None:
    """Make this process, a fresh child of `parent`, one that leaves every report to it."""
    begin_child(parent)
    # The parent reports a crash; torch's handlers would print lines of their own, and so would Pillow's log.
    for number in (signal.SIGALRM, *CRASHES):
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
    if exit_code == NO_MESSAGE:
        return "it could not hand over its batch"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return signal.Signals(-exit_code).name
    except ValueError:  # one of those for real time
        return f"signal {-exit_code}"
