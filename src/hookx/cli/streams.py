"""Standard output as a stream: text made safe, data, JSON, and what happens if it cannot be written."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from hookx.errors import HookxError


def print_json(document: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(document, indent=2))


def print_lines(lines: Sequence[str]) -> None:
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


def _abandon_output(error: OSError) -> HookxError:
    """Discard what is still buffered, which Python would try to write again, and return the error to raise."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return HookxError(f"cannot write to standard output: {error.strerror}")
