"""Lines of tables that people open: names of files stay text in a spreadsheet, and come back unchanged.

Anybody can name a file as in `=cmd|' /C calc'!A0.png`, which a spreadsheet takes for a formula and runs. So a field
that could be taken for one begins with an apostrophe, and so does one that begins with an apostrophe by itself. Reading
a table, drop the first character of a field that begins with an apostrophe: nothing else is changed.

Source: https://owasp.org/www-community/attacks/CSV_Injection
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from hookx.keys import key_bytes

# Also behind spaces and quotation marks, which some programs take away, and in the full width of East Asian fonts.
_FORMULA = re.compile("['\t\r\n]|[\\s\"\\ufeff]*[=+\\-@\uff1d\uff0b\uff0d\uff20]")


def to_field(text: str) -> str:
    """Return a text as a field that no spreadsheet takes for a formula.

    Example:
        >>> to_field("cats/a.png"), to_field("=1+1.png"), to_field("'tis.png")
        ('cats/a.png', "'=1+1.png", "''tis.png")
    """
    return f"'{text}" if _FORMULA.match(text) else text


def from_field(field: str) -> str:
    """Return the text of a field.

    Example:
        >>> [from_field(to_field(text)) for text in ("-a.png", "'b'.png", "c'.png")]
        ['-a.png', "'b'.png", "c'.png"]
    """
    return field.removeprefix("'")


def value_field(value: float | str | None) -> str:
    """Return a value of a column as a field: numbers as they are, because none is a formula; '' for none.

    Example:
        >>> [value_field(value) for value in (-5, 0.1, True, None, "-5")]
        ['-5', '0.1', 'true', '', "'-5"]
    """
    if isinstance(value, str):
        return to_field(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value is None else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[str | int]], *, as_fields: bool = True) -> Iterator[bytes]:
    """Yield the lines of a table; without `as_fields`, as an earlier version of hookx wrote them."""
    yield line(header)
    for row in rows:
        yield line([to_field(value) if as_fields and isinstance(value, str) else value for value in row])


def line(row: Iterable[str | int]) -> bytes:
    """Return a line of CSV; a file name that is not UTF-8 keeps its bytes."""
    return b",".join(map(_quote, map(str, row))) + b"\n"


def read_rows(file: TextIO) -> Iterator[list[str]]:
    """Yield the rows below the header of a table that was opened with `newline=''`."""
    rows = csv.reader(file)
    next(rows, None)
    return ([from_field(field) for field in row] for row in rows)


def _quote(text: str) -> bytes:
    # Not by `csv.writer`, which quotes carriage returns in some versions of Python only.
    if re.search('[",\r\n]', text):
        text = '"{}"'.format(text.replace('"', '""'))
    return key_bytes(text)
