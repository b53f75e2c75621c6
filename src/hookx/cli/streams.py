"""Results on standard output, bars and notes on standard error, and the signals that stop a command.

The only file that imports tqdm.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import logging
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any, TextIO, TypeVarTuple

from hookx.errors import Interrupted
from hookx.options import JsonOptions, ReportOptions
from hookx.signals import STOPPING

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
    """Print data a piece at a time, as long as somebody takes it."""
    for piece in pieces:
        sys.stdout.buffer.write(piece)
        if _output_error() is not None:
            break


class _Descriptor(io.FileIO):
    """A standard stream of which the first error is kept, and then all that is written goes nowhere.

    What a command does is in its files: it must not end half-way because a terminal closes or a log's disk is full.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        while self.error is None:
            try:
                if (count := super().write(data)) is not None:
                    return count
                select.select([], [self], [])  # Somebody made the stream one that does not wait.
            except OSError as error:
                self.error = error
        return len(memoryview(data).cast("B"))


def keep_streams() -> None:
    """Make sure that this process has standard streams, and that writing to them raises nothing.

    One that is closed is opened on nothing, or the next file that is opened would be taken for it.
    """
    for number in range(3):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = _kept(1, sys.stdout, "backslashreplace"), _kept(2, sys.stderr, "backslashreplace")


def _kept(number: int, before: TextIO | None, errors: str) -> TextIO:
    if before is not None:
        before.flush()
        errors = errors if before.errors in (None, "strict") else before.errors
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number, "w", closefd=False)),
        encoding=getattr(before, "encoding", "utf-8"),
        errors=errors,
        line_buffering=number == 2 or os.isatty(number),
    )


def _output_error() -> OSError | None:
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "error", None)


def flush_output(code: Any = 0) -> Any:
    """Write what is still buffered, and return the code to exit with: not 0 if something could not be written.

    A reader that closes the pipe early does not count as an error.
    """
    sys.stdout.flush()
    error = _output_error()
    if error is None or error.errno == errno.EPIPE:
        return code
    print(f"error: cannot write to standard output: {error.strerror}", file=sys.stderr)
    return code or 1


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

    tqdm.monitor_interval = 0  # No thread that watches the bar: where memory lacks, waiting for it to start has no end.
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
    """Handle a signal of `STOPPING` by stopping the command; a second one ends the process at once."""
    for any_of_them in STOPPING:
        if signal.getsignal(any_of_them) != signal.SIG_IGN:
            signal.signal(any_of_them, signal.SIG_DFL)
    _signals.append(number)
    raise Interrupted(number)


def raise_again() -> None:
    """Raise an `Interrupted` that Python swallowed: in a destructor, an import, or a fork's callback."""
    if _signals:
        raise Interrupted(_signals[0])
