"""List the images of any sources, each with its key and the size of its file."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hookx.errors import ImageError, UsageError, closest
from hookx.images.addresses import Remote, shown_url
from hookx.images.columns import Column, FolderColumn
from hookx.images.files import LOOSE, Files
from hookx.images.measuring import UNAVAILABLE, UNMEASURABLE, measure
from hookx.images.packing import Pile
from hookx.images.remote import measure_remote, why_unavailable
from hookx.images.sources import Look, source_of
from hookx.images.sources.kinds import describe_not_taken
from hookx.images.sources.source import THEN_AGAIN
from hookx.keys import Keys, images_sha256
from hookx.options import RETRY_SECONDS

_PACKED_AT_ONCE = 100_000  # keys
LABEL = "label"  # the column that --label makes


@dataclass(frozen=True)
class Choice:
    """Which images of a list to take: the first, or a random sample; by default all."""

    limit: int | None = None
    sample: int | None = None
    seed: int = 0

    def __str__(self) -> str:
        if self.limit is not None:
            return f"--limit {self.limit}"
        return f"--sample {self.sample} --seed {self.seed}" if self.sample is not None else ""

    def of(self, keys: list[bytes]) -> list[bytes]:
        """Return the chosen of keys that are sorted in reverse."""
        if self.limit is not None:
            return keys[-self.limit :]
        if self.sample is None or self.sample >= len(keys):
            return keys
        numbers = sorted(random.Random(self.seed).sample(range(len(keys)), self.sample))
        return [keys[number] for number in numbers]


@dataclass(frozen=True)
class Remarks:
    """What there is to say about a list beside its images.

    Attributes:
        not_taken: how many files of each suffix were found and are not images.
        chosen: the options that left images out, as in '--limit 100'; '' if none did.
        found: how many images there are without them.
        taken: how many are left.
        columns: what else is known of the images: 'int', 'float', 'bool' or 'text', by the name of the column.
    """

    not_taken: Mapping[str, int] = field(default_factory=dict)
    chosen: str = ""
    found: int = 0
    taken: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """Write what was left out, and what is kept beside, one sentence each."""
        chosen = f"{self.taken:,} of {self.found:,} images, by {self.chosen}: a list, and so a run, of its own"
        not_taken = [describe_not_taken(dict(self.not_taken))] if self.not_taken else []
        columns = [f"kept with the rows: {describe_columns(self.columns)}"] if self.columns else []
        return [*([chosen] if self.chosen else []), *columns, *not_taken]


def describe_columns(columns: Mapping[str, str], shown: int = 8) -> str:
    """Write which columns there are.

    Example:
        >>> describe_columns({"label": "text", "year": "int"})
        '2 columns, label (text), year (int)'
    """
    parts = [f"{name} ({kind})" for name, kind in list(columns.items())[:shown]]
    parts += ["..."] if len(columns) > shown else []
    return ", ".join([f"{len(columns):,} column{'s' * (len(columns) != 1)}", *parts])


@dataclass(frozen=True, eq=False, repr=False)
class ImageList:
    """The images of a run, sorted by the bytes of their keys: the paths relative to their roots, with '/'.

    A key costs its own bytes and 20 more: its end, its root's number and the file's size. Where there are archives, 16
    more say where a member is. No Python object belongs to a single key, so a forked process reads them without copying
    memory pages.
    """

    keys: Keys
    files: Files
    sizes_bytes: array[int] | memoryview[int]  # -1 where a file has none, by its own fault
    remarks: Remarks = Remarks()
    columns: Sequence[Column | FolderColumn] = ()  # what else is known of the images

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def sha256(self) -> str:
        """The digest of every key and every size, in order."""
        return images_sha256(self.keys, self.sizes_bytes)


def list_images(
    sources: Iterable[str | os.PathLike[str]],
    *,
    root: str | os.PathLike[str] | None = None,
    path_column: str | None = None,
    key_column: str | None = None,
    columns: Sequence[str] | None = None,
    label: str | None = None,
    suffixes: Sequence[str] = (),
    choice: Choice | None = None,
    retry_seconds: float = RETRY_SECONDS,
    unavailable_is_failure: bool = False,
    packed_at_once: int = _PACKED_AT_ONCE,
) -> ImageList:
    """List the images of folders (searched recursively, links followed), archives, tables, files, and standard input.

    The key of an image is its path relative to the folder that was searched, the bare name of a file that was named, or
    the path relative to the working directory for standard input ('-' or '-0'), and to the table's folder for a table.
    A member of an archive has the archive's key, '/', and its name: `00000.tar/animals/chelsea.jpg`. No image is
    opened; those that are not images fail when they are decoded.

    Args:
        root: a folder that all keys are relative to, whichever source names a file.
        path_column: the column of tables that holds the paths; by default one of the usual names.
        key_column: the column of tables that holds the keys, in place of the paths.
        columns: the columns of tables and sidecars to keep; by default all.
        label: 'parent' for a column of the folders that the images are in.
        suffixes: those of images in folders and archives, in place of those that Pillow reads; '*' for all files.
        choice: which of the images to take.
        retry_seconds: how long to try again what the system cannot do now; then it is an error.
        unavailable_is_failure: count a file that the system cannot look at as a failure later, in place of an error.
        packed_at_once: a number of keys that bounds the memory that packing takes.

    Raises:
        ImageError: a source does not exist or cannot be listed, no image is found, or two images have the same key.
        UsageError: no source has one of `columns`.

    Example:
        >>> images = list_images(["images"])
        >>> len(images), images.keys[0], images.remarks.sentences()
        (8, 'animals/chelsea.jpg', ['1 file not taken: 1 .md'])
    """
    names = [os.fspath(source) for source in sources]
    how = (path_column or "", key_column or "", retry_seconds)
    look = Look(os.fspath(root or ""), *how, columns, tuple(suffixes))
    choice = choice or Choice()
    pile = Pile()
    for name in names:
        for found in source_of(name, look).find(look):
            pile.add(found)
    count = pile.settle()
    if pile.unmatched:
        look.not_taken.add_kind("rows of metadata without an image", pile.unmatched)
    if not count:
        raise ImageError(
            f"no image found in {', '.join(map(shown_url, names)) or 'an empty list'}", *_what_is_there(look)
        )
    packed = pile.pack(choice.of, packed_at_once)
    files = packed.files
    columns_of_images = _columns(packed.columns, files.keys, look, label)
    remarks = Remarks(
        look.not_taken.counts,
        str(choice) if len(files) < count else "",
        count,
        len(files),
        {column.name: column.kind for column in columns_of_images},
    )
    sizes_bytes = _measure(files, packed.member_sizes, retry_seconds)
    if not unavailable_is_failure:
        _check_available(files, sizes_bytes)
    sizes_bytes = array("q", [max(size, UNMEASURABLE) for size in sizes_bytes])
    return ImageList(files.keys, files, sizes_bytes, remarks, columns_of_images)


def _columns(found: list[Column], keys: Keys, look: Look, label: str | None) -> Sequence[Column | FolderColumn]:
    for name in look.columns or ():
        if name not in look.seen_columns:
            there = sorted(look.seen_columns)
            near = f"closest: {closest(name, there)}" if there else "no source has any"
            raise UsageError(f"there is no column '{name}'; {near}")
    if label is None:
        return found
    if any(column.name == LABEL for column in found):
        raise UsageError(
            f"--label gives a column '{LABEL}', and the sources have one", "leave out --label, or choose --columns"
        )
    return [*found, FolderColumn(LABEL, keys)]


def _what_is_there(look: Look) -> list[str]:
    return [describe_not_taken(look.not_taken.counts)] if look.not_taken.counts else []


def _measure(files: Files, member_sizes: array[int], retry_seconds: float) -> array[int]:
    """Return the size of each image: the archives say how large members are, and the system how large files are."""
    if files.archives and len(files.archives) == len(files.roots):
        return member_sizes
    sizes_bytes = measure(files, retry_seconds=retry_seconds)
    measure_remote(files, sizes_bytes, retry_seconds)
    for position, size in enumerate(member_sizes):
        if size != LOOSE:
            sizes_bytes[position] = size
    return sizes_bytes


def _check_available(files: Files, sizes_bytes: Sequence[int]) -> None:
    unavailable = [position for position, size in enumerate(sizes_bytes) if size <= UNAVAILABLE]
    if unavailable:
        file = files[unavailable[0]]
        reason = why_unavailable(file.url) if isinstance(file, Remote) else ""
        reason = reason or os.strerror(UNAVAILABLE - sizes_bytes[unavailable[0]])
        others = f", and {len(unavailable) - 1:,} other files" if len(unavailable) > 1 else ""
        raise ImageError(f"cannot look at '{file}'{others}: {reason}", THEN_AGAIN)
