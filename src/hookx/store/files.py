"""Files that are whole or absent: written aside, flushed, then renamed into place."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from hookx.errors import StoreError

ASIDE = ".aside"  # The suffix of a file that is still being written.


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file so that it is whole or absent: aside, flushed to the disk, then renamed into place."""
    aside = aside_of(path)
    try:
        with told_as_store_error(path):
            aside.unlink(missing_ok=True)
            with open(aside, "xb") as file:  # x: never through a link that somebody put there.
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                put_in_place(file.fileno(), path)
    finally:
        aside.unlink(missing_ok=True)


def aside_of(path: Path) -> Path:
    """Return where a file is written before it is whole; what a killed run left there, the next one removes."""
    return path.with_name(f".{path.name}{ASIDE}")


def put_in_place(descriptor: int, path: Path) -> None:
    """Flush the open file that was written aside to the disk, and give it its name."""
    os.fsync(descriptor)
    os.replace(aside_of(path), path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # The rename itself is only durable once the directory is.
    finally:
        os.close(directory)


@contextlib.contextmanager
def told_as_store_error(path: Path) -> Iterator[None]:
    """Tell a user, where the system refuses to write a file, which and why."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"cannot write {path}: {error.strerror}", "mend that, and run the same command again: it resumes"
        ) from None


def check_is_file(path: Path) -> None:
    """Raise `OSError` for a pipe or a device, which would be read for ever."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
