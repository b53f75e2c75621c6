"""What is known of images beside their pixels: the columns of tables, sidecars and folders, in the order of the images.

Values are kept as text in a temporary file until the images are sorted: captions take more room than keys. What a
column holds follows from all of its values. A table without types, such as a .csv, holds integers or numbers if every
value is written as one: '007' stays text, and so does an integer of more than 64 bits.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import mmap
import re
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal

from hookx.errors import ImageError
from hookx.images.retries import reason_of
from hookx.keys import Keys

Kind = Literal["int", "float", "bool", "text"]
Value = int | float | bool | str | None
_KINDS: dict[type, Kind] = {bool: "bool", int: "int", float: "float", str: "text"}
_INTEGER = re.compile(rb"-?(0|[1-9]\d{0,18})")
_NUMBER = re.compile(rb"-?(0|[1-9]\d*)(\.\d*)?([eE][+-]?\d+)?")
_LIMIT = 2**63
_MISSING = -1  # in place of the length of a text


@dataclass(frozen=True)
class Values:
    """The values of some images by column: as many in each as there are images; None where there is none.

    Attributes:
        are_typed: a text is one, even if it looks like a number; an empty text is not the lack of one.
    """

    by_name: Mapping[str, Sequence[Any]]
    are_typed: bool = True

    def where(self, chosen: Sequence[bool]) -> Values:
        by_name = {name: list(itertools.compress(values, chosen)) for name, values in self.by_name.items()}
        return Values(by_name, self.are_typed)


@dataclass(frozen=True)
class Column:
    """One column of a list of images; iterate over it for the value of each image, in their order."""

    name: str
    kind: Kind
    texts: Texts
    numbers: Sequence[int]  # of the image's values among all that were added; negative if it has none

    def __iter__(self) -> Iterator[Value]:
        parse = _PARSERS[self.kind]
        return (None if text is None else parse(text) for text in self.texts.at(self.numbers))


@dataclass(frozen=True)
class FolderColumn:
    """The name of the folder that each image is in, as class folders have it; None where there is no folder."""

    name: str
    keys: Keys
    kind: Kind = "text"

    def __iter__(self) -> Iterator[Value]:
        return (key.rpartition("/")[0].rpartition("/")[2] or None for key in self.keys)


class _Spool:
    """A temporary file that has no name, and goes with the last column that needs it."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed below
        self._size_bytes = 0

    def append(self, content: bytes) -> int:
        """Write behind what there is; return where that begins."""
        self._file.write(content)
        self._size_bytes += len(content)
        return self._size_bytes - len(content)

    def content(self) -> mmap.mmap | bytes:
        self._file.flush()
        return mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) if self._size_bytes else b""

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self._file.close()


class Texts:
    """The texts of one column in a file that all columns share; 12 bytes of memory each."""

    def __init__(self, spool: _Spool) -> None:
        self._spool, self._ends, self._lengths = spool, array("q"), array("i")
        self._kinds: set[Kind] = set()

    def add(self, values: Sequence[Any], before: int, are_typed: bool) -> None:
        """Add values behind those of `before` images, which may be more than have values here."""
        self._fill(before)
        texts = [_encode(value, are_typed) for value in values]
        start = self._spool.append(b"".join(filter(None, texts)))
        ends = itertools.accumulate((len(text or b"") for text in texts), initial=start)
        self._ends.extend(itertools.islice(ends, 1, None))
        self._lengths.extend(_MISSING if text is None else len(text) for text in texts)
        there = [text for text in texts if text is not None]
        if are_typed:
            self._kinds |= {_KINDS.get(type(value), "text") for value in values if value is not None}
            if not self._is_text and not all(map(_fits, (value for value in values if type(value) is int))):
                self._kinds.add("text")
        elif there and not self._is_text:
            self._kinds.add(_kind_of(there))

    @property
    def _is_text(self) -> bool:
        return "text" in self._kinds

    def _fill(self, count: int) -> None:
        lacking = count - len(self._lengths)
        self._ends.extend([0] * lacking)
        self._lengths.extend([_MISSING] * lacking)

    @property
    def kind(self) -> Kind:
        """What all values are."""
        if len(self._kinds) == 1:
            return next(iter(self._kinds))
        return "float" if self._kinds == {"int", "float"} else "text"

    def at(self, numbers: Sequence[int]) -> Iterator[bytes | None]:
        """Yield the texts of these numbers; None for a negative one, and where there is no text."""
        content = self._spool.content()
        for number in numbers:
            if not 0 <= number < len(self._lengths) or (length := self._lengths[number]) == _MISSING:
                yield None
            else:
                yield content[self._ends[number] - length : self._ends[number]]


class Gathered:
    """Columns in the order in which images are found."""

    def __init__(self) -> None:
        self._spool: _Spool | None = None
        self._texts: dict[str, Texts] = {}
        self._count = 0

    def __bool__(self) -> bool:
        return bool(self._texts)

    def add(self, values: Values, count: int) -> int:
        """Add the values of some images; return the number of the first."""
        try:
            self._spool = self._spool or _Spool()
            for name, some in values.by_name.items():
                texts = self._texts.setdefault(name, Texts(self._spool))
                texts.add(some, self._count, values.are_typed)
        except OSError as error:
            raise ImageError(
                f"cannot keep the columns of the images in {tempfile.gettempdir()}: {reason_of(error)}",
                "make room there, set TMPDIR, or take fewer: --columns NAME",
            ) from None
        self._count += count
        return self._count - count

    def in_order(self, numbers: Sequence[int]) -> list[Column]:
        """Return the columns of images that are given by their numbers; -1 for one without values."""
        return [Column(name, texts.kind, texts, numbers) for name, texts in self._texts.items()]


def _encode(value: Any, are_typed: bool) -> bytes | None:
    if value is None or (value == "" and not are_typed):
        return None
    if isinstance(value, bool):
        return b"true" if value else b"false"
    if isinstance(value, float):
        return repr(value).encode()
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    try:
        return str(value).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair of surrogates, as JSON can spell it
        return str(value).encode("utf-8", "backslashreplace")


def _decode(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


_PARSERS: Mapping[Kind, Callable[[bytes], Value]] = {
    "int": int,
    "float": float,
    "bool": b"true".__eq__,
    "text": _decode,
}


def _fits(number: int) -> bool:
    return -_LIMIT <= number < _LIMIT


def _kind_of(texts: Sequence[bytes]) -> Kind:
    """Return what texts of a table without types hold."""
    if all(_INTEGER.fullmatch(text) and _fits(int(text)) for text in texts):
        return "int"
    is_number = all((match := _NUMBER.fullmatch(text)) and (match[2] or match[3] or _fits(int(text))) for text in texts)
    return "float" if is_number else "text"
