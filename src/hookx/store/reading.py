"""Open files of a run, read at any place in them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from typing import Protocol

Piece = tuple[int, memoryview]  # where in a file, and the bytes that are to be filled from there


class Readable(Protocol):
    """A file that is open, wherever it lies."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, pieces: Iterable[Piece]) -> None:
        """Fill pieces of memory; `EOFError` if the file ends before one does."""


class LocalFile:
    """An open file of this system. Not mapped: where a disk cannot read, that would crash the process."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @property
    def size_bytes(self) -> int:
        return os.fstat(self.descriptor).st_size

    def read(self, pieces: Iterable[Piece]) -> None:
        for at, wanted in pieces:
            while wanted:  # One call reads at most 2 GiB.
                count = os.preadv(self.descriptor, [wanted], at)
                if not count:
                    raise EOFError("it ends too early")
                at, wanted = at + count, wanted[count:]


def read_range(file: Readable, start: int, stop: int) -> bytes:
    """Return some bytes of an open file; `EOFError` if it ends before."""
    data = bytearray(stop - start)
    file.read([(start, memoryview(data))])
    return bytes(data)


def as_stream(file: Readable, buffer_bytes: int = 2**20) -> io.BufferedReader:
    """Return an open file as one that is read from its beginning."""
    return io.BufferedReader(_Stream(file), buffer_bytes)


def as_text(file: Readable) -> io.TextIOWrapper:
    """Return an open file as text, whose lines end as they are; bytes that are not UTF-8 come back unchanged."""
    return io.TextIOWrapper(as_stream(file), encoding="utf-8", errors="surrogateescape", newline="")


class _Stream(io.RawIOBase):
    def __init__(self, file: Readable) -> None:
        self._file, self._at, self._size_bytes = file, 0, file.size_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = memoryview(buffer)[: self._size_bytes - self._at]
        if wanted:
            self._file.read([(self._at, wanted)])
            self._at += len(wanted)
        return len(wanted)
