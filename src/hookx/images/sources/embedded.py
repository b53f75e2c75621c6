"""Images within a table, as Hugging Face datasets store them: a column of their bytes, with the paths that they had."""

from __future__ import annotations

import itertools
import os
import posixpath
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hookx.errors import ImageError, closest
from hookx.images.addresses import folder_and_name, is_url, shown_url
from hookx.images.columns import Values
from hookx.images.files import Archive
from hookx.images.sources.named import to_key
from hookx.images.sources.parquet import ParquetTable
from hookx.images.sources.source import Found, Look

_ROWS_AT_ONCE = 2_000


@dataclass(frozen=True)
class EmbeddedSource:
    """The images in a column of a .parquet.

    The key of each is the table's name, '/', and the path that it had, if all have one and no two have the same;
    otherwise the number of its row, from 0; or the value of a column.
    """

    path: str
    column: str

    def find(self, look: Look) -> Iterator[Found]:
        is_remote = is_url(os.fsencode(self.path))
        folder, name = folder_and_name(self.path) if is_remote else os.path.split(self.path)
        root, beginning = look.begin_in(folder)
        beginning += os.fsencode(name) + b"/"
        with ParquetTable(self.path, look.retry_seconds) as table:
            if look.key_column and look.key_column not in table.plain_columns:
                near = closest(look.key_column, table.plain_columns)
                raise ImageError(f"'{shown_url(self.path)}' has no column '{look.key_column}'; closest: {near}")
            others = look.take(table.plain_columns, but=look.key_column)
            archive = Archive(self.path, "parquet", table.size_bytes, self.column)
            sizes_bytes, names = self._measure(table)
            read = list(dict.fromkeys([*others, *([look.key_column] if look.key_column else [])]))
            batches = table.batches(read, _ROWS_AT_ONCE) if read else itertools.repeat({})
            for start, batch in zip(range(0, table.row_count, _ROWS_AT_ONCE), batches, strict=False):
                rows = range(start, min(start + _ROWS_AT_ONCE, table.row_count))
                there = [sizes_bytes[row] > 0 for row in rows]
                taken = list(itertools.compress(rows, there))
                if len(taken) < len(rows):
                    look.not_taken.add_kind("rows without an image", len(rows) - len(taken))
                values = Values(batch).where(there)
                if look.key_column:
                    given = zip(values.by_name[look.key_column], taken, strict=True)
                    keys = [to_key(key, shown_url(self.path), row + 1, look.key_column) for key, row in given]
                else:
                    keys = [beginning + names[row] for row in taken]
                places = array("q", itertools.chain.from_iterable((row, 0, sizes_bytes[row]) for row in taken))
                of_others = Values({name: values.by_name[name] for name in others}) if others else None
                yield Found(root, keys, archive, places, values=of_others)

    def _measure(self, table: ParquetTable) -> tuple[array[int], Sequence[bytes]]:
        """Return the size of the image in each row, 0 where there is none, and what the images are called."""
        sizes_bytes, paths = array("q"), list[str]()
        for sizes, some in table.measure(self.column):
            sizes_bytes.extend(size or 0 for size in sizes)
            paths += (path or "" for path in some)
        named = [path for path, size in zip(paths, sizes_bytes, strict=True) if size]
        if all(named) and len(set(named)) == len(named) and "\0" not in "".join(named):
            return sizes_bytes, [posixpath.normpath(os.fsencode(f"/{path}")).lstrip(b"/") for path in paths]
        digits = len(str(max(0, len(paths) - 1)))
        return sizes_bytes, [b"%0*d" % (digits, row) for row in range(len(paths))]
