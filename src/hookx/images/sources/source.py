"""What a source of images is: whatever lists keys, sizes, and where the bytes of each are."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

from hookx.errors import ImageError
from hookx.images.addresses import is_url, shown_url
from hookx.images.columns import Values
from hookx.images.files import Archive
from hookx.images.retries import Retries, reason_of
from hookx.images.sources.kinds import NotTaken, image_test

THEN_AGAIN = "mend that, then run the same command again"
NUMBERS_OF_A_MEMBER = 3  # its offset, the bytes that it takes in its archive, and its size
_T = TypeVar("_T")


@dataclass(frozen=True)
class Found:
    """Images of one root, or of one archive; a loose file's path is the root followed by the key.

    Attributes:
        places: for each member of an archive its offset, the bytes that it takes there, and its size.
        is_named: a list names the files, so that they may never have existed.
        paths: where the files are, if that does not follow from the keys.
        values: what is known of each image beside its pixels.
        is_only_values: the images themselves are found elsewhere, under the same keys.
    """

    root: bytes
    keys: list[bytes]
    archive: Archive | None = None
    places: array[int] = field(default_factory=lambda: array("q"))
    is_named: bool = False
    paths: list[bytes] | None = None
    values: Values | None = None
    is_only_values: bool = False


@dataclass(frozen=True)
class Look:
    """How to look for images.

    Attributes:
        root: the folder that keys are relative to, '' for each source's own.
        retry_seconds: how long to try again what the system cannot do now; then it is an error.
        path_column: the column of tables that holds the paths; '' for one of the usual names.
        key_column: the column of tables that holds the keys; '' for keys that are paths.
        columns: the columns to take; None for all.
        suffixes: those of images, '*' for all files; empty for those that Pillow reads.
        not_taken: counts what is there and is not an image.
        seen_columns: the names of the columns that there are.
    """

    root: str = ""
    path_column: str = ""
    key_column: str = ""
    retry_seconds: float = 0.0
    columns: Sequence[str] | None = None
    suffixes: Sequence[str] = ()
    not_taken: NotTaken = field(default_factory=NotTaken)
    seen_columns: set[str] = field(default_factory=set)

    @cached_property
    def is_image(self) -> Callable[[bytes], bool]:
        """Says whether a file or a member counts as an image by its name."""
        return image_test(self.suffixes)

    def begin_in(self, folder: str) -> tuple[bytes, bytes]:
        """Return the root of the files in a folder, and how their keys begin; '' is the working directory."""
        if is_url(os.fsencode(folder)) or is_url(os.fsencode(self.root)):
            return self._begin_behind(folder)
        if not self.root:
            return os.fsencode(os.path.join(folder, "")) if folder else b"", b""
        within = os.path.relpath(os.path.abspath(folder), os.path.abspath(self.root))
        if within == os.pardir or within.startswith(f"{os.pardir}{os.sep}"):
            raise ImageError(
                f"'{folder or os.curdir}' is not within --root '{self.root}'", "name a folder above all sources"
            )
        beginning = b"" if within == os.curdir else os.fsencode(within) + b"/"
        return os.fsencode(os.path.join(self.root, "")), beginning

    def _begin_behind(self, folder: str) -> tuple[bytes, bytes]:
        root = os.path.join(self.root, "") if self.root else folder
        if not folder.startswith(root):
            raise ImageError(
                f"'{shown_url(folder) or os.curdir}' is not within --root '{shown_url(self.root)}'",
                "name a folder above all sources",
            )
        return os.fsencode(root), os.fsencode(folder.removeprefix(root))

    def take(self, columns: Iterable[str], but: str = "") -> list[str]:
        """Return which of some columns to take; the one that the keys say already only if it is named."""
        columns = list(columns)
        self.seen_columns.update(columns)
        return [name for name in columns if (name != but if self.columns is None else name in self.columns)]

    def patiently(self, what: str, path: str | bytes, look: Callable[[], _T]) -> _T:
        """Return what `look` finds, and try again for a while what the system cannot do now; `ImageError` after."""
        retries = Retries(self.retry_seconds)
        while True:
            try:
                return look()
            except OSError as error:
                if isinstance(error, PermissionError) or not retries.wait():
                    name = shown_url(os.fsdecode(path)).removesuffix("/") or "/"
                    raise ImageError(f"cannot {what} '{name}': {reason_of(error)}", THEN_AGAIN) from None


class Source(Protocol):
    """Where images are: a folder, a file, an archive, a list of paths."""

    def find(self, look: Look) -> Iterator[Found]:
        """Yield the images, some at a time, in any order; raise `ImageError` if they cannot be listed."""
        ...
