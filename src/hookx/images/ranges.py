"""Files that are read by offset, wherever they lie, and as libraries want them: with a position."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any

Pread = Callable[[int, int], bytes]  # a count of bytes and an offset -> the bytes; fewer only at the end of the file


class RangedFile(io.RawIOBase):
    """A file that is read by offset, as one with a position. It remembers the error of reading it."""

    error: OSError | None = None

    def __init__(self, pread: Pread, size_bytes: int) -> None:
        self._pread, self._size_bytes, self._position = pread, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"negative seek position {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._pread(max(0, min(len(buffer), self._size_bytes - self._position)), self._position)
        except OSError as error:
            self.error = error
            raise
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
