"""Millions of images that were found, sorted by their keys and packed into a few blocks of numbers and bytes."""

from __future__ import annotations

import itertools
import operator
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from hookx.errors import ImageError
from hookx.images.addresses import shown_url
from hookx.images.columns import Column, Gathered
from hookx.images.files import LOOSE, Archive, Files
from hookx.images.sources.source import NUMBERS_OF_A_MEMBER, Found
from hookx.keys import Keys

_MARK_BYTES = 5
_NUMBER_BYTES = 8  # of an image's values
_PLACE_BYTES = 8 * NUMBERS_OF_A_MEMBER
_NO_PLACE = array("q", [LOOSE] * NUMBERS_OF_A_MEMBER).tobytes()

Choose = Callable[[list[bytes]], list[bytes]]


class _Kind(NamedTuple):
    """What images have in common that are found together."""

    root: bytes
    is_named: bool
    archive: Archive | None
    gives_paths: bool
    has_values: bool
    is_only_values: bool


class _Part(NamedTuple):
    """What follows a key: which kind of image it is, the number of its values (-1 if it has none), and where it is."""

    key: bytes
    kind: int
    values: int
    rest: bytes


class Packed(NamedTuple):
    """Images in the order of their keys."""

    files: Files
    member_sizes: array[int]  # of those that are members of archives; -1 for the others
    columns: list[Column]


class Pile:
    """Images in the order in which they were found, until they are packed.

    With ten million images memory counts, and nothing that Python can sort takes less than a flat list of bytes. So
    each key is followed by a mark for its kind, which leaves the order as it is: it begins with NUL, and no file name
    holds one. Behind the mark follows the number of the image's values, if there are columns, and where a member is in
    its archive, or the path of a file to which a table gave its key.
    """

    def __init__(self) -> None:
        self._kinds: dict[_Kind, bytes] = {}
        self._marked: list[bytes] = []
        self._columns = Gathered()
        self.unmatched = 0  # keys that had values, and no image

    def add(self, found: Found) -> None:
        kind = _Kind(
            found.root,
            found.is_named,
            found.archive,
            found.paths is not None,
            found.values is not None,
            found.is_only_values,
        )
        mark = self._kinds.setdefault(kind, len(self._kinds).to_bytes(_MARK_BYTES, "big"))
        if found.values is not None:
            first = self._columns.add(found.values, len(found.keys))
            of_values = range(first, first + len(found.keys))
            numbers: Iterable[bytes] = (mark + number.to_bytes(_NUMBER_BYTES, "big") for number in of_values)
        else:
            numbers = itertools.repeat(mark)
        if found.paths is not None:
            rests: Iterable[bytes] = found.paths
        elif found.archive is not None:
            places = found.places.tobytes()
            rests = (places[start : start + _PLACE_BYTES] for start in range(0, len(places), _PLACE_BYTES))
        else:
            self._marked += map(operator.add, found.keys, numbers)
            return
        self._marked += [key + number + rest for key, number, rest in zip(found.keys, numbers, rests, strict=False)]

    def settle(self) -> int:
        """Sort the keys, give values that came by themselves to their images, and return how many images there are."""
        self._marked.sort(reverse=True)
        if any(kind.is_only_values for kind in self._kinds):
            self._marked = list(self._matched())
        return len(self._marked)

    def _matched(self) -> Iterator[bytes]:
        """Yield the images; where values of the same key came by themselves, with their number."""
        kinds = list(self._kinds)
        for key, group in itertools.groupby(self._marked, lambda marked: marked.partition(b"\0")[0]):
            values, images = -1, []
            for marked in group:
                part = _part(marked, kinds)
                if not kinds[part.kind].is_only_values:
                    images.append((marked, part))
                elif values >= 0:
                    raise ImageError(f"the metadata of the folder names '{os.fsdecode(key)}' twice")
                else:
                    values = part.values
            if not images:
                self.unmatched += 1
            for marked, part in images:
                if values < 0 or part.values >= 0:
                    yield marked
                    continue
                with_values = kinds[part.kind]._replace(has_values=True)
                mark = self._kinds.setdefault(with_values, len(self._kinds).to_bytes(_MARK_BYTES, "big"))
                yield key + mark + values.to_bytes(_NUMBER_BYTES, "big") + part.rest

    def pack(self, choose: Choose, at_once: int) -> Packed:
        """Pack the keys that `choose` returns of all, sorted in reverse; the pile is empty after that.

        Args:
            at_once: a number of keys that bounds the memory that packing takes.
        """
        self._marked = choose(self._marked)
        kinds = list(self._kinds)
        packed = _Packed(kinds)
        last: list[bytes] = []
        while self._marked:
            marked = [*last, *self._marked[: -at_once - 1 : -1]]
            del self._marked[-at_once:]  # Frees their memory once they are packed.
            if packed.is_plain:
                keys = [one[:-_MARK_BYTES] for one in marked]
                numbers = [int.from_bytes(one[-_MARK_BYTES:], "big") for one in marked]
                packed.add_loose(keys, numbers, len(last))
            else:
                packed.add([_part(one, kinds) for one in marked], len(last))
            last = marked[-1:]
        return Packed(packed.files(), packed.sizes_bytes, self._columns.in_order(packed.values_of))


def _part(marked: bytes, kinds: Sequence[_Kind]) -> _Part:
    """Part a key from what follows it."""
    key, _, rest = marked.partition(b"\0")
    kind, rest = int.from_bytes(rest[: _MARK_BYTES - 1], "big"), rest[_MARK_BYTES - 1 :]
    if not kinds[kind].has_values:
        return _Part(key, kind, -1, rest)
    return _Part(key, kind, int.from_bytes(rest[:_NUMBER_BYTES], "big"), rest[_NUMBER_BYTES:])


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

    def __init__(self, kinds: Sequence[_Kind]) -> None:
        self._roots = [kind.root for kind in kinds]
        self._named = [number for number, kind in enumerate(kinds) if kind.is_named]
        self._archives = {number: kind.archive for number, kind in enumerate(kinds) if kind.archive is not None}
        self._have_paths = any(kind.gives_paths for kind in kinds)
        self._have_values = any(kind.has_values for kind in kinds)
        self.is_plain = not (self._archives or self._have_paths or self._have_values)
        self._root_of = array("i")
        self._keys, self._paths = _Texts(), _Texts()
        self._offsets, self._stored_bytes, self.sizes_bytes = array("q"), array("q"), array("q")
        self.values_of = array("q")

    def add_loose(self, keys: list[bytes], numbers: list[int], old: int) -> None:
        """Add loose files; the first `old` of them have been added before."""
        self._check_unique(keys, lambda place: self._roots[numbers[place]] + keys[place])
        self._keys.extend(keys[old:])
        self._root_of.extend(numbers[old:])

    def add(self, parts: list[_Part], old: int) -> None:
        """Add images of any kind; the first `old` of them have been added before."""

        def name(place: int) -> bytes:
            key, number, _, rest = parts[place]
            path = rest if rest and number not in self._archives else self._roots[number] + key
            return os.fsencode(shown_url(os.fsdecode(path)))

        keys = [part.key for part in parts]
        self._check_unique(keys, name)
        self._keys.extend(keys[old:])
        self._root_of.extend(part.kind for part in parts[old:])
        if self._have_values:
            self.values_of.extend(part.values for part in parts[old:])
        if self._have_paths:
            self._paths.extend([b"" if part.kind in self._archives else part.rest for part in parts[old:]])
        if self._archives:
            places = [part.rest if part.kind in self._archives else _NO_PLACE for part in parts[old:]]
            numbers = array("q", b"".join(places))
            for column, values in enumerate((self._offsets, self._stored_bytes, self.sizes_bytes)):
                values.extend(numbers[column::NUMBERS_OF_A_MEMBER])

    def files(self) -> Files:
        paths = self._paths.as_keys() if self._have_paths else None
        places = (self._offsets, self._stored_bytes)
        return Files(self._keys.as_keys(), self._roots, self._root_of, self._archives, *places, self._named, paths)

    def _check_unique(self, keys: list[bytes], name: Callable[[int], bytes]) -> None:
        for twice in itertools.compress(range(len(keys)), map(operator.eq, keys, keys[1:])):
            raise ImageError(
                f"two images have the key '{os.fsdecode(keys[twice])}': {os.fsdecode(name(twice))} and "
                f"{os.fsdecode(name(twice + 1))}",
                "name the folder that holds both, or run twice",
            )
