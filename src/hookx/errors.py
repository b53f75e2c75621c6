"""The exceptions that hookx raises: what is wrong, which value, what to do next.

    HookxError                 exit code 1: a mistake that the user can fix
    ├── UsageError             exit code 2: a flag, a configuration file or an argument is malformed
    │   └── AddressError       not a layer address
    ├── LayerError             the model has no such layer, or it cannot be captured
    │   └── NotStoredError     a run does not hold this layer or this image; also a KeyError
    ├── NotCapturedError       a Capture does not hold this activation; also a KeyError
    ├── ModelError             a model cannot be built, or its weights are unavailable or do not fit
    ├── ImageError             the images cannot be listed or read
    ├── CaptureError           a forward pass fails, or differs from what the probe saw
    ├── DeviceError            a GPU fails in the middle of a run
    └── StoreError             an output directory is damaged, belongs to another run, or cannot be written
        ├── OtherRunError      an output directory holds a run of another plan
        ├── UnreadableError    one file cannot be read now, and may be whole
        └── ShardError         one shard was read, and is damaged

A signal that asks the process to stop raises `Interrupted`, a BaseException. Any other exception is a bug.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from typing import Protocol, Self

THEN_RESUME = "finished shards are kept; run the same command again to resume"


class HookxError(Exception):
    """A mistake that the user can fix: the problem, and below it, indented, what to do next."""

    exit_code = 1

    def __init__(self, problem: str, *next_steps: str) -> None:
        super().__init__("\n  ".join([problem, *next_steps]))


class UsageError(HookxError):
    """A flag, a configuration file or an argument is malformed."""

    exit_code = 2


class AddressError(UsageError):
    """A text is not a layer address."""


class LayerError(HookxError):
    """A model has no such layer, or the layer cannot be captured."""


class NotStoredError(LayerError, KeyError):
    """A run does not hold a layer or an image.

    Example:
        >>> print(NotStoredError.of("features/", "avgpol", ["conv1", "avgpool"]))
        features/ does not hold 'avgpol'; closest: avgpool
    """

    __str__ = Exception.__str__  # KeyError's is the repr of its argument.

    @classmethod
    def of(cls, holder: str, name: str, known: Iterable[str], *next_steps: str) -> Self:
        similar = closest(name, known)
        return cls(f"{holder} does not hold '{name}'" + (f"; closest: {similar}" if similar else ""), *next_steps)


class NotCapturedError(HookxError, KeyError):
    """A `Capture` does not hold an activation."""

    __str__ = Exception.__str__


class ModelError(HookxError):
    """A model cannot be built, or its weights are unavailable or do not fit."""


class ImageError(HookxError):
    """The images cannot be listed or read."""


class CaptureError(HookxError):
    """A forward pass fails, or differs from what the probe saw; nothing wrong is stored."""


class DeviceError(HookxError):
    """A GPU fails in the middle of a run; the process can compute nothing more on it."""


class StoreError(HookxError):
    """An output directory is damaged, belongs to another run, or cannot be written."""


class OtherRunError(StoreError):
    """An output directory holds a run of another plan."""


class Named(Protocol):
    """A file, wherever it lies."""

    @property
    def name(self) -> str: ...


class UnreadableError(StoreError):
    """A file of a run cannot be read now, whatever it holds; `file` and `what` hold which and why."""

    def __init__(self, file: Named, reason: str, next_step: str = "") -> None:
        step = next_step or "it may well be whole: fix that, then run the same command again"
        super().__init__(f"cannot read {file}: {reason}", step)
        self.file, self.what = file, f"cannot be read: {reason}"


class ShardError(StoreError):
    """A shard was read and is damaged, or is not the shard that its name says; `file` and `what` hold which and why."""

    def __init__(self, file: Named, what: str) -> None:
        super().__init__(f"{file} {what}", "remove it, and run the same command again")
        self.file, self.what = file, what


class Interrupted(BaseException):
    """A signal asked the process to stop. Not an `Exception`: no handler on the way out may swallow it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number  # As shells report it: 130 for SIGINT, 143 for SIGTERM.


_MEND_LIBRARY = "try again if the disk or the memory was short of something; otherwise install it again"
_MEND_IT = "mend that, then run the same command again"
_ADVICE = {
    errno.EMFILE: "let this process open more files: ulimit -n 4096",
    errno.ENFILE: "the system has too many files open: close other programs",
    errno.EAGAIN: "more processes or threads are not allowed: raise the limit (ulimit -u), or try fewer --workers",
    errno.ENOMEM: "the machine has too little memory: try fewer --workers or a smaller --batch-size, or free some",
    errno.ENOSPC: "make room there; if it is /dev/shm, make that larger (in Docker: --shm-size 2g)",
    errno.EDQUOT: "your quota there is used up: make room, or raise it",
    errno.EROFS: "the file system is mounted read-only: mount it to be written, or choose another place",
    errno.ESTALE: "the network file system has lost the file: mount it again, then run the same command again",
    errno.EIO: "the disk or the network failed: see what dmesg says, then run the same command again",
}
# What Python, torch and the C library say in errors without a number.
_WORDS = {
    "start new thread": errno.EAGAIN,
    "Resource temporarily unavailable": errno.EAGAIN,
    "Too many open files": errno.EMFILE,
    "ancdata": errno.EMFILE,
    "allocate memory": errno.ENOMEM,
    "bad_alloc": errno.ENOMEM,
    "unable to mmap": errno.ENOMEM,
    "failed to map segment": errno.ENOMEM,
    "No space left on device": errno.ENOSPC,
    "shared memory": errno.ENOSPC,
    "Input/output error": errno.EIO,
    "Stale file handle": errno.ESTALE,
    "Read-only file system": errno.EROFS,
    "Permission denied": errno.EACCES,
}


def system_failure(error: BaseException, what: str = "") -> HookxError | None:
    """Put what the system refused into an error that says what to do; None if the error is not the system's.

    Args:
        what: what was not possible, as in "cannot start a worker".

    Example:
        >>> print(system_failure(OSError(errno.EMFILE, "Too many open files", "a.jpg")))
        Too many open files: 'a.jpg'
          let this process open more files: ulimit -n 4096
        >>> print(system_failure(RuntimeError("shapes differ")))
        None
    """
    if isinstance(error, OSError) and error.errno:
        reason = os.strerror(error.errno) + (f": '{os.fsdecode(error.filename)}'" if error.filename else "")
        return HookxError(f"{what}: {reason}" if what else reason, _ADVICE.get(error.errno, _MEND_IT))
    if isinstance(error, OSError | RuntimeError | ImportError | MemoryError):
        for words, number in _WORDS.items():
            if words in str(error):
                return HookxError(f"{os.strerror(number)}: {one_line(error)}", _ADVICE.get(number, _MEND_IT))
    if isinstance(error, ImportError):
        return HookxError(f"cannot import a library: {one_line(error)}", _MEND_LIBRARY)
    return HookxError("out of memory", _ADVICE[errno.ENOMEM]) if isinstance(error, MemoryError) else None


def closest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Return the most similar names, best first, for an error message."""
    names = list(names)

    def likeness(match: str) -> tuple[float, int]:
        # A longer common prefix breaks ties: for layer1.1.con1, layer1.0.conv1 comes before layer4.1.conv1.
        alike = len(os.path.commonprefix([name, match]))  # noqa: RUF071
        return difflib.SequenceMatcher(None, name, match).ratio(), alike

    matches = sorted(difflib.get_close_matches(name, names, 8 * count, cutoff=0.5), key=likeness, reverse=True)
    return ", ".join((matches or names)[:count])


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
