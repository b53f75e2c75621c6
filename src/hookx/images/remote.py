"""Files behind URLs, as those who list images read them: patiently, and by as few requests as are sensible."""

from __future__ import annotations

import errno
import io
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from hookx.errors import ImageError
from hookx.images.addresses import Address, parse_url, shown_url
from hookx.images.files import Files
from hookx.images.measuring import ELSEWHERE, UNAVAILABLE, UNMEASURABLE
from hookx.images.ranges import RangedFile
from hookx.images.retries import Retries
from hookx.store.objects.helper import BusyStoreError, NoRangesError, ask

_FIRST_BYTES, _AHEAD_BYTES, _ALONE_BYTES = 2**20, 8 * 2**20, 64 * 2**10
# Where one read follows the other more closely than this, what lies between them costs less than a request of its own.
_NEAR_BYTES = 512 * 2**10
_BUFFER_BYTES = 2**20
_MEASURED_AT_ONCE = 1_000
_MAX_WHOLE_BYTES = 2**30  # of a table on a server that sends no ranges
_OF_THE_FILE = ("absent", "denied")
THEN_AGAIN = "mend that, then run the same command again"


class AbsentError(ImageError):
    """There is no file behind a URL."""


class UnreachableError(ImageError):
    """A file behind a URL cannot be read now; `reason` says why."""

    def __init__(self, url: str, reason: object) -> None:
        super().__init__(f"cannot read '{shown_url(url)}': {reason}", THEN_AGAIN)
        self.reason = str(reason)


def ask_patiently(url: str, what: str, retry_seconds: float, **values: Any) -> tuple[dict[str, Any], memoryview]:
    """Ask a store about a URL, again and again for a while if it is busy or away; `ImageError` for any refusal."""
    address, retries = parse_url(url), Retries(retry_seconds)
    while True:
        try:
            return ask(*address, what, **values)
        except BusyStoreError as error:
            if not retries.wait():
                raise UnreachableError(url, error) from None
        except FileNotFoundError as error:
            raise AbsentError(f"there is no '{shown_url(url)}': {error}", "check the name") from None
        except NoRangesError:
            raise
        except OSError as error:
            raise UnreachableError(url, error) from None


def size_of(url: str, retry_seconds: float) -> int:
    """Return the size of a file behind a URL; `ImageError` if there is none, or it cannot be read."""
    found = ask_patiently(url, "sizes", retry_seconds, others=[parse_url(url)])[0]["sizes"][0]
    retries = Retries(retry_seconds)
    while not isinstance(found, int):
        kind, reason = found
        if kind == "absent":
            raise AbsentError(f"there is no '{shown_url(url)}': {reason}", "check the name")
        if kind != "busy" or not retries.wait():
            raise UnreachableError(url, reason)
        found = ask_patiently(url, "sizes", retry_seconds, others=[parse_url(url)])[0]["sizes"][0]
    return found


def walk(url: str, retry_seconds: float) -> Iterator[tuple[str, int]]:
    """Yield the keys of all objects below a prefix, and their sizes."""
    after = ""
    while some := ask_patiently(url, "walk", retry_seconds, after=after)[0]["objects"]:
        yield from some
        after = some[-1][0]


class RemoteFile:
    """A file behind a URL, read by offset.

    It reads ahead as far as that spares requests: in blocks where one read follows closely upon the other, as in an
    archive of small members, and only what is wanted where much lies between them.

    Args:
        may_be_whole: read the whole file from a server that sends no parts of it, which is then in memory.
    """

    def __init__(self, url: str, retry_seconds: float, *, may_be_whole: bool = False) -> None:
        self.url, self._retry_seconds, self._may_be_whole = url, retry_seconds, may_be_whole
        self._beginning = memoryview(b"")  # Kept, because formats say there what they are.
        self._start, self._window = 0, memoryview(b"")
        self._reads, self._fetched_at = 0, 0
        self.size_bytes = -1
        self._fetch(0, _FIRST_BYTES)
        self._beginning = self._window
        if self.size_bytes < 0:
            self.size_bytes = size_of(url, retry_seconds)

    def pread(self, count: int, offset: int) -> bytes:
        stop = min(offset + count, self.size_bytes)
        if offset >= stop:
            return b""
        self._reads += 1
        if stop <= len(self._beginning):
            return bytes(self._beginning[offset:stop])
        if offset < self._start or stop > self._start + len(self._window):
            self._fetch(offset, min(max(stop, offset + self._ahead(offset)), self.size_bytes))
        return bytes(self._window[offset - self._start : stop - self._start])

    def end_first(self, count: int) -> None:
        """Read the end of the file, where some formats have their tables of contents, in one request."""
        start = max(0, self.size_bytes - count)
        if start < self._start or self.size_bytes > self._start + len(self._window):
            self._fetch(start, self.size_bytes)

    def _ahead(self, offset: int) -> int:
        apart = (offset - self._fetched_at) / max(1, self._reads)
        return _AHEAD_BYTES if 0 <= apart <= _NEAR_BYTES else _ALONE_BYTES

    def _fetch(self, start: int, stop: int) -> None:
        try:
            answer, data = ask_patiently(self.url, "stretch", self._retry_seconds, start=start, stop=stop)
        except NoRangesError as error:
            if not self._may_be_whole:
                raise ImageError(
                    f"cannot read '{shown_url(self.url)}' in parts: {error}", "download it, and name the file"
                ) from None
            answer, data = ask_patiently(self.url, "whole", self._retry_seconds, max_bytes=_MAX_WHOLE_BYTES)
            if not data and answer["size"]:
                raise ImageError(
                    f"'{shown_url(self.url)}' is larger than {_MAX_WHOLE_BYTES:,} bytes, and the server sends no parts",
                    "download it, and name the file",
                ) from None
            start = 0
        if self.size_bytes not in (-1, answer["size"]) and answer["size"] >= 0:
            raise ImageError(f"'{shown_url(self.url)}' changed while it was read", "run the same command again")
        self.size_bytes = max(self.size_bytes, answer["size"])
        if len(data) < min(stop, self.size_bytes) - start:
            raise ImageError(f"'{shown_url(self.url)}' ended too early", "run the same command again")
        self._start, self._window = start, data
        self._fetched_at, self._reads = start, 0


def open_remote(url: str, retry_seconds: float) -> io.BufferedReader:
    """Open a file behind a URL, which the server need not send in parts."""
    file = RemoteFile(url, retry_seconds, may_be_whole=True)
    return io.BufferedReader(RangedFile(file.pread, file.size_bytes), _BUFFER_BYTES)


def measure_remote(files: Files, sizes_bytes: array[int] | memoryview[int], retry_seconds: float) -> None:
    """Ask for the sizes of the files of a list that lie behind URLs, many at a time."""
    if not array("q", sizes_bytes).count(ELSEWHERE):
        return
    positions = (position for position, size in enumerate(sizes_bytes) if size == ELSEWHERE)
    retries = Retries(retry_seconds)
    for some in _some(positions, _MEASURED_AT_ONCE):
        retries = _measure(files, some, sizes_bytes, retries, retry_seconds)


def _measure(
    files: Files, positions: Sequence[int], sizes_bytes: array[int] | memoryview[int], retries: Retries, seconds: float
) -> Retries:
    """Measure some files; return how long the next ones may be waited for: one outage hits many."""
    left = list(positions)
    while left:
        found = _sizes(files, left)
        busy = []
        for position, one in zip(left, found, strict=True):
            if isinstance(one, int):
                sizes_bytes[position] = one
            elif one[0] in _OF_THE_FILE:
                sizes_bytes[position] = UNMEASURABLE  # Reading it will fail, with the reason.
            else:
                sizes_bytes[position] = UNAVAILABLE - errno.EIO
                busy += [position] if one[0] == "busy" else []
        if len(busy) < len(left):
            retries = Retries(seconds)
        if not busy or not retries.wait():
            break
        left = busy
    return retries


def _sizes(files: Files, positions: Iterable[int]) -> list[Any]:
    found: list[Any] = []
    asked: list[Address | None] = []
    for position in positions:
        try:
            asked.append(parse_url(os.fsdecode(files.encoded(position))))
        except ImageError:
            asked.append(None)
    known = [address for address in asked if address is not None]
    try:
        answers = iter(ask(*known[0], "sizes", others=known)[0]["sizes"] if known else ())
    except OSError as error:
        return [("busy", str(error)) for _ in asked]
    for address in asked:
        found.append(("denied", "no such address") if address is None else next(answers))
    return found


def why_unavailable(url: str) -> str:
    """Return why a file behind a URL cannot be looked at now; '' if it can."""
    found = ask_patiently(url, "sizes", 0, others=[parse_url(url)])[0]["sizes"][0]
    return "" if isinstance(found, int) else str(found[1])


def _some(positions: Iterable[int], count: int) -> Iterator[list[int]]:
    some: list[int] = []
    for position in positions:
        some.append(position)
        if len(some) == count:
            yield some
            some = []
    if some:
        yield some
