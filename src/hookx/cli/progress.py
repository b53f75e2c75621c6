"""What a user sees and can do while a command works: bars and talk on standard error, and stopping it.

The only file that imports tqdm.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from hookx.errors import Interrupted

_signals: list[int] = []  # the one that asked this process to stop, if one did


def interrupt(number: int, _frame: FrameType | None) -> None:
    """Handle SIGINT and SIGTERM by stopping the command; the second one ends the process at once."""
    for either in (signal.SIGINT, signal.SIGTERM):
        signal.signal(either, signal.SIG_DFL)
    _signals.append(number)
    raise Interrupted(number)


def raise_again() -> None:
    """Raise an `Interrupted` that Python swallowed: in a destructor, an import, or a fork's callback."""
    if _signals:
        raise Interrupted(_signals[0])


@contextlib.contextmanager
def talk_on_stderr(quiet: bool = False) -> Iterator[None]:
    """Print hookx's log on standard error: notes as they are, warnings marked; `quiet` leaves only the warnings."""
    handler, log = _Talk(), logging.getLogger("hookx")
    level_before = log.level
    log.addHandler(handler)
    log.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level_before)


class _Talk(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        from hookx.cli.streams import printable

        mark = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{mark}{printable(record.getMessage())}", file=sys.stderr)  # above the bar, if there is one


@contextlib.contextmanager
def show_progress(
    unit: str, total: int | None = None, *, done: int = 0, quiet: bool = False, leave: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a bar if standard error is a terminal; yields what advances it, and stops a command that was asked to."""
    from tqdm import tqdm

    with tqdm(
        total=total,
        initial=done,
        unit=f" {unit}",
        unit_scale=(total or 0) >= 100_000,
        file=sys.stderr,
        disable=True if quiet else None,  # None: unless it is a terminal
        dynamic_ncols=True,
        leave=leave,
    ) as bar:

        def advance(count: int) -> None:
            bar.update(count)
            raise_again()

        yield advance
