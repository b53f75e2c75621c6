"""A table of images: .csv, .tsv, .jsonl or .parquet, with a column of paths, or of the images themselves."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from hookx.errors import ImageError, closest
from hookx.images.addresses import check_named, folder_and_name, is_url, join_url, shown_url, without_query
from hookx.images.columns import Values
from hookx.images.remote import open_remote
from hookx.images.retries import reason_of
from hookx.images.sources.embedded import EmbeddedSource
from hookx.images.sources.kinds import TABLES, refuse_listed
from hookx.images.sources.named import find_named, normalise, shown, to_key
from hookx.images.sources.parquet import ParquetTable
from hookx.images.sources.source import THEN_AGAIN, Found, Look
from hookx.options import RETRY_SECONDS

FILE_NAME = "file_name"  # the column of paths in a folder's own metadata
_PATH_COLUMNS = ("path", FILE_NAME, "image", "image_path", "filepath", "filename", "url")
_ROWS_AT_ONCE = 2_000
_TYPED = (".jsonl", ".parquet")
_MAX_FIELD_CHARACTERS = 2**24  # Python's own limit is 131,072, which a caption can exceed.

Batch = Mapping[str, Sequence[Any]]  # some rows by column: as many values in each


@dataclass(frozen=True)
class TableSource:
    """The images that a table names; paths are relative to its folder, and so are keys, unless a column holds those.

    All other columns are what is known of the images. Images within a .parquet have keys as those of an archive have:
    the table's name, '/', and the path that they had, or the number of their row.
    """

    path: str
    retry_seconds: float = RETRY_SECONDS

    def find(self, look: Look) -> Iterator[Found]:
        with self._telling():
            if self._suffix == ".parquet":
                with ParquetTable(self.path, self.retry_seconds) as table:
                    column = self._column_of_images(table, look)
                if column:
                    yield from EmbeddedSource(self.path, column).find(look)
                    return
            here = self._folder
            for some in self._rows(look):
                refuse_listed(some.paths)
                paths = [_join(here, path) for path in some.paths]
                if some.keys is not None:
                    yield Found(b"", some.keys, paths=paths, is_named=True, values=some.values)
                else:
                    yield from find_named(paths, here, here, look, shown_url(self.path), some.values)

    def find_values(self, beginning: bytes, look: Look) -> Iterator[Found]:
        """Yield what the table says about images below its folder, which are found elsewhere, by their keys."""
        here = self._folder
        with self._telling():
            for some in self._rows(replace(look, path_column=FILE_NAME, key_column="")):
                paths = [_join(here, path) for path in some.paths]
                # A path that leads out of the folder matches no key, and is counted as a row without an image.
                keys = [beginning + path[len(here) :] if path.startswith(here) else path for path in paths]
                yield Found(b"", keys, values=some.values, is_only_values=True)

    def has_column(self, name: str) -> bool:
        """Return whether the table has a column, by its first row."""
        with self._telling():
            return name in next(self._read(None, rows_at_once=1), {})

    def _rows(self, look: Look) -> Iterator[_Some]:
        """Yield the rows that have a path, some at a time."""
        path_column, key_column, others, wanted = "", "", list[str](), None
        if self._suffix == ".parquet":
            with ParquetTable(self.path, self.retry_seconds) as table:
                path_column, key_column, others = self._choose(table.plain_columns, look)
            wanted = list(dict.fromkeys(filter(None, (path_column, key_column, *others))))
        start = 1
        for batch in self._read(wanted):
            if not path_column:
                path_column, key_column, others = self._choose(list(batch), look)
            elif wanted is None:  # Every line of JSON can have fields of its own.
                others += look.take(name for name in batch if name not in (path_column, key_column, *others))
            count = len(next(iter(batch.values())))
            paths = batch.get(path_column) or [None] * count
            there = list(map(bool, paths))
            if not all(there):
                look.not_taken.add_kind("rows without a path", there.count(False))
                batch = {name: list(itertools.compress(values, there)) for name, values in batch.items()}
            numbers = list(itertools.compress(range(start, start + count), there))
            start += count
            if not numbers:
                continue
            if key_column and key_column not in batch:  # as a stretch of JSON can lack it
                batch = {**batch, key_column: [None] * len(numbers)}
            paths = list(zip(batch[path_column], numbers, strict=True))
            keys = list(zip(batch[key_column], numbers, strict=True)) if key_column else None
            shown_path = shown_url(self.path)
            values = {name: batch[name] for name in others if name in batch}
            yield _Some(
                [self._to_path(path, number, path_column) for path, number in paths],
                [to_key(key, shown_path, number, key_column) for key, number in keys] if keys is not None else None,
                Values(values, self._suffix in _TYPED) if others else None,
            )
        if start == 1:
            raise ImageError(f"{self._shown} has no rows")

    def _choose(self, names: Sequence[str], look: Look) -> tuple[str, str, list[str]]:
        """Return the columns of the paths and of the keys ('' if the paths are the keys), and others to take."""
        for asked in filter(None, (look.path_column, look.key_column)):
            if asked not in names:
                raise ImageError(f"{self._shown} has no column '{asked}'; closest: {closest(asked, names)}")
        path_column = look.path_column or next((name for name in _PATH_COLUMNS if name in names), "")
        if not path_column:
            raise ImageError(
                f"{self._shown} has none of the columns {', '.join(_PATH_COLUMNS)}",
                f"name the one that holds the paths: --path-column {names[0] if names else 'NAME'}",
            )
        # What the key says already would be there twice.
        known = look.key_column or path_column
        return path_column, look.key_column, look.take(names, but=known)

    def _column_of_images(self, table: ParquetTable, look: Look) -> str:
        """Return the column that holds images; '' if the table names them by paths."""
        if look.path_column:
            return look.path_column if look.path_column in table.image_columns else ""
        if {*table.plain_columns} & {*_PATH_COLUMNS} or not table.image_columns:
            return ""
        if len(table.image_columns) > 1:
            raise ImageError(
                f"{self._shown} holds bytes in the columns {', '.join(table.image_columns)}",
                f"name the one that holds the images: --path-column {table.image_columns[0]}",
            )
        return table.image_columns[0]

    # --- reading ---

    @property
    def _suffix(self) -> str:
        return os.path.splitext(without_query(self.path))[1].lower()

    @property
    def _shown(self) -> str:
        return f"'{shown_url(self.path)}'"

    @property
    def _folder(self) -> bytes:
        """The folder that paths are relative to, with '/' at its end."""
        if is_url(os.fsencode(self.path)):
            return os.fsencode(folder_and_name(self.path)[0])
        return os.path.join(os.path.dirname(os.path.abspath(os.fsencode(self.path))), b"")

    def _open_text(self, encoding: str, newline: str | None = None) -> io.TextIOWrapper:
        if is_url(os.fsencode(self.path)):
            return io.TextIOWrapper(open_remote(self.path, self.retry_seconds), encoding, "surrogateescape", newline)
        return open(self.path, encoding=encoding, errors="surrogateescape", newline=newline)

    def _read(self, columns: Sequence[str] | None, rows_at_once: int = _ROWS_AT_ONCE) -> Iterator[Batch]:
        """Yield the rows, some at a time, with some columns of a .parquet and all of other tables."""
        if self._suffix == ".parquet":
            with ParquetTable(self.path, self.retry_seconds) as table:
                yield from table.batches(table.plain_columns if columns is None else columns, rows_at_once)
        elif self._suffix == ".jsonl":
            yield from self._read_jsonl(rows_at_once)
        else:
            yield from self._read_csv("\t" if self._suffix == ".tsv" else ",", rows_at_once)

    def _read_csv(self, delimiter: str, rows_at_once: int) -> Iterator[Batch]:
        csv.field_size_limit(_MAX_FIELD_CHARACTERS)
        with self._open_text("utf-8-sig", newline="") as file:
            reader = filter(None, csv.reader(file, delimiter=delimiter))
            try:
                # pandas writes the numbers of rows under an empty name.
                names = [name or f"column {number}" for number, name in enumerate(next(reader, []), 1)]
                if twice := next((name for number, name in enumerate(names) if name in names[:number]), None):
                    raise ImageError(f"{self._shown} has two columns '{twice}'", "give them names of their own")
                while rows := list(itertools.islice(reader, rows_at_once)):
                    # A row can be too short, or have fields behind those of the header.
                    columns = list(itertools.zip_longest(*rows)) + [[None] * len(rows)] * len(names)
                    yield dict(zip(names, columns, strict=False))
            except csv.Error as error:
                raise ImageError(f"{self._shown} is not a table of fields: {error}") from None

    def _read_jsonl(self, rows_at_once: int) -> Iterator[Batch]:
        with self._open_text("utf-8") as file:
            lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
            while rows := [self._to_row(*line) for line in itertools.islice(lines, rows_at_once)]:
                names = dict.fromkeys(name for row in rows for name in row)
                yield {name: [row.get(name) for row in rows] for name in names}

    def _to_row(self, number: int, line: str) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ImageError(f"{self._shown}, line {number:,}, is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ImageError(f"{self._shown}, line {number:,}, is not an object with a field for each column")
        return row

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """Name the table in what the system cannot read."""
        try:
            yield
        except OSError as error:
            raise ImageError(f"cannot read the table {self._shown}: {reason_of(error)}", THEN_AGAIN) from None

    def _to_path(self, value: Any, number: int, column: str) -> bytes:
        if not isinstance(value, str) or "\0" in value:
            raise ImageError(f"{self._shown}, row {number:,}: {column} is not a path: {shown(value)}")
        path = os.fsencode(value)
        if is_url(path):
            try:
                check_named(value)
            except ImageError as error:
                what, *hints = str(error).splitlines()
                raise ImageError(f"{self._shown}, row {number:,}: {what}", *map(str.strip, hints)) from None
        return path


@dataclass(frozen=True)
class _Some:
    """Rows that name images: their paths as they are written, their keys if a column holds those, and their values."""

    paths: list[bytes]
    keys: list[bytes] | None
    values: Values | None


def _join(here: bytes, path: bytes) -> bytes:
    """Return the absolute path of a file that a table in a folder names, or its URL."""
    if is_url(path):
        return path
    if is_url(here):
        return os.fsencode(join_url(os.fsdecode(here), os.fsdecode(path)))
    if b"//" in path or b"/." in path or path[:1] in (b".", b"/"):
        return normalise(os.path.join(here, path))
    return here + path  # As most are; normalising a million paths takes seconds.


def is_table(path: str) -> bool:
    return without_query(path).lower().endswith(TABLES)
