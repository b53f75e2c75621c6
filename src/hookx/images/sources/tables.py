"""A table that names images: .csv, .tsv, .jsonl or .parquet, with a column of paths."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hookx.errors import HookxError, ImageError, closest
from hookx.images.retries import reason_of
from hookx.images.sources.kinds import TABLES, refuse_listed
from hookx.images.sources.named import find_named, normalise
from hookx.images.sources.source import THEN_AGAIN, Found, Look

_PATH_COLUMNS = ("path", "file_name", "image", "image_path", "filepath", "filename")
_ROWS_AT_ONCE = 10_000
_MAX_FIELD_CHARACTERS = 2**24  # Python's own limit is 131,072, which a caption can exceed.

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TableSource:
    """The images that a table names; paths are relative to its folder, and so are keys, unless a column holds those."""

    path: str

    def find(self, look: Look) -> Iterator[Found]:
        here = os.path.join(os.path.dirname(os.path.abspath(os.fsencode(self.path))), b"")
        rows = self._read(look)
        try:
            first = next(rows, None)
            if first is None:
                raise ImageError(f"'{self.path}' has no rows")
            path_column, key_column = self._choose([name for name in first if isinstance(name, str)], look)
            numbered = enumerate(itertools.chain([first], rows), 1)
            while some := list(itertools.islice(numbered, _ROWS_AT_ONCE)):
                there = [(number, row) for number, row in some if row.get(path_column)]
                if len(there) < len(some):
                    look.not_taken.add_kind("rows without a path", len(some) - len(there))
                paths = [self._to_path(row[path_column], number, path_column) for number, row in there]
                refuse_listed(paths)
                if key_column:
                    keys = [self._to_key(row.get(key_column), number, key_column) for number, row in there]
                    yield Found(b"", keys, paths=[_join(here, path) for path in paths], is_named=True)
                else:
                    yield from find_named([_join(here, path) for path in paths], here, here, look, self.path)
        except OSError as error:
            raise ImageError(f"cannot read the table '{self.path}': {reason_of(error)}", THEN_AGAIN) from None

    def _read(self, look: Look) -> Iterator[Row]:
        suffix = os.path.splitext(self.path)[1].lower()
        if suffix == ".parquet":
            return self._read_parquet(look)
        return self._read_jsonl() if suffix == ".jsonl" else self._read_csv("\t" if suffix == ".tsv" else ",")

    def _read_csv(self, delimiter: str) -> Iterator[Row]:
        csv.field_size_limit(_MAX_FIELD_CHARACTERS)
        with open(self.path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            try:
                yield from csv.DictReader(file, delimiter=delimiter)
            except csv.Error as error:
                raise ImageError(f"'{self.path}' is not a table of fields: {error}") from None

    def _read_jsonl(self) -> Iterator[Row]:
        with open(self.path, encoding="utf-8", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ImageError(f"'{self.path}', line {number:,}, is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ImageError(f"'{self.path}', line {number:,}, is not an object with a field for each column")
                yield row

    def _read_parquet(self, look: Look) -> Iterator[Row]:
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise HookxError(
                f"'{self.path}' is a Parquet file, which needs pyarrow",
                "install it as an extra of hookx: pip install 'hookx-vision[parquet]'",
            ) from None
        try:
            with ParquetFile(self.path) as file:
                names = [field.name for field in file.schema_arrow if field.type.num_fields == 0]
                images = [field.name for field in file.schema_arrow if field.type.num_fields]
                if images and not look.path_column and not {*names} & {*_PATH_COLUMNS}:
                    raise ImageError(
                        f"'{self.path}' has no column of paths, and hookx does not read images within it ({images[0]})",
                        "write them to a .tar, and name that, or name a column of paths: --path-column",
                    )
                # Only these columns, because others can hold captions and images.
                chosen = [name for name in self._choose(names, look) if name]
                for batch in file.iter_batches(_ROWS_AT_ONCE, columns=chosen):
                    yield from batch.to_pylist()
        except (ArrowException, ValueError) as error:
            raise ImageError(f"'{self.path}' is not a Parquet file that can be read: {error}") from None

    def _choose(self, names: Sequence[str], look: Look) -> tuple[str, str]:
        """Return the columns of the paths and of the keys; '' if the paths are the keys."""
        for asked in filter(None, (look.path_column, look.key_column)):
            if asked not in names:
                raise ImageError(f"'{self.path}' has no column '{asked}'; closest: {closest(asked, names)}")
        path_column = look.path_column or next((name for name in _PATH_COLUMNS if name in names), "")
        if not path_column:
            raise ImageError(
                f"'{self.path}' has none of the columns {', '.join(_PATH_COLUMNS)}",
                f"name the one that holds the paths: --path-column {names[0] if names else 'NAME'}",
            )
        return path_column, look.key_column

    def _to_path(self, value: Any, number: int, column: str) -> bytes:
        if not isinstance(value, str) or "\0" in value:
            raise ImageError(f"'{self.path}', row {number:,}: {column} is not a path: {_shown(value)}")
        if "://" in value:
            raise ImageError(
                f"'{self.path}', row {number:,}: {column} is an address, and not the path of a file: {value}",
                "download the files, and name a column of their paths: --path-column",
            )
        return os.fsencode(value)

    def _to_key(self, value: Any, number: int, column: str) -> bytes:
        text = "" if value is None else str(value)
        if not text or "\0" in text or not isinstance(value, str | int):
            raise ImageError(f"'{self.path}', row {number:,}: {column} is not a key: {_shown(value)}")
        return os.fsencode(text)


def _join(here: bytes, path: bytes) -> bytes:
    """Return the absolute path of a file that a table in a folder names."""
    if b"//" in path or b"/." in path or path[:1] in (b".", b"/"):
        return normalise(os.path.join(here, path))
    return here + path  # As most are; normalising a million paths takes seconds.


def _shown(value: object, max_length: int = 80) -> str:
    return repr(value)[:max_length]


def is_table(path: str) -> bool:
    return path.lower().endswith(TABLES)
