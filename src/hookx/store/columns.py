"""What is known of the images of a run beside their activations: labels, captions, whatever came with them.

`columns.safetensors` holds a value for every listed image, in the order of the list, those that could not be read
included. It decides no activation, so it stands outside the plan, and may be replaced. A column of numbers is a tensor,
one of texts two: all of them in UTF-8, one behind the other, and where each ends. If some images have no value, another
tensor says which have one.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from hookx.errors import ShardError
from hookx.plan import Plan
from hookx.store.files import is_there, report_read_errors
from hookx.store.format import Header, checksum_in_file, open_shard
from hookx.store.location import Location
from hookx.store.reading import Readable, read_range

COLUMNS = "columns.safetensors"
Kind = Literal["int", "float", "bool", "text"]
Value = int | float | bool | str | None
_FORMAT = "hookx-columns-1"
# How numbers are stored: the code of Python's arrays, safetensors' name, and numpy's.
_NUMBERS = {"int": ("q", "I64", "<i8"), "float": ("d", "F64", "<f8"), "bool": ("B", "BOOL", "?")}
_PARTS = ("values", "ends", "has_value")
_MAX = 2**62
_AT_ONCE = 2**16  # values


class Column(Protocol):
    """A column of the images of a list; iterating over it yields a value for each, in their order, or None."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> Kind: ...

    def __iter__(self) -> Iterator[Value]: ...


def write_columns(file: Path, columns: Sequence[Column], image_count: int) -> None:
    """Write the columns of a list of images to a new file."""
    described = json.dumps([[column.name, column.kind] for column in columns])
    metadata = {"format": _FORMAT, "columns": described, "images": str(image_count), "crc32": str(2**32)}
    longest = {f"{number}.{part}": _entry("BOOL", _MAX, _MAX) for number in range(len(columns)) for part in _PARTS}
    header_bytes = len(json.dumps({"__metadata__": metadata, **longest}).encode())
    header_bytes += -header_bytes % 8
    with open(file, "xb") as written:
        written.write(bytes(8 + header_bytes))
        writer = _Writer(written, crc32(described.encode()))
        for number, column in enumerate(columns):
            writer.add(f"{number}.", column)
        metadata["crc32"] = str(writer.checksum)
        header = json.dumps({"__metadata__": metadata, **writer.entries}).encode()
        written.seek(0)
        written.write(header_bytes.to_bytes(8, "little") + header.ljust(header_bytes))


class _Writer:
    """Writes tensors one behind the other, and keeps where they are."""

    def __init__(self, file: BinaryIO, checksum: int) -> None:
        self._file, self.checksum, self._end = file, checksum, 0
        self.entries: dict[str, Any] = {}

    def add(self, prefix: str, column: Column) -> None:
        values, has_value = iter(column), bytearray()
        start, ends = self._end, array("q")
        while some := list(islice(values, _AT_ONCE)):
            has_value += bytes(value is not None for value in some)
            if column.kind == "text":
                texts = [str(value or "").encode("utf-8", "surrogateescape") for value in some]
                for text in texts:
                    ends.append((ends[-1] if ends else 0) + len(text))
                self._put(b"".join(texts))
            else:
                self._put(array(_NUMBERS[column.kind][0], [value or 0 for value in some]))
        if column.kind == "text":
            self._close(f"{prefix}values", "U8", start, 1)
            self._put(ends)
            self._close(f"{prefix}ends", "I64", start + (ends[-1] if ends else 0), 8)
        else:
            self._close(f"{prefix}values", _NUMBERS[column.kind][1], start, array(_NUMBERS[column.kind][0]).itemsize)
        if not all(has_value):
            start = self._end
            self._put(has_value)
            self._close(f"{prefix}has_value", "BOOL", start, 1)

    def _put(self, data: bytes | bytearray | array[Any]) -> None:
        content = memoryview(data).cast("B") if data else b""
        self.checksum = crc32(content, self.checksum)
        self._file.write(content)
        self._end += len(content)

    def _close(self, name: str, dtype: str, start: int, width: int) -> None:
        self.entries[name] = _entry(dtype, start, self._end, (self._end - start) // width)


def _entry(dtype: str, start: int, end: int, count: int = _MAX) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [count], "data_offsets": [start, end]}


@dataclass(frozen=True)
class StoredColumns:
    """The columns of a run.

    Attributes:
        kinds: what each column holds, by name.
        checksum: the CRC-32 of the names and all values.
    """

    file: Location
    kinds: dict[str, Kind]
    header: Header
    checksum: int

    def read(self, name: str, start: int, stop: int) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return the values of some images, and which of them have one; None if all do. Texts are Python's."""
        number, kind = list(self.kinds).index(name), self.kinds[name]
        with open_shard(self.file) as (opened, _):
            present = self._tensor(opened, f"{number}.has_value", "?", start, stop)
            if kind != "text":
                values = self._tensor(opened, f"{number}.values", _NUMBERS[kind][2], start, stop)
                assert values is not None
                return values, present
            before = max(0, start - 1)
            ends = self._tensor(opened, f"{number}.ends", "<i8", before, stop)
            assert ends is not None
            ends = ends if start else np.concatenate([[0], ends])
            place = self.header.tensors[f"{number}.values"]
            if (np.diff(ends, prepend=0) < 0).any() or ends[-1] > place.stop - place.start:
                raise ShardError(self.file, f"is damaged: the texts of '{name}' overlap")
            text = read_range(opened, place.start + int(ends[0]), place.start + int(ends[-1]))
        cuts = (ends - ends[0]).tolist()
        texts = [text[one:other].decode("utf-8", "surrogateescape") for one, other in pairwise(cuts)]
        values = np.empty(len(texts), dtype=object)
        values[:] = texts
        return values, present

    def rows(self, start: int, stop: int) -> Iterator[tuple[Value, ...]]:
        """Yield the values of some images, one image at a time; None where there is none."""
        columns = []
        for name in self.kinds:
            values, present = self.read(name, start, stop)
            some: list[Value] = values.tolist()
            if present is not None:
                some = [value if is_there else None for value, is_there in zip(some, present.tolist(), strict=True)]
            columns.append(some)
        return zip(*columns, strict=True)

    def is_damaged(self) -> bool:
        """Read all values; return whether they differ from what was written."""
        places = self.header.tensors.values()
        start, stop = (
            min((place.start for place in places), default=0),
            max((place.stop for place in places), default=0),
        )
        names = crc32(self.header.metadata["columns"].encode())
        with open_shard(self.file) as (opened, _):
            return checksum_in_file(opened, start, stop, names) != self.checksum

    def _tensor(self, opened: Readable, name: str, dtype: str, start: int, stop: int) -> NDArray[Any] | None:
        place = self.header.tensors.get(name)
        if place is None:
            return None
        width = np.dtype(dtype).itemsize
        return np.frombuffer(read_range(opened, place.start + start * width, place.start + stop * width), dtype)


def open_columns(path: Location, plan: Plan) -> StoredColumns | None:
    """Open the columns of a run; None if it has none. `ShardError` if they are damaged, or those of another list."""
    file = path / COLUMNS
    with report_read_errors(file):
        if not is_there(file):
            return None
    with open_shard(file) as (_, header):
        try:
            metadata = header.metadata
            kinds = {str(name): kind for name, kind in json.loads(metadata["columns"])}
            count, checksum = int(metadata["images"]), int(metadata["crc32"])
            is_known = metadata["format"] == _FORMAT
            is_whole = _fits(header, list(kinds.values()), count)
        except (LookupError, TypeError, ValueError) as error:
            raise ShardError(file, f"is damaged: {type(error).__name__}: {error}") from None
    if not is_known:
        raise ShardError(file, "is not of a kind that this version of hookx reads")
    if count != plan.image_count:
        raise ShardError(file, f"is not that of the {plan.image_count:,} images of this run")
    if not is_whole:
        raise ShardError(file, "is damaged: its tensors are not those of its columns")
    return StoredColumns(file, kinds, header, checksum)


def _fits(header: Header, kinds: Sequence[Kind], count: int) -> bool:
    """Return whether a header has exactly the tensors that some columns take."""
    there = {name: (place.dtype, place.shape) for name, place in header.tensors.items()}
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for number, kind in enumerate(kinds):
        values = f"{number}.values"
        if kind == "text":
            expected[f"{number}.ends"] = ("I64", (count,))
            expected[values] = ("U8", there[values][1])
        else:
            expected[values] = (_NUMBERS[kind][1], (count,))
        if f"{number}.has_value" in there:
            expected[f"{number}.has_value"] = ("BOOL", (count,))
    return there == expected


def free_names(names: Iterable[str], taken: Collection[str]) -> list[str]:
    """Return names for columns beside others, which keep theirs: 'key' becomes 'columns.key'.

    Example:
        >>> free_names(["label", "key"], ["key", "shard", "row"])
        ['label', 'columns.key']
    """
    used, free = set(taken), []
    for name in names:
        while name in used:
            name = f"columns.{name}"
        used.add(name)
        free.append(name)
    return free
