"""Separate the faults of a file from what the system cannot do right now, and retry the latter.

A disk that drops a request, a mount that went away, a process with too many open files: none of it says anything about
the image. It is tried again for a while; after that the run stops, and the same command goes on where it stopped.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable

_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 0.05, 2.0

_OF_THE_NAME = frozenset({errno.ELOOP, errno.ENAMETOOLONG})
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EINVAL})  # EINVAL: a name that the file system cannot hold
_REFUSED = frozenset({errno.EACCES, errno.EPERM})


class UnavailableError(Exception):
    """The system cannot read a file now, for a reason that lies outside the file; `cause` is the system's error."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(reason_of(cause))
        self.cause = cause


class Retries:
    """Time to try something again: pauses that grow, until `seconds` have passed since the first.

    Example:
        >>> retries = Retries(1.0, pause=lambda seconds: print(f"{seconds:.2f} s"))
        >>> retries.wait(), Retries(0).wait()
        0.05 s
        (True, False)
    """

    def __init__(self, seconds: float, pause: Callable[[float], object] = time.sleep) -> None:
        self._seconds, self._pause = seconds, pause
        self._until: float | None = None
        self._next_seconds = _FIRST_PAUSE_SECONDS

    def wait(self) -> bool:
        """Pause, and return True; or return False at once if the time is over."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._seconds
        if now >= self._until:
            return False
        self._pause(min(self._next_seconds, self._until - now))
        self._next_seconds = min(2 * self._next_seconds, _MAX_PAUSE_SECONDS)
        return True


def reason_of(error: OSError) -> str:
    """Return the system's words for an error, without the path."""
    return error.strerror or (os.strerror(error.errno) if error.errno else type(error).__name__)


def is_of_the_system(error: OSError) -> bool:
    """Return whether a system call failed, and not because of the numbers that corrupt bytes made a decoder ask for."""
    return error.errno not in (None, errno.EINVAL, errno.EOVERFLOW)


def is_of_the_file(error: OSError, file: str | bytes, *, was_seen: bool) -> bool:
    """Return whether a file causes an error of looking at it or opening it: by its name, its kind or its mode.

    Args:
        was_seen: the file has existed during this run, so that its absence is news, and may pass.
    """
    if error.errno in _OF_THE_NAME:
        return True
    try:
        status = os.stat(file)
    except OSError:
        return error.errno in _ABSENT and (not was_seen or os.path.islink(file))
    return not stat.S_ISREG(status.st_mode) or (error.errno in _REFUSED and _forbids_reading(status))


def _forbids_reading(status: os.stat_result) -> bool:
    """Return whether the mode of a file, and not of a folder above it, keeps this process from reading it."""
    if os.geteuid() == status.st_uid:
        bit = stat.S_IRUSR
    elif status.st_gid in {os.getegid(), *os.getgroups()}:
        bit = stat.S_IRGRP
    else:
        bit = stat.S_IROTH
    return not status.st_mode & bit
