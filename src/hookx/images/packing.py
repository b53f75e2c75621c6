"""Millions of images that were found, sorted by their keys and packed into a few blocks of numbers and bytes."""

from __future__ import annotations

import itertools
import operator
import os
from array import array
from collections.abc import Callable, Iterable, Sequence

from hookx.errors import ImageError
from hookx.images.files import LOOSE, Archive, Files
from hookx.images.sources.source import NUMBERS_OF_A_MEMBER, Found
from hookx.keys import Keys

_MARK_BYTES = 5
_PLACE_BYTES = 8 * NUMBERS_OF_A_MEMBER
_NO_PLACE = array("q", [LOOSE] * NUMBERS_OF_A_MEMBER).tobytes()

Choose = Callable[[list[bytes]], list[bytes]]


class Pile:
    """Images in the order in which they were found, until they are packed.

    With ten million images memory counts, and nothing that Python can sort takes less than a flat list of bytes. So
    each key is followed by a mark for its root, which leaves the order as it is: it begins with NUL, and no file name
    holds one. Behind the mark follows where a member is in its archive, or the path of a file to which a table gave its
    key.
    """

    def __init__(self) -> None:
        self._marks: dict[tuple[bytes, bool, Archive | None, bool], bytes] = {}
        self._marked: list[bytes] = []

    def __len__(self) -> int:
        return len(self._marked)

    def add(self, found: Found) -> None:
        described = found.root, found.is_named, found.archive, found.paths is not None
        mark = self._marks.setdefault(described, len(self._marks).to_bytes(_MARK_BYTES, "big"))
        if found.paths is not None:
            self._marked += [key + mark + path for key, path in zip(found.keys, found.paths, strict=True)]
        elif found.archive is not None:
            places = found.places.tobytes()
            starts = range(0, len(places), _PLACE_BYTES)
            self._marked += [
                key + mark + places[start : start + _PLACE_BYTES] for key, start in zip(found.keys, starts, strict=True)
            ]
        else:
            self._marked += [key + mark for key in found.keys]

    def pack(self, choose: Choose, at_once: int) -> tuple[Files, array[int]]:
        """Sort the keys and pack those that `choose` returns of them, sorted in reverse; the pile is empty after that.

        Return the files, and the sizes of those that are members of archives; -1 for the others.

        Args:
            at_once: a number of keys that bounds the memory that packing takes.
        """
        self._marked.sort(reverse=True)
        self._marked = choose(self._marked)
        marks = list(self._marks)
        archives = {number: archive for number, (_, _, archive, _) in enumerate(marks) if archive is not None}
        has_paths = any(gives_paths for _, _, _, gives_paths in marks)
        packed = _Packed([root for root, _, _, _ in marks], archives)
        last: list[bytes] = []
        while self._marked:
            marked = [*last, *self._marked[: -at_once - 1 : -1]]
            del self._marked[-at_once:]  # Frees their memory once they are packed.
            if archives or has_paths:
                packed.add([_part(one) for one in marked], len(last), has_paths=has_paths)
            else:
                keys = [one[:-_MARK_BYTES] for one in marked]
                numbers = [int.from_bytes(one[-_MARK_BYTES:], "big") for one in marked]
                packed.add_loose(keys, numbers, len(last))
            last = marked[-1:]
        named = [number for number, (_, is_named, _, _) in enumerate(marks) if is_named]
        return packed.files(named, has_paths=has_paths), packed.sizes_bytes


def _part(marked: bytes) -> tuple[bytes, int, bytes]:
    """Part a key from the number of its root and from what follows its mark."""
    key, _, mark = marked.partition(b"\0")
    return key, int.from_bytes(mark[: _MARK_BYTES - 1], "big"), mark[_MARK_BYTES - 1 :]


class _Texts:
    """Texts in one block of bytes."""

    def __init__(self) -> None:
        self._block, self._ends = bytearray(), array("q")

    def extend(self, texts: Sequence[bytes]) -> None:
        ends = itertools.accumulate(map(len, texts), initial=len(self._block))
        self._ends.extend(itertools.islice(ends, 1, None))
        self._block += b"".join(texts)

    def as_keys(self) -> Keys:
        return Keys(bytes(self._block), self._ends)


class _Packed:
    """What is packed by now, in the order of the keys."""

    def __init__(self, roots: Sequence[bytes], archives: dict[int, Archive]) -> None:
        self.roots, self.archives = roots, archives
        self.root_of = array("i")
        self._keys, self._paths = _Texts(), _Texts()
        self.offsets, self.stored_bytes, self.sizes_bytes = array("q"), array("q"), array("q")

    def add_loose(self, keys: list[bytes], numbers: list[int], old: int) -> None:
        """Add loose files; the first `old` of them have been added before."""
        self._check_unique(keys, lambda place: self.roots[numbers[place]] + keys[place])
        self._keys.extend(keys[old:])
        self.root_of.extend(numbers[old:])

    def add(self, parted: list[tuple[bytes, int, bytes]], old: int, *, has_paths: bool) -> None:
        """Add images of any kind; the first `old` of them have been added before."""

        def name(place: int) -> bytes:
            key, number, rest = parted[place]
            return rest if rest and number not in self.archives else self.roots[number] + key

        keys = [key for key, _, _ in parted]
        self._check_unique(keys, name)
        self._keys.extend(keys[old:])
        self.root_of.extend(number for _, number, _ in parted[old:])
        if has_paths:
            self._paths.extend([b"" if number in self.archives else rest for _, number, rest in parted[old:]])
        if self.archives:
            places = [rest if number in self.archives else _NO_PLACE for _, number, rest in parted[old:]]
            numbers = array("q", b"".join(places))
            for column, values in enumerate((self.offsets, self.stored_bytes, self.sizes_bytes)):
                values.extend(numbers[column::NUMBERS_OF_A_MEMBER])

    def files(self, named: Iterable[int], *, has_paths: bool) -> Files:
        paths = self._paths.as_keys() if has_paths else None
        places = (self.offsets, self.stored_bytes)
        return Files(self._keys.as_keys(), self.roots, self.root_of, self.archives, *places, list(named), paths)

    def _check_unique(self, keys: list[bytes], name: Callable[[int], bytes]) -> None:
        for twice in itertools.compress(range(len(keys)), map(operator.eq, keys, keys[1:])):
            raise ImageError(
                f"two images have the key '{os.fsdecode(keys[twice])}': {os.fsdecode(name(twice))} and "
                f"{os.fsdecode(name(twice + 1))}",
                "name the folder that holds both, or run twice",
            )
