"""Open the bytes of one image, in whichever process, and tell the faults of the system from those of the file."""

from __future__ import annotations

import functools
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from hookx.errors import ImageError, one_line
from hookx.images.fetching import fetch
from hookx.images.files import Fetched, File, Member, file_to_open
from hookx.images.memory import allowed_bytes
from hookx.images.ranges import RangedFile
from hookx.images.retries import UnavailableError, is_of_the_file, is_of_the_system
from hookx.images.rows import read_row
from hookx.images.sources import zips
from hookx.images.unreadable import UnreadableError, check_size
from hookx.images.watched import WatchedFile

_BLOCK_BYTES = 2**20


class Content(io.BufferedReader):
    """The bytes of an image; `is_shared` once a library has the descriptor and reads by itself."""

    is_shared = False

    def fileno(self) -> int:
        descriptor = super().fileno()
        self.is_shared = True
        return descriptor

    def read_through(self) -> None:
        """Read the file to its end, for the system's error if there is one."""
        position = 0
        while block := os.pread(super().fileno(), _BLOCK_BYTES, position):
            position += len(block)


@contextmanager
def open_image(file: File, listed_bytes: int | None = None) -> Iterator[Content]:
    """Open an image and, as long as it is open, tell errors of the system from those of decoders.

    A size other than `listed_bytes` is an `UnreadableError`, and so is an archive of another size than when its members
    were listed: they may lie elsewhere in it by now.
    """
    file = fetch(file, listed_bytes)
    if isinstance(file, Fetched):
        yield Content(io.BytesIO(file.content))
        return
    path = file_to_open(file)
    was_seen = isinstance(file, Member) or (listed_bytes is not None and listed_bytes >= 0)
    try:
        # Without O_NONBLOCK, opening a named pipe blocks until something writes to it.
        raw = WatchedFile(path, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
    except OSError as error:
        if is_of_the_file(error, path, was_seen=was_seen):
            raise
        raise UnavailableError(error) from None
    try:
        with raw:
            status = os.fstat(raw.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableError("not a regular file")
            with _content_of(file, raw, status.st_size, listed_bytes) as content:
                yield content
    except Exception as error:
        if raw.error is not None:
            raise UnavailableError(raw.error) from None
        if isinstance(error, OSError) and is_of_the_system(error):
            raise UnavailableError(error) from None
        raise
    if raw.error is not None:  # The decoder made do with what it had.
        raise UnavailableError(raw.error)


def _content_of(file: str | Member, raw: WatchedFile, file_bytes: int, listed_bytes: int | None) -> Content:
    if isinstance(file, str):
        check_size(file_bytes, listed_bytes)
        return Content(raw)
    if file_bytes != file.archive.size_bytes:
        raise UnreadableError(
            f"its archive changed since it was listed ({file.archive.size_bytes} -> {file_bytes} bytes)"
        )
    if file.archive.kind == "tar":
        check_size(file.stored_bytes, listed_bytes)
        return Content(RangedFile(functools.partial(_read_at, raw, file.offset), file.stored_bytes))
    if file.archive.kind == "parquet":
        try:
            content = read_row(file.archive, file.offset)
        except ImageError as error:
            raise UnreadableError(f"damaged in its table: {one_line(error)}") from None
        check_size(len(content), listed_bytes)
        return Content(io.BytesIO(content))
    max_bytes = allowed_bytes() if listed_bytes is None else listed_bytes
    try:
        content = zips.read_member(functools.partial(os.pread, raw.fileno()), file.offset, file.stored_bytes, max_bytes)
    except zips.DamagedMemberError as error:
        raise UnreadableError(f"damaged in its archive: {error}") from None
    check_size(len(content), listed_bytes)
    return Content(io.BytesIO(content))


def _read_at(raw: WatchedFile, start: int, count: int, offset: int) -> bytes:
    """Read from a place in an open archive; a library that is given no descriptor reads nothing beside it."""
    try:
        return os.pread(raw.fileno(), count, start + offset)
    except OSError as error:
        raw.error = error
        raise
