"""Which files a test opens."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_opened: list[str] | None = None


def _note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str | os.PathLike):
        _opened.append(Path(arguments[0]).name)


sys.addaudithook(_note_opened)  # It cannot be removed, so there is one for all tests.


@contextmanager
def files_opened() -> Iterator[list[str]]:
    """Yield the names of the files that Python opens in the block."""
    global _opened
    names: list[str] = []
    _opened = names
    try:
        yield names
    finally:
        _opened = None


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the files of a folder hold, by name."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}
