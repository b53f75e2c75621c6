"""Where the image of each key is: a file by itself, or a stretch of an archive."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from hookx.images.addresses import Remote, is_url, shown_url, without_query
from hookx.keys import Keys, LazySequence

# A prefix of an object store holds its objects as an archive its members: what lists them says how large each is.
ArchiveKind = Literal["tar", "zip", "parquet", "prefix"]
LOOSE = -1  # in place of an offset
_ROOTS_OF_STANDARD_INPUT = (b"", b"/")


@dataclass(frozen=True)
class Archive:
    """An archive as it was when its members were listed; `column` holds the images within a table."""

    path: str
    kind: ArchiveKind
    size_bytes: int
    column: str = ""


@dataclass(frozen=True)
class Member:
    """An image within an archive; as a text, the path of the archive with the member's name behind it.

    Attributes:
        offset: where its bytes begin in a tar; where its local header begins in a zip; its row in a table.
        stored_bytes: the bytes that it takes there, which are fewer than its size if they are compressed.
    """

    name: str
    archive: Archive
    offset: int
    stored_bytes: int

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Fetched:
    """An image whose bytes have been sent already."""

    name: str
    content: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


File = str | Member | Remote | Fetched


def file_to_open(file: File) -> str:
    """Return the path of the file on the disk that holds an image."""
    return file.archive.path if isinstance(file, Member) else str(file)


class Files(LazySequence[File]):
    """The file of each key: its root and the key make its path; for a member, where it is in its archive.

    Args:
        roots: what precedes the keys to make paths.
        root_of: the number of each key's root.
        archives: the roots that are archives, by number; their paths do not follow from the roots.
        offsets: where each member is in its archive, -1 for a loose file; empty if there are no archives.
        stored_bytes: what each member takes there; empty if there are no archives.
        named: the numbers of roots whose files were named by a list, so that they may never have existed.
        paths: those that do not follow from the keys, because a table gave the keys, and '' for all others.
    """

    def __init__(
        self,
        keys: Keys,
        roots: Sequence[bytes],
        root_of: array[int] | memoryview[int],
        archives: Mapping[int, Archive] | None = None,
        offsets: array[int] | memoryview[int] | None = None,
        stored_bytes: array[int] | memoryview[int] | None = None,
        named: Sequence[int] | None = None,
        paths: Keys | None = None,
    ) -> None:
        self.keys, self.roots, self.root_of = keys, roots, root_of
        self.archives = archives or {}
        self.offsets = array("q") if offsets is None else offsets
        self.stored_bytes = array("q") if stored_bytes is None else stored_bytes
        if named is None:
            named = [number for number, root in enumerate(roots) if root in _ROOTS_OF_STANDARD_INPUT]
        self.named = frozenset(named)
        self.paths = paths

    def __len__(self) -> int:
        return len(self.keys)

    def item(self, position: int) -> File:
        encoded = self.encoded(position)
        name = os.fsdecode(encoded)
        if not self.is_member(position):
            return Remote(name) if is_url(encoded) else name
        archive = self.archives[self.root_of[position]]
        if archive.kind == "prefix":
            return Remote(name)
        return Member(name, archive, self.offsets[position], self.stored_bytes[position])

    def is_member(self, position: int) -> bool:
        return bool(self.archives) and self.root_of[position] in self.archives

    def encoded(self, position: int) -> bytes:
        """Return the path of a loose file, or what a member is called in errors."""
        if self.paths is not None and (path := self.paths.encoded(position)):
            return path
        return self.roots[self.root_of[position]] + self.keys.encoded(position)

    def was_found(self, position: int) -> bool:
        """Return whether the file was found in a folder; what a list names may never have existed."""
        return self.root_of[position] not in self.named


def first_with_query(files: Files, sources: Iterable[str] = ()) -> str:
    """Return the first URL, of some sources and of files, that has a query, without it; '' if none has.

    A query may be a signature, which is not to be stored.
    """
    archives = (archive.path for archive in files.archives.values())
    # Only what a list or a table names has a path of its own and a query.
    is_likely = files.paths is not None and b"?" in bytes(files.paths.block)
    paths = iter(files.paths) if files.paths is not None and is_likely else iter(())
    return next((shown_url(one) for one in (*sources, *archives, *paths) if one != without_query(one)), "")
