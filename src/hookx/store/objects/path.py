"""A place in an object store, used as `Path` is for one in a file system: `s3://bucket/run`, `gs://...`, `az://...`.

What talks to the store is another process, which the first use starts; see `hookx.store.objects.helper`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from hookx.errors import UsageError
from hookx.store.objects.helper import ask
from hookx.store.reading import Piece

SCHEMES = ("s3", "gs", "az")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_AT_ONCE_BYTES = 64 * 2**20  # of one request
_AHEAD_BYTES = 256 * 2**10  # Headers are read in pieces: most come with the first request.


class Listed(NamedTuple):
    """An object as a store lists it."""

    size_bytes: int
    time: float  # of its last change, in seconds since 1970


@dataclass(frozen=True)
class ObjectPath:
    """An object, or the prefix of many, in an object store.

    Like those of `Path`, its methods raise `FileNotFoundError`, `PermissionError`, and `OSError` for anything else.

    Example:
        >>> run = ObjectPath.parse("s3://features/resnet18/")
        >>> print(run, run / "plan.json", (run / "plan.json").name)
        s3://features/resnet18 s3://features/resnet18/plan.json plan.json
    """

    scheme: str
    bucket: str
    key: str

    @classmethod
    def parse(cls, url: str) -> ObjectPath:
        """Read a URL; `UsageError` if it is none that hookx can use, which never repeats what may be a password."""
        match = _URL.fullmatch(url)
        scheme, rest = match.groups() if match else ("", url)
        if scheme not in SCHEMES:
            known = ", ".join(f"{name}://" for name in SCHEMES)
            raise UsageError(f"hookx cannot use '{scheme}://'", f"use one of {known}, or mount the store")
        if "@" in rest.partition("/")[0] or "?" in rest or "#" in rest:
            example = f"{scheme}://BUCKET/RUN"
            raise UsageError(
                f"credentials and options do not belong into a URL: write {example}",
                "give credentials as the tools of the store take them, in variables or files",
            )
        bucket, _, key = rest.rstrip("/").partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise UsageError(f"'{url}' names no bucket", f"as in {scheme}://BUCKET/RUN")
        parts = key.split("/") if key else []
        if not parts or any(part in ("", ".", "..") or not part.isprintable() for part in parts):
            raise UsageError(f"'{url}' names no place of its own in the bucket", f"as in {scheme}://{bucket}/RUN")
        return cls(scheme, bucket, key)

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.scheme, self.bucket, f"{self.key}/{name}")

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> ObjectPath:
        return ObjectPath(self.scheme, self.bucket, self.key.rpartition("/")[0])

    def names(self) -> dict[str, Listed]:
        """Return the objects right below this prefix by name; none if there is no such prefix."""
        listed = self._ask("names")[0]["names"]
        return {name: Listed(*values) for name, values in listed.items()}

    def size_bytes(self) -> int:
        return int(self._ask("size")[0]["size"])

    def exists(self) -> bool:
        try:
            self.size_bytes()
        except FileNotFoundError:
            return self.name in self.parent.names()  # A listing says so if there is no bucket.
        return True

    def read(self, ranges: Sequence[tuple[int, int]]) -> memoryview:
        """Return ranges of bytes, one behind the other, by as few requests as are sensible."""
        return self._ask("read", ranges=list(ranges))[1]

    def put(self, file: Path, *, replace: bool) -> bool:
        """Send a file, which is there whole or not at all; return whether it is there now.

        With `replace` it takes the place of any object of that name. Otherwise the first wins, in stores that can tell.
        """
        return bool(self._ask("put", file=os.path.abspath(file), replace=replace)[0]["is_ours"])

    def remove(self) -> None:
        """Remove the object, if there is one."""
        self._ask("remove")

    def keeps_the_first(self) -> bool:
        """Return whether the store refuses to create what is there; the first use of a place that is written to."""
        return bool(self._ask("probe")[0]["is_kept"])

    def abandon_uploads(self, older_than_seconds: float) -> int:
        """Give up uploads below this prefix that nobody will complete; return how many there were."""
        return int(self._ask("abandon", older_than=older_than_seconds)[0]["uploads"])

    def _ask(self, what: str, **values: Any) -> tuple[dict[str, Any], memoryview]:
        return ask(self.scheme, self.bucket, self.key, what, **values)


class ObjectFile:
    """An object that is read by ranges, as `Readable` says."""

    def __init__(self, path: ObjectPath, size_bytes: int | None = None) -> None:
        self.path = path
        self._beginning = b""
        if size_bytes is not None:
            self.size_bytes = size_bytes

    @cached_property
    def size_bytes(self) -> int:
        return self.path.size_bytes()

    def read(self, pieces: Iterable[Piece]) -> None:
        for some in _grouped(self._without_beginning(pieces)):
            data = self.path.read([(at, at + len(wanted)) for at, wanted in some])
            if len(data) != sum(len(wanted) for _, wanted in some):
                raise EOFError("it ends too early")
            for _, wanted in some:
                wanted[:], data = data[: len(wanted)], data[len(wanted) :]

    def _without_beginning(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Fill small pieces from the beginning of the object, which is read once; yield the others."""
        for at, wanted in pieces:
            if at + len(wanted) > self.size_bytes:
                raise EOFError("it ends too early")
            if not wanted:
                continue
            if at == 0 and not self._beginning:
                self._beginning = bytes(self.path.read([(0, min(_AHEAD_BYTES, self.size_bytes))]))
            if at + len(wanted) <= len(self._beginning):
                wanted[:] = self._beginning[at : at + len(wanted)]
            else:
                yield at, wanted


def _grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Cut pieces so that one request is not too long, and put short ones together."""
    group: list[Piece] = []
    room = _AT_ONCE_BYTES
    for at, wanted in pieces:
        while wanted:
            some = wanted[:room]
            group.append((at, some))
            at, wanted, room = at + len(some), wanted[len(some) :], room - len(some)
            if not room:
                yield group
                group, room = [], _AT_ONCE_BYTES
    if group:
        yield group
