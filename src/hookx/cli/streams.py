"""Results on standard output, bars and notes on standard error, and the signals that stop a command.

The only file that imports tqdm.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, TypeVarTuple

from hookx.errors import HookxError, Interrupted
from hookx.options import JsonOptions, ReportOptions

Ts = TypeVarTuple("Ts")

_signals: list[int] = []  # the one that asked this process to stop, if one did


def report(
    form: JsonOptions,
    describe: Callable[[*Ts], Any],
    show: Callable[[*Ts], None],
    *result: *Ts,
    files: Sequence[str] = (),
) -> None:
    """Print a result in the form that was chosen: as one JSON document, as the paths of its files, or for a reader."""
    if form.json:
        print(json.dumps(describe(*result), indent=2))
    elif isinstance(form, ReportOptions) and form.quiet:
        print_lines(files)
    else:
        show(*result)


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, made safe for a terminal."""
    for line in lines:
        print(in_one_line(line))


def print_bytes(pieces: Iterable[bytes | memoryview]) -> None:
    """Print data a piece at a time."""
    try:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
    except BrokenPipeError:
        raise  # The reader has seen enough; Typer ends the command silently.
    except OSError as error:
        raise _abandon_output(error) from None


def flush_output() -> None:
    """Write what is still buffered. Python does so as it exits, when it is too late to report an error."""
    try:
        sys.stdout.flush()
    except OSError as error:
        not_written = _abandon_output(error)
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        raise not_written from None


def _abandon_output(error: OSError) -> HookxError:
    """Discard what is still buffered, which Python would try to write again, and return the error to raise."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return HookxError(f"cannot write to standard output: {error.strerror}")


def printable(text: str) -> str:
    r"""Escape what a terminal would act on: control characters, and bytes that are not UTF-8.

    A line break stays if an indented line follows, as in hookx's own errors, so no name can begin a line.

    Example:
        >>> print(printable("no layer matches '\x1b[2J\nerror: x'\n  list them all"))
        no layer matches '\x1b[2J\nerror: x'
          list them all
    """
    lines = re.split(r"\n(?=  )", text)
    return "\n".join("".join(char if char.isprintable() else ascii(char)[1:-1] for char in line) for line in lines)


def in_one_line(text: str) -> str:
    """Escape what a terminal would act on, line breaks included."""
    return printable(text).replace("\n", "\\n")


class _Talk(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        mark = "warning: " if record.levelno >= logging.WARNING else ""
        tqdm.write(f"{mark}{printable(record.getMessage())}", file=sys.stderr)  # above the bar, if there is one


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
