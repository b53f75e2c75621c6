"""The image in a row of a table, which is read forwards: rows in their order cost one pass over their group."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

from hookx.errors import ImageError
from hookx.images.files import Archive
from hookx.images.sources.parquet import ParquetTable


class _Reader:
    """An open table, and how far its images have been read."""

    def __init__(self, archive: Archive) -> None:
        self.archive, self.owner = archive, os.getpid()
        self._table = ParquetTable(archive.path)
        if self._table.size_bytes != archive.size_bytes:
            raise ImageError(f"it changed since it was listed ({archive.size_bytes} -> {self._table.size_bytes} bytes)")
        self._next = self._stop = 0  # the next row, and the end of its row group
        self._images: Iterator[bytes | None] = iter(())

    def read(self, row: int) -> bytes:
        if not self._next <= row < self._stop:
            group, before = self._table.place_of(row)
            self._next = row - before
            self._stop = self._next + self._table.rows_in(group)
            self._images = self._table.read_images(self.archive.column, group)
        image = next(itertools.islice(self._images, row - self._next, None), None)
        self._next = row + 1
        return image or b""

    def close(self) -> None:
        self._table.__exit__()


_reader: _Reader | None = None


def read_row(archive: Archive, row: int) -> bytes:
    """Return the bytes of an image in a table; b'' if the row has none. `ImageError` if the table cannot be read."""
    global _reader
    if _reader is None or _reader.archive != archive or _reader.owner != os.getpid():
        # A forked process has inherited the reader's place in the file, and leaves it alone.
        if _reader is not None and _reader.owner == os.getpid():
            _reader.close()
        _reader = None
        _reader = _Reader(archive)
    try:
        return _reader.read(row)
    except BaseException:
        _reader = None
        raise
