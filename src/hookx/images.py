"""Folders, files and lists of paths -> a list of images, each with its key."""

from __future__ import annotations

import operator
import os
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hookx.errors import ImageError
from hookx.plan import LazySequence

# What a folder is searched for. A file that is named outright may be called anything.
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .gif .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm .pfm .tga .ico .icns "
    ".jp2 .j2k .jpx .avif .avifs .qoi .dds .sgi .rgb .pcx .psd .xbm .xpm".split()
)


_KEYS_SHOWN = 3  # where a list of them is printed


class Keys(LazySequence[str]):
    """Many keys in one block of bytes, in order; a string is made when it is asked for, and not kept.

    A name that is not UTF-8 comes back as Python gives such names: `os.fsencode` turns it into its bytes.
    """

    def __init__(self, block: bytes, ends: array[int]) -> None:
        self._block, self._ends = block, ends

    @classmethod
    def pack(cls, sorted_keys: Iterable[bytes]) -> Keys:
        """Join keys, which are in the order of their bytes, and remember where each ends."""
        block, ends = bytearray(), array("q")
        for key in sorted_keys:
            block += key
            ends.append(len(block))
        return Keys(bytes(block), ends)

    def __len__(self) -> int:
        return len(self._ends)

    def item(self, position: int) -> str:
        return os.fsdecode(self.encoded(position))

    def encoded(self, position: int) -> bytes:
        """Return the bytes by which a key is ordered."""
        start = self._ends[position - 1] if position else 0
        return self._block[start : self._ends[position]]

    def place(self, key: str) -> int:
        """Return how many keys come before one that need not be there."""
        return bisect_left(range(len(self)), os.fsencode(key), key=self.encoded)

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """Return the position of a key; `ValueError` if it is not there. They are in order, so few are looked at."""
        if isinstance(value, str):
            position = self.place(value)
            if position in range(len(self))[start:stop] and self.item(position) == value:
                return position
        raise ValueError(f"{value!r} is not among the {len(self):,} keys")

    def __contains__(self, value: object) -> bool:
        try:
            self.index(value)
        except ValueError:  # Also of half a character, which no key has.
            return False
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # As of a list.

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:_KEYS_SHOWN])) + (", ..." if len(self) > _KEYS_SHOWN else "")
        return f"<{len(self):,} keys: {shown}>"


class Files(LazySequence[str]):
    """The file of every key: a root, and the key."""

    def __init__(self, keys: Keys, roots: list[str], root_of: array[int]) -> None:
        self._keys, self._roots, self._root_of = keys, roots, root_of

    def __len__(self) -> int:
        return len(self._keys)

    def item(self, position: int) -> str:
        return self._roots[self._root_of[position]] + self._keys[position]


@dataclass(frozen=True, eq=False, repr=False)
class ImageList:
    """Every image of a run, in the order of the bytes of its key: its path relative to its root, with '/'.

    A key costs its own bytes and 20 more: its end, its root's number and the file's size. No object belongs to a single
    key, so a forked process can read all of them without copying a page.
    """

    keys: Keys
    files: Files
    sizes_bytes: array[int]  # -1 where there was no file to measure

    def __len__(self) -> int:
        return len(self.keys)


def list_images(sources: Iterable[str | os.PathLike[str]]) -> ImageList:
    """List the images of folders (searched recursively, links followed), files, and '-' or '-0' (standard input).

    A key is relative to the folder it was found in, the bare name of a file named outright, and for standard input the
    path relative to the working directory. Nothing is opened: what is no image shows when it is decoded.

    Raises:
        ImageError: a source does not exist, there is no image at all, or two images have one key.

    Example:
        >>> images = list_images(["images"])
        >>> len(images), images.keys[0]
        (8, 'animals/chelsea.jpg')
    """
    names = [os.fspath(source) for source in sources]
    numbers: dict[str, int] = {}  # of the roots
    unsorted_keys, unsorted_roots = [], array("i")
    for root, key in (pair for name in names for pair in _in_source(name)):
        unsorted_keys.append(os.fsencode(key))
        unsorted_roots.append(numbers.setdefault(root, len(numbers)))
    if not unsorted_keys:
        raise ImageError(f"there is no image in {', '.join(names) or 'the empty list'}")
    order = sorted(range(len(unsorted_keys)), key=unsorted_keys.__getitem__)
    keys = Keys.pack(unsorted_keys[number] for number in order)
    files = Files(keys, list(numbers), array("i", (unsorted_roots[number] for number in order)))
    for position, (one, next_one) in enumerate(pairwise(order)):
        if unsorted_keys[one] == unsorted_keys[next_one]:
            raise ImageError(
                f"two images have the key '{keys[position]}': {files[position]} and {files[position + 1]}",
                "give the folder that holds both, or run twice",
            )
    return ImageList(keys, files, array("q", map(_size_bytes, files)))


def _in_source(source: str) -> Iterator[tuple[str, str]]:
    """Yield the root and the key of every image of a source; the file is the one and the other."""
    if source in ("-", "-0"):
        separator = b"\0" if source == "-0" else b"\n"
        for line in sys.stdin.buffer.read().split(separator):
            if path := os.fsdecode(line if source == "-0" else line.removesuffix(b"\r")):
                yield _in_working_directory(path)
    elif os.path.isdir(source):
        root = os.path.join(source, "")
        for key in _in_folder(source, "", ()):
            yield root, key
    elif os.path.lexists(source):
        key = os.path.basename(source)
        yield source.removesuffix(key), key
    else:
        raise ImageError(f"there is no file or folder '{source}'")


def _in_folder(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        return  # A link to a folder that we are inside of: everything in it has been listed.
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise ImageError(f"cannot list the folder '{folder}': {error.strerror}") from None
    for entry in entries:
        if _is_folder(entry):
            yield from _in_folder(entry.path, f"{prefix}{entry.name}/", (*above, identity))
        elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
            yield prefix + entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # A link to itself.


def _in_working_directory(path: str) -> tuple[str, str]:
    if ".." in path.split("/"):  # Behind a link, '..' is not what its name suggests.
        path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    whole, here = os.path.abspath(path), os.getcwd().rstrip("/") + "/"
    return ("", whole.removeprefix(here)) if whole.startswith(here) else ("/", whole.lstrip("/"))


def _size_bytes(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return -1  # It will fail when it is read, with the reason.
