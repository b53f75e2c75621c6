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
        ├── UnreadableError    one file cannot be read now, and may be whole
        └── ShardError         one shard was read, and is damaged

A signal that asks the process to stop raises `Interrupted`, a BaseException. Any other exception is a bug.
"""

from __future__ import annotations

import difflib
import os.path
from collections.abc import Iterable
from pathlib import Path
from typing import Self


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


class UnreadableError(StoreError):
    """A file of a run cannot be read now, whatever it holds; `file` and `what` hold which and why."""

    def __init__(self, file: Path, reason: str, next_step: str = "") -> None:
        step = next_step or "it may well be whole: fix that, then run the same command again"
        super().__init__(f"cannot read {file}: {reason}", step)
        self.file, self.what = file, f"cannot be read: {reason}"


class ShardError(StoreError):
    """A shard was read and is damaged, or is not the shard that its name says; `file` and `what` hold which and why."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(f"{file} {what}", "remove it, and run the same command again")
        self.file, self.what = file, what


class Interrupted(BaseException):
    """A signal asked the process to stop. Not an `Exception`: no handler on the way out may swallow it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number  # As shells report it: 130 for SIGINT, 143 for SIGTERM.


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
