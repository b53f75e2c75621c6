"""Members of an archive that say more about an image, as WebDataset and img2dataset write them: .cls, .json and .txt.

They belong to the images of their sample, whose members share a folder, and a name up to its first dot.
Source: https://github.com/webdataset/webdataset#the-webdataset-format
"""

from __future__ import annotations

import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hookx.images.columns import Values
from hookx.images.sources.kinds import NotTaken

_SUFFIXES = (b".cls", b".json", b".txt")
_MAX_BYTES = 2**24
SAMPLES_AT_ONCE = 2_000
_CLASS = re.compile(r"-?(0|[1-9]\d{0,17})")

Read = Callable[[int, int, int], bytes]  # a member by its offset, the bytes that it takes, and its size


def is_sidecar(name: bytes) -> bool:
    return name[name.rfind(b".") :].lower() in _SUFFIXES


class Sidecars:
    """The sidecars of one archive, as they are found."""

    def __init__(self) -> None:
        self._names: list[bytes] = []
        self._places = array("q")

    def add(self, name: bytes, offset: int, stored_bytes: int, size_bytes: int) -> None:
        self._names.append(name)
        self._places.fromlist([offset, stored_bytes, size_bytes])

    def match(self, images: Sequence[bytes], not_taken: NotTaken) -> list[list[int]]:
        """Return the numbers of the sidecars of each image, by the names of the images; count those of no image."""
        by_sample: dict[bytes, list[int]] = {}
        for number, name in enumerate(self._names):
            by_sample.setdefault(_sample(name), []).append(number)
        nothing: list[int] = []
        matched = [by_sample.get(_sample(name), nothing) for name in images]
        for sample in by_sample.keys() - set(map(_sample, images)):
            for number in by_sample[sample]:
                not_taken.add(self._names[number])
        return matched

    def read(
        self, matched: Sequence[list[int]], read: Read, take: Callable[[list[str]], list[str]]
    ) -> Iterator[Values]:
        """Yield the values of images, some at a time; an object of JSON has a column for each field."""
        for start in range(0, len(matched), SAMPLES_AT_ONCE):
            some = matched[start : start + SAMPLES_AT_ONCE]
            rows = [self._row(numbers, read) for numbers in some]
            names = take(list(dict.fromkeys(itertools.chain.from_iterable(rows))))
            yield Values({name: [row.get(name) for row in rows] for name in names})

    def _row(self, numbers: Sequence[int], read: Read) -> Mapping[str, Any]:
        row: dict[str, Any] = {}
        for number in sorted(numbers, key=lambda number: not self._names[number].lower().endswith(b".json")):
            offset, stored_bytes, size_bytes = self._places[3 * number : 3 * number + 3]
            if size_bytes > _MAX_BYTES:
                continue
            suffix = self._names[number].lower().rpartition(b".")[2].decode()
            row |= _parse(suffix, read(offset, stored_bytes, size_bytes).decode("utf-8", "surrogateescape"))
        return row


def _parse(suffix: str, text: str) -> Mapping[str, Any]:
    if suffix == "json":
        try:
            value = json.loads(text)
        except ValueError:
            return {suffix: text}
        return value if isinstance(value, dict) else {suffix: value}
    text = text.rstrip("\r\n")
    return {suffix: int(text) if suffix == "cls" and _CLASS.fullmatch(text) else text}


def _sample(name: bytes) -> bytes:
    folder, slash, base = name.rpartition(b"/")
    return folder + slash + base.partition(b".")[0]
