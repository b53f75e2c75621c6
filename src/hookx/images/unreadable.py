"""What is wrong with a file itself, whatever reads it."""

from __future__ import annotations


class UnreadableError(Exception):
    """A file cannot be decoded; the message alone is the reason, without a class name before it."""


def check_size(size_bytes: int, listed_bytes: int | None) -> None:
    """Raise `UnreadableError` for a file that is empty, or has another size than when it was listed."""
    if listed_bytes is not None and size_bytes != listed_bytes:
        before = "unreadable" if listed_bytes < 0 else listed_bytes
        raise UnreadableError(f"changed since it was listed ({before} -> {size_bytes} bytes)")
    if size_bytes == 0:
        raise UnreadableError("the file is empty")
