"""Image keys by the million: packed into one block of bytes, looked up by bisection, and digested."""

from __future__ import annotations

import hashlib
import itertools
import operator
import os
from abc import abstractmethod
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, overload

_DIGEST_CHUNK = 10_000  # images
_Item = TypeVar("_Item", covariant=True)


class LazySequence(Sequence[_Item]):
    """A sequence that makes an item when it is indexed and keeps none; a slice is a list."""

    @abstractmethod
    def item(self, position: int) -> _Item: ...

    @overload
    def __getitem__(self, index: int) -> _Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[_Item]: ...
    def __getitem__(self, index: int | slice) -> _Item | list[_Item]:
        if isinstance(index, slice):
            return [self.item(position) for position in range(len(self))[index]]
        return self.item(range(len(self))[index])

    def __iter__(self) -> Iterator[_Item]:
        return map(self.item, range(len(self)))


class SortedKeys(LazySequence[str]):
    """Unique keys, sorted by their bytes, wherever these are."""

    @abstractmethod
    def encoded(self, position: int) -> bytes:
        """Return the bytes of a key; `position` is not negative."""

    def item(self, position: int) -> str:
        return os.fsdecode(self.encoded(position))

    def place(self, key: str) -> int:
        """Return how many keys sort before a key, which need not be one of them."""
        return bisect_left(range(len(self)), os.fsencode(key), key=self.encoded)

    def index(self, value: Any, start: int = 0, stop: int | None = None) -> int:
        """Return the position of a key by bisection; raise `ValueError` if it is absent."""
        if isinstance(value, str):
            position = self.place(value)
            if position in range(len(self))[start:stop] and self.item(position) == value:
                return position
        raise ValueError(f"{value!r} is not among the {len(self):,} keys")

    def __contains__(self, value: object) -> bool:
        try:
            self.index(value)
        except ValueError:  # Includes the UnicodeEncodeError of a string with surrogates that no file name has.
            return False
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]  # Unhashable, like a list.

    def __repr__(self) -> str:
        return f"<{len(self):,} keys: {', '.join(map(repr, self[:3]))}{', ...' if len(self) > 3 else ''}>"


class Keys(SortedKeys):
    """Unique keys, sorted by their bytes, in one block of bytes: a key costs its own bytes and 8 more, and no object.

    Both may lie in a file that is mapped. A file name that is not UTF-8 becomes a string with surrogates, as Python's
    file functions return it.

    Example:
        >>> keys = Keys.pack([b"birds/heron.jpg", b"cats/chelsea.jpg"])
        >>> keys[1], "cats/chelsea.jpg" in keys, keys.index("birds/heron.jpg"), keys.place("birds/robin.jpg")
        ('cats/chelsea.jpg', True, 0, 1)
    """

    def __init__(self, block: bytes | memoryview, ends: array[int] | memoryview[int]) -> None:
        self.block, self.ends = block, ends

    @classmethod
    def pack(cls, sorted_keys: Iterable[bytes]) -> Keys:
        """Copy keys, sorted by their bytes, into one block."""
        block, ends = bytearray(), array("q")
        for key in sorted_keys:
            block += key
            ends.append(len(block))
        return Keys(bytes(block), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def nbytes(self) -> int:
        return len(self.block) + 8 * len(self.ends)

    def __iter__(self) -> Iterator[str]:
        ends = itertools.pairwise(itertools.chain((0,), self.ends))
        return (os.fsdecode(bytes(self.block[start:end])) for start, end in ends)

    def encoded(self, position: int) -> bytes:
        start = self.ends[position - 1] if position else 0
        return bytes(self.block[start : self.ends[position]])


def key_bytes(key: str) -> bytes:
    """Return the bytes by which keys are sorted: those of the file name, even if it is not UTF-8."""
    return key.encode("utf-8", "surrogateescape")


def images_sha256(keys: Iterable[str], sizes_bytes: Iterable[int]) -> str:
    """Return the digest of an image list: every key and every file size, in order."""
    digest, images = hashlib.sha256(), zip(keys, sizes_bytes, strict=True)
    while chunk := list(itertools.islice(images, _DIGEST_CHUNK)):
        digest.update(image_lines(chunk))
    return digest.hexdigest()


def image_lines(images: Iterable[tuple[str, int]]) -> bytes:
    """Return the bytes that a list's digest covers for some of its images, each a key and a size in bytes."""
    return key_bytes("".join([f"{key}\0{size_bytes}\n" for key, size_bytes in images]))
