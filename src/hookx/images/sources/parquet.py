"""Parquet files, as tables and as places of images: the only file of the sources that imports pyarrow."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hookx.errors import HookxError, ImageError
from hookx.images.addresses import is_url, shown_url
from hookx.images.remote import open_remote

if TYPE_CHECKING:
    import pyarrow as pa

_IMAGES_AT_ONCE = 16  # while their bytes are in memory
_BUFFER_BYTES = 2**20  # of each column that is read


class ParquetTable:
    """An open Parquet file; what keeps it from being read is an `ImageError`, or an `OSError` of the system.

    Args:
        retry_seconds: how long to try again what a store cannot send now, if the file lies behind a URL.

    Attributes:
        size_bytes: the size of the file.
        plain_columns: those that hold no bytes.
        image_columns: those that can hold images: bytes, or a struct of `bytes` and `path`, as Hugging Face datasets
            store them.
    """

    def __init__(self, path: str, retry_seconds: float = 0.0) -> None:
        try:
            from pyarrow import ArrowException, types
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise HookxError(
                f"'{shown_url(path)}' is a Parquet file, which needs pyarrow",
                "install it as an extra of hookx: pip install 'hookx-vision[parquet]'",
            ) from None
        self.path, self._damage = shown_url(path), (ArrowException, ValueError)
        source = open_remote(path, retry_seconds) if is_url(os.fsencode(path)) else path
        try:
            # A buffer, so that a column's part of a row group, which can be gigabytes, is not in memory at once.
            self._file = ParquetFile(source, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            schema = self._file.schema_arrow
        except self._damage as error:
            raise self._unreadable(error) from None
        self._is_bytes = {
            field.name: types.is_binary(field.type) or types.is_large_binary(field.type) for field in schema
        }
        self._is_struct = {field.name: types.is_struct(field.type) and _has_bytes(field.type) for field in schema}
        self.image_columns = [name for name in schema.names if self._is_bytes[name] or self._is_struct[name]]
        self.plain_columns = [name for name in schema.names if name not in self.image_columns]
        self.size_bytes = os.stat(source).st_size if isinstance(source, str) else source.seek(0, os.SEEK_END)
        self.row_count = self._file.metadata.num_rows

    def __enter__(self) -> ParquetTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def batches(self, columns: Sequence[str], rows_at_once: int) -> Iterator[Mapping[str, list[Any]]]:
        """Yield the values of some columns, some rows at a time."""
        try:
            for batch in self._file.iter_batches(rows_at_once, columns=list(columns), use_threads=False):
                yield batch.to_pydict()
        except self._damage as error:
            raise self._unreadable(error) from None

    def measure(self, column: str) -> Iterator[tuple[list[int | None], list[str | None]]]:
        """Yield the sizes of the images in a column and the paths that they had, some at a time; None if there is none.

        The file is read once for that: nothing in it says how large a single value is.
        """
        import pyarrow.compute as pc

        for images, paths in self._images(column, range(self._file.num_row_groups)):
            sizes: list[int | None] = pc.binary_length(images).to_pylist()
            yield [size or None for size in sizes], paths.to_pylist() if paths is not None else [None] * len(sizes)

    def read_images(self, column: str, row_group: int) -> Iterator[bytes | None]:
        """Yield the images of a row group, in order."""
        for images, _ in self._images(column, [row_group]):
            yield from (value.as_py() for value in images)

    def place_of(self, row: int) -> tuple[int, int]:
        """Return the number of the row group that holds a row, and the row's number in it."""
        for group in range(self._file.num_row_groups):
            count = self.rows_in(group)
            if row < count:
                return group, row
            row -= count
        raise ImageError(f"'{self.path}' has fewer rows than when it was listed")

    def rows_in(self, row_group: int) -> int:
        return int(self._file.metadata.row_group(row_group).num_rows)

    def _images(self, column: str, row_groups: Sequence[int]) -> Iterator[tuple[pa.Array, pa.Array | None]]:
        """Yield the bytes and, if they are stored, the paths in a column, some at a time."""
        is_struct = self._is_struct[column]
        columns = [f"{column}.bytes", f"{column}.path"] if is_struct else [column]
        try:
            for batch in self._file.iter_batches(
                _IMAGES_AT_ONCE, row_groups=list(row_groups), columns=columns, use_threads=False
            ):
                values = batch.column(0)
                if not is_struct:
                    yield values, None
                    continue
                names = [field.name for field in values.type]
                parts = dict(zip(names, values.flatten(), strict=True))  # with the struct's own nulls
                yield parts["bytes"], parts.get("path")
        except self._damage as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> ImageError:
        return ImageError(f"'{self.path}' is not a Parquet file that can be read: {error}")


def _has_bytes(struct: Any) -> bool:
    from pyarrow import types

    return any(
        part.name == "bytes" and (types.is_binary(part.type) or types.is_large_binary(part.type)) for part in struct
    )
