"""Every error that hookx raises on purpose: what is wrong, which value, what to do next."""

from __future__ import annotations

import difflib
import os.path
from collections.abc import Iterable
from pathlib import Path


class HookxError(Exception):
    """A mistake that the user can mend; anything else that escapes hookx is a bug.

    Example:
        >>> print(HookxError("no layer matches 'conv9'", "list them all: hookx list-layers resnet18"))
        no layer matches 'conv9'
          list them all: hookx list-layers resnet18
    """

    exit_code = 1

    def __init__(self, problem: str, *next_steps: str) -> None:
        super().__init__("\n  ".join([problem, *next_steps]))


class UsageError(HookxError):
    """The command line, a configuration file or an argument is malformed."""

    exit_code = 2


class AddressError(UsageError):
    """A text is not a layer address."""


class LayerError(HookxError):
    """An address is well formed, but this model has no such activation."""


class ModelError(HookxError):
    """A model cannot be built, or its weights cannot be had or do not fit."""


class ImageError(HookxError):
    """The list of images cannot be made."""


class CaptureError(HookxError):
    """A forward pass did not do what the probe saw; nothing wrong is stored."""


class StoreError(HookxError):
    """An output directory is damaged, belongs to another run, or cannot be written."""


class ShardError(StoreError):
    """One shard is damaged, or is not the shard that its name says; `file` and `what` tell which and why."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(f"{file} {what}", "remove it, and run the same command again")
        self.file, self.what = file, what


class Interrupted(BaseException):
    """A signal asked the process to stop. Not an `Exception`, so that no handler on the way swallows it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        # The shell's convention: 130 for SIGINT, 143 for SIGTERM.
        self.exit_code = 128 + signal_number


class NotStoredError(HookxError, KeyError):
    """A run is asked for an address or an image that it does not hold."""

    __str__ = Exception.__str__


class NotCapturedError(HookxError, KeyError):
    """A capture is asked for an activation that it does not hold."""

    __str__ = Exception.__str__


def closest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Name the most similar names, best first, for an error message.

    Example:
        >>> closest("layer1.1.con1", ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer4.1.conv1"], 2)
        'layer1.1.conv1, layer1.0.conv1'
    """
    names = list(names)
    matches = difflib.get_close_matches(name, names, n=8 * count, cutoff=0.5)

    def likeness(match: str) -> tuple[float, int]:
        # Among equals the one that begins alike: for layer1.1.con1, layer1.0.conv1 before layer4.1.conv1.
        alike = len(os.path.commonprefix([name, match]))  # noqa: RUF071
        return difflib.SequenceMatcher(None, name, match).ratio(), alike

    matches.sort(key=likeness, reverse=True)
    return ", ".join((matches or names)[:count])


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
