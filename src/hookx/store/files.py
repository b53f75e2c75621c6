"""Files and folders that are whole or absent: written aside, flushed to the disk, then renamed into place."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from hookx.errors import StoreError

ASIDE = ".aside"  # The suffix of what is still being written.


def write_whole(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file so that it is whole or absent, in place of any file of that name."""
    aside = aside_of(path)
    try:
        with report_write_errors(path, resumable=True):
            aside.unlink(missing_ok=True)
            with open(aside, "xb") as file:  # x: never through a link that someone put there.
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                put_in_place(file.fileno(), path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def made_whole(path: Path) -> Iterator[Path]:
    """Yield where to make a file or a folder, by any library, so that it is whole or absent.

    The path lies in a folder aside, which this process alone holds. What else is made in that folder goes with it, and
    `path` itself comes last. What a killed process leaves there, the next process that makes `path` removes. Raises
    `StoreError` if `path` exists, another process is making it, or it cannot be written.
    """
    folder = aside_of(path)
    with report_write_errors(path), _held_folder(folder, path):
        yield folder / path.name
        for made in (folder, *folder.rglob("*")):
            flush(made)
        check_absent(path)
        for made in sorted(folder.iterdir(), key=lambda made: made.name == path.name):
            made.rename(path.with_name(made.name))
        flush(path.parent)


def check_absent(path: Path) -> None:
    """Raise `StoreError` if anything has this name, even a broken link."""
    if os.path.lexists(path):
        raise StoreError(f"{path} already exists", "remove it, or choose another name")


@contextlib.contextmanager
def _held_folder(folder: Path, path: Path) -> Iterator[None]:
    """Make a folder and hold it, empty, while the `with` block lasts; the kernel releases it with the process."""
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = os.path.samestat(os.fstat(descriptor), os.stat(folder))  # and was not removed in between
        except (BlockingIOError, FileNotFoundError):
            is_held = False
        if not is_held:
            raise StoreError(f"another hookx process is writing {path}", "wait for it, or choose another name")
        try:
            for left_over in folder.iterdir():
                shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
            yield
        finally:
            shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def aside_of(path: Path) -> Path:
    """Return where a file is written before it is whole; what a killed run leaves there, the next run removes."""
    return path.with_name(f".{path.name}{ASIDE}")


def put_in_place(descriptor: int, path: Path) -> None:
    """Flush the open file that was written aside to the disk, and give it its name."""
    os.fsync(descriptor)
    os.replace(aside_of(path), path)
    flush(path.parent)  # A rename is only durable once its directory is.


def flush(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def report_write_errors(path: Path, *, resumable: bool = False) -> Iterator[None]:
    """Turn an `OSError` into a `StoreError` that names the file, the reason and what to do."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else " ".join(str(error).split())
        resumes = ": it resumes" if resumable else ""
        raise StoreError(
            f"cannot write {path}: {reason}", f"fix that, then run the same command again{resumes}"
        ) from None


def check_is_file(path: Path) -> None:
    """Raise `OSError` for a pipe or a device, which could be read forever."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
