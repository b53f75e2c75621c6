"""The tables of a finished run, derived from its shards: where images are, which could not be read, what a shard holds.

`shards.csv` says in a line what a header takes hundreds of kilobytes for. Reading a run begins with it, if it is of the
shards that are there; a run of earlier versions has none.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hookx.errors import UnreadableError
from hookx.plan import Plan, Shard
from hookx.store.columns import StoredColumns, Value, free_names, open_columns
from hookx.store.files import is_there, open_file, remove, report_read_errors, report_write_errors, sizes_in, whole_file
from hookx.store.location import Location
from hookx.store.reading import as_text
from hookx.store.record import ShardRecord, read_sized_record
from hookx.store.tables import line, read_rows, to_field, value_field

INDEX, FAILURES, SHARDS = "index.csv", "failures.csv", "shards.csv"
MAX_INDEX_ROWS = 10_000_000  # A table of more is nothing that a spreadsheet opens; its rows are found by `shards.csv`.
_HEADERS = {
    INDEX: ("key", "shard", "row"),
    FAILURES: ("key", "reason"),
    SHARDS: ("shard", "first_key", "rows", "failures", "bytes"),
}


@dataclass(frozen=True)
class ShardTable:
    """What the shards of a run hold: for each, in order, the first key of its rows, and how many rows and failures."""

    first_keys: list[str]  # '' of a shard without rows
    rows: array[int]
    failures: array[int]


def tables_of(plan: Plan) -> list[str]:
    """Return the tables that a finished run has, but for `failures.csv`, which it has if there are failures."""
    return [SHARDS] if plan.image_count > MAX_INDEX_ROWS else [INDEX, SHARDS]


def publish_index(
    path: Location,
    plan: Plan,
    see: Callable[[ShardRecord], None] = lambda record: None,
) -> None:
    """Write the tables of a run whose shards are all there; this completes it.

    Any process may do so, and several at once: they write the same bytes.

    Args:
        see: called with the record of every shard, in order: each is read once, and takes long to read.
    """
    has_failures, columns = False, open_columns(path, plan)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(whole_file(path / name)) for name in tables_of(plan)}
        for name, file in files.items():
            file.write(_header(name, columns))
        for shard in plan.shards:  # One record in memory at a time: a run can have millions of images.
            record, size_bytes = read_sized_record(path, plan, shard)
            see(record)
            if record.failures and not has_failures:
                has_failures = True
                files[FAILURES] = stack.enter_context(whole_file(path / FAILURES))
                files[FAILURES].write(line(_HEADERS[FAILURES]))
            for name, file in files.items():
                file.writelines(_lines(name, plan, shard, record, size_bytes, columns))
    for name in {INDEX, FAILURES} - set(files):  # Left by shards that were removed and computed again.
        with report_write_errors(path / name, resumable=True):
            if is_there(path / name):
                remove(path / name)


def table_lines(path: Location, plan: Plan, name: str, *, as_fields: bool = True) -> Iterator[bytes]:
    """Yield the lines of a table, derived from the shards; without `as_fields`, as an earlier version wrote them."""
    columns = open_columns(path, plan) if name == INDEX else None
    yield _header(name, columns)
    for shard in plan.shards:
        yield from _lines(name, plan, shard, *read_sized_record(path, plan, shard), columns, as_fields)


def _header(name: str, columns: StoredColumns | None) -> bytes:
    header = _HEADERS[name]
    if name == INDEX and columns is not None:
        return line((*header, *map(to_field, free_names(columns.kinds, header))))
    return line(header)


def _lines(
    name: str,
    plan: Plan,
    shard: Shard,
    record: ShardRecord,
    size_bytes: int,
    columns: StoredColumns | None,
    as_fields: bool = True,
) -> Iterator[bytes]:
    """Yield what a shard adds to a table."""
    field, file = to_field if as_fields else str, plan.shard_file(shard)
    if name == INDEX:
        others = _values_of_rows(shard, record, columns) if columns is not None else itertools.repeat(())
        for row, (key, values) in enumerate(zip(record.keys, others, strict=False)):
            yield line((field(key), file, row, *map(value_field, values)))
    elif name == FAILURES:
        for key, reason in record.failures:
            yield line((field(key), field(reason)))
    else:
        first = record.keys[0] if record.keys else ""
        yield line((file, field(first), len(record.keys), len(record.failures), size_bytes))


def _values_of_rows(shard: Shard, record: ShardRecord, columns: StoredColumns) -> Iterator[tuple[Value, ...]]:
    """Yield the values of the images that have rows; the columns hold those that could not be read as well."""
    images = columns.rows(shard.start, shard.stop)
    if not record.failures:
        return images
    failed = {key for key, _ in record.failures}
    return itertools.compress(images, [key not in failed for key in record.keys_of_images])


def read_shard_table(path: Location, plan: Plan) -> ShardTable | None:
    """Read what the shards of a run hold; None if there is no such table, or it is not that of the shards by now."""
    file = path / SHARDS
    with report_read_errors(file):
        if not is_there(file):
            return None
        sizes_bytes = sizes_in(path)
        table = ShardTable([], array("q"), array("q"))
        try:
            with open_file(file) as opened:
                for shard, (name, first, *numbers) in zip(plan.shards, read_rows(as_text(opened)), strict=True):
                    rows, failures, size_bytes = map(int, numbers)
                    if name != plan.shard_file(shard) or sizes_bytes.get(name) != size_bytes:
                        return None
                    if rows < 0 or failures < 0 or rows + failures != len(shard):
                        return None
                    table.first_keys.append(first)
                    table.rows.append(rows)
                    table.failures.append(failures)
        except (ValueError, csv.Error, UnreadableError, OverflowError):  # `hookx verify` says what is wrong with it.
            return None
    keys = [os.fsencode(key) for key, rows in zip(table.first_keys, table.rows, strict=True) if rows]
    return table if all(one < other for one, other in itertools.pairwise(keys)) else None
