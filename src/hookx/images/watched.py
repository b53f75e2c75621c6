"""A file that remembers what the system said when it was read."""

from __future__ import annotations

import io
from typing import Any


class WatchedFile(io.FileIO):
    """A file that keeps the system's error of reading it, which a library may put into words of its own."""

    error: OSError | None = None

    def readinto(self, buffer: Any) -> int | None:
        try:
            return super().readinto(buffer)
        except OSError as error:
            self.error = error
            raise

    def readall(self) -> bytes:
        try:
            return super().readall()
        except OSError as error:
            self.error = error
            raise
