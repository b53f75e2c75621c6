"""Millions of image keys in one block of bytes, and their digest."""

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

_IMAGES_AT_ONCE = 10_000  # of a list, in its digest
_Item = TypeVar("_Item", covariant=True)


class LazySequence(Sequence[_Item]):
    """A sequence whose items are made when they are looked at, and not kept; a slice is a list of them."""

    @abstractmethod
    def item(self, position: int) -> _Item:
        """Make the item at a position, which counts from 0 and exists."""

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


def images_sha256(keys: Iterable[str], sizes_bytes: Iterable[int]) -> str:
    """Return the digest of an image list: every key and every file size, in order."""
    digest, images = hashlib.sha256(), zip(keys, sizes_bytes, strict=True)
    while some := list(itertools.islice(images, _IMAGES_AT_ONCE)):
        digest.update(image_lines(some))
    return digest.hexdigest()


def image_lines(images: Iterable[tuple[str, int]]) -> bytes:
    """Return what stands for some images, each a key and a size in bytes, in the digest of a list."""
    return key_bytes("".join([f"{key}\0{size_bytes}\n" for key, size_bytes in images]))


def key_bytes(key: str) -> bytes:
    """Return a key as the bytes by which keys are ordered; a file name that is no UTF-8 has its own again."""
    return key.encode("utf-8", "surrogateescape")


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

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends:
            yield os.fsdecode(self._block[start:end])
            start = end

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
