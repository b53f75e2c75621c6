"""What is known of the images of a run beside their activations: a column is an array with a value for each row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hookx.errors import NotStoredError, closest
from hookx.read.activations import Positions, RowIndex
from hookx.store.columns import Kind, StoredColumns, open_columns


class Columns(Mapping[str, NDArray[Any]]):
    """The columns of a run by name; indexing reads one, with a value for each row, in the order of the keys.

    Integers are int64, numbers float64, and texts Python's, in an array of objects. Where a value is lacking, a number
    is NaN, and anything else None, in an array of objects.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hookx
        >>> with TemporaryDirectory() as out:
        ...     _ = hookx.extract("resnet18", "avgpool", "images", weights="none", out=out, label="parent")
        ...     features = hookx.open(out)
        ...     labels = features.columns["label"]
        >>> list(features.columns), labels[:3]
        (['label'], array(['animals', 'people', 'people'], dtype=object))
    """

    def __init__(self, rows: RowIndex) -> None:
        self._rows = rows

    def at(self, rows: Positions) -> Columns:
        """Return the columns of some rows."""
        return _ColumnsOfSome(self, rows)

    @cached_property
    def _stored(self) -> StoredColumns | None:
        return open_columns(self._rows.path, self._rows.plan)

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """What each column holds: 'int', 'float', 'bool' or 'text'."""
        return self._stored.kinds if self._stored is not None else {}

    def __getitem__(self, name: str) -> NDArray[Any]:
        return as_objects(*self.read(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} ({kind})" for name, kind in self.kinds.items())
        return f"<{len(self)} column{'s' * (len(self) != 1)}: {shown}>"

    def read(self, name: str, rows: slice = slice(None)) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return the values of some rows, and which of them have one; None if all do.

        Raises:
            NotStoredError: there is no such column; the message names the closest.
        """
        self.check(name)
        stored = self._stored
        assert stored is not None
        positions = self._positions[rows]
        if not len(positions):
            return stored.read(name, 0, 0)
        first, last = int(positions[0]), int(positions[-1])
        values, present = stored.read(name, first, last + 1)
        if len(values) > len(positions):
            values = values[positions - first]
            present = None if present is None else present[positions - first]
        return values, None if present is None or present.all() else present

    def check(self, name: str) -> None:
        """Raise `NotStoredError` if there is no such column."""
        if name not in self.kinds:
            near = f"closest: {closest(name, list(self))}" if self else "the run has none"
            raise NotStoredError(f"there is no column '{name}'; {near}")

    @cached_property
    def _positions(self) -> Positions:
        """The place of each row in the list of images, which holds those that could not be read as well."""
        rows = self._rows
        positions = np.concatenate([np.arange(shard.start, shard.stop) for shard in rows.shards] or [np.arange(0)])
        if rows.failures:
            before = np.array(sorted(map(rows.keys.place, rows.failures)))  # how many rows precede each
            positions = np.delete(positions, before + np.arange(len(before)))
        return positions


class _ColumnsOfSome(Columns):
    """The columns of some rows of a run."""

    def __init__(self, whole: Columns, chosen: Positions) -> None:
        self._whole, self._chosen = whole, chosen

    @property
    def kinds(self) -> Mapping[str, Kind]:
        return self._whole.kinds

    def read(self, name: str, rows: slice = slice(None)) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        values, present = self._whole.read(name)
        chosen = self._chosen[rows]
        present = None if present is None else present[chosen]
        return values[chosen], None if present is None or present.all() else present


def as_objects(values: NDArray[Any], present: NDArray[np.bool_] | None) -> NDArray[Any]:
    """Return values in which those that are lacking are NaN, in numbers, or None."""
    if present is None:
        return values
    if values.dtype.kind == "f":
        return np.where(present, values, np.nan)
    marked = values.astype(object)
    marked[~present] = None
    return marked
