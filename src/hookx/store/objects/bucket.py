"""What hookx asks of a bucket, whichever library talks to its store, and how a refusal is put into words."""

from __future__ import annotations

import os
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

MIN_PART_BYTES, _MAX_PARTS = 16 * 2**20, 9_000  # Stores take 10,000 parts of an object at most.
PARTS_AT_ONCE = 8
# A wrong address shows in seconds; a store that has answered once is waited for, as it may be away for a while.
ATTEMPTS, PATIENCE_SECONDS = 4, 600
CONNECT_SECONDS, ANSWER_SECONDS = 5, 300
# Where whoever asks is patient by himself, as the readers of images are.
ATTEMPTS_AT_ONCE, ANSWER_SECONDS_AT_ONCE = 3, 30
REQUESTS_AT_ONCE = 32
_SECRETS = re.compile("(?i)key|secret|token|password|sas|credential|connection_string")
_MIN_SECRET_CHARACTERS = 6


Kind = Literal["absent", "denied", "unknown", "busy", "unranged", "failed"]


class RefusedError(Exception):
    """What a store refuses, or what leads to it.

    An object is absent, access to it is denied, the store does not know who asks, it is busy or out of reach, it sends
    no part of an object, or anything else failed.
    """

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(without_secrets(reason))
        self.kind = kind


class ReadableBucket(Protocol):
    """Where objects can be read: a bucket, a server, a repository. Its methods raise `RefusedError`."""

    @abstractmethod
    def walk(self, prefix: str, after: str) -> Iterator[tuple[str, int]]:
        """Yield the keys of all objects at and below a prefix that follow another key ('': all), and their sizes."""

    @abstractmethod
    def size_bytes(self, key: str) -> int: ...

    @abstractmethod
    def whole(self, key: str, max_bytes: int) -> tuple[bytes, int]:
        """Return an object and its size; b'' in its place if it is larger than `max_bytes`."""

    @abstractmethod
    def stretch(self, key: str, start: int, stop: int) -> tuple[bytes, int]:
        """Return some bytes of an object, fewer at its end, and its size; -1 if that is not said."""


class Bucket(ReadableBucket, Protocol):
    """A bucket that can be written to as well."""

    @abstractmethod
    def names(self, prefix: str) -> dict[str, tuple[int, float]]:
        """Return the objects right below a prefix: name -> (size in bytes, time of the last change)."""

    @abstractmethod
    def read(self, key: str, ranges: Sequence[tuple[int, int]]) -> bytes:
        """Return ranges of an object, one behind the other; short if the object ends before."""

    @abstractmethod
    def put(self, key: str, file: Path, *, replace: bool) -> bool:
        """Send a file, whole or not at all. Without `replace` the first wins; return whether this is what is there."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Remove an object, if there is one."""

    @abstractmethod
    def abandon_uploads(self, prefix: str, older_than_seconds: float) -> int:
        """Give up uploads that were begun longer ago and never completed; return how many there were."""


def part_bytes(size_bytes: int) -> int:
    """Return how long the parts of a large object are."""
    return max(MIN_PART_BYTES, -(-size_bytes // _MAX_PARTS))


def without_secrets(text: str) -> str:
    """Return a text without signatures in URLs, and without the values of variables that hold secrets.

    Example:
        >>> without_secrets("GET https://store/run?sig=aGVsbG8%3D failed")
        'GET https://store/run failed'
    """
    text = re.sub(r"(https?://[^\s?\"']*)\?[^\s\"']*", r"\1", text)
    for name, value in os.environ.items():
        if _SECRETS.search(name) and len(value) >= _MIN_SECRET_CHARACTERS:
            text = text.replace(value, "***")
    return " ".join(text.split())
