"""One address of a run: an array that stays on disk until it is indexed."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hookx.errors import NotStoredError, UsageError
from hookx.keys import SortedKeys
from hookx.plan import LayerSpec, Plan, Shard
from hookx.store.location import Location
from hookx.store.shard_rows import ShardRows, Stretch

NOT_IN_NUMPY = ("bfloat16", "float8_e4m3fn", "float8_e5m2")  # float32 holds their values.
_BYTES_AT_ONCE = 2**20
_KEYS_COMPARED = 100  # Neighbours of a missing key, for the error message.
Index: TypeAlias = int | slice | Sequence[int] | Sequence[bool] | NDArray[Any] | Tensor
Positions: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowIndex:
    """Which rows there are and which files hold them; every address of a run shares it."""

    path: Location
    plan: Plan
    keys: SortedKeys
    failures: Mapping[str, str]  # key -> reason
    files: Sequence[Location]
    first_rows: Positions  # how many rows precede each file, and the total
    chosen: Positions | None = None  # the position of each row in the files; None if they are those of the files
    shards: Sequence[Shard] = ()  # those that the files are
    fingerprints: Sequence[str] = ()  # of the run that each file belongs to, if it is not that of the plan

    @cached_property
    def borders(self) -> Positions:
        """How many of these rows precede each file, and the total; where runs are read as one, each stretch of rows."""
        if self.chosen is None:
            return self.first_rows
        if not self.is_in_file_order:
            return np.array([*range(0, len(self.keys), self.plan.images_per_shard), len(self.keys)])
        return np.searchsorted(self.chosen, self.first_rows)

    @cached_property
    def is_in_file_order(self) -> bool:
        return self.chosen is None or bool((np.diff(self.chosen) > 0).all())

    def in_files(self, positions: Positions) -> Positions:
        """Return where rows are in the files."""
        return positions if self.chosen is None else self.chosen[positions]

    def position(self, key: str) -> int:
        """Return the row of an image; `NotStoredError` if it has none, with the reason if the image failed."""
        if key in self.keys:
            return self.keys.index(key)
        if key in self.failures:
            raise NotStoredError(f"'{key}' could not be read: {self.failures[key]}")
        # Keys are sorted, so similar ones are neighbours; comparing with millions would take minutes.
        place = self.keys.place(key)
        around = self.keys[max(0, place - _KEYS_COMPARED) : place + _KEYS_COMPARED]
        raise NotStoredError.of(f"{self.path}/", key, around)


class Activations:
    """One address of a run: an array of shape (rows, *shape of one image) that stays on disk until it is indexed.

    Index it like the first dimension of a numpy array: by an integer (one row), a slice, a list, array or tensor of
    integers, or a mask over all rows. Only those rows are read, each file once and in order, into a copy that is yours
    to change. `shards`, and `torch` and `numpy` for a run of one shard, copy nothing: they map the file into memory,
    where it is read on access. Writing to the result does not change the file. `keys` holds the key of every row.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import hookx
        >>> with TemporaryDirectory() as out:
        ...     _ = hookx.extract("resnet18", "avgpool", "images", weights="none", out=out)
        ...     avgpool = hookx.open(out)["avgpool"]
        ...     first, some = avgpool[0], avgpool[[5, 2, 5]]
        ...     eighth = avgpool.of("things/rocket.jpg")
        >>> avgpool
        Activations('avgpool', shape=(8, 512, 1, 1), dtype=torch.float32)
        >>> first.shape, some.shape, eighth.shape
        (torch.Size([512, 1, 1]), torch.Size([3, 512, 1, 1]), torch.Size([512, 1, 1]))
    """

    def __init__(self, layer: LayerSpec, rows: RowIndex) -> None:
        self.address = layer.address
        self.dtype: torch.dtype = getattr(torch, layer.dtype)
        self.shape = (len(rows.keys), *layer.shape)
        self.bytes_per_row = layer.bytes_per_image
        self.layer, self.rows, self.keys = layer, rows, rows.keys
        self._shards: dict[int, ShardRows] = {}  # opened so far

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Tensor]:
        rows_at_once = max(1, _BYTES_AT_ONCE // max(1, self.bytes_per_row))
        for start in range(0, len(self), rows_at_once):
            yield from self[start : start + rows_at_once]

    def __repr__(self) -> str:
        return f"Activations('{self.address}', shape={self.shape}, dtype={self.dtype})"

    def __getitem__(self, index: Index) -> Tensor:
        positions = self.rows.in_files(_positions(index, len(self)))
        ascending, places = np.unique(positions, return_inverse=True)  # Read each row once, in file order.
        rows = np.empty((len(ascending), self.bytes_per_row), dtype=np.uint8)  # numpy lacks some of torch's types.
        if rows.size:
            for shard, stretches in self._stretches(ascending):
                shard.read(stretches, rows)
        if not np.array_equal(ascending, positions.ravel()):
            rows = np.take(rows, places.ravel(), axis=0)
        return torch.from_numpy(rows.ravel()).view(self.dtype).reshape((*positions.shape, *self.shape[1:]))

    def of(self, key: str | Sequence[str]) -> Tensor:
        """Return the activation of one image by its key, or those of several keys in their order.

        Raises:
            NotStoredError: no row has this key; if the image could not be read, the message gives the reason.
        """
        if isinstance(key, str):
            return self[self.rows.position(key)]
        return self[[self.rows.position(one) for one in key]]

    def batches(self, size: int) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield all rows in order, `size` at a time: (activations, keys)."""
        if size < 1:
            raise UsageError(f"the batch size must be at least 1, got {size}")
        for start in range(0, len(self), size):
            yield self[start : start + size], self.keys[start : start + size]

    def shards(self) -> Iterator[tuple[Tensor, list[str]]]:
        """Yield all rows in order, one shard at a time, without copying: (activations, keys)."""
        for number, (start, stop) in enumerate(pairwise(self.rows.borders)):
            if start < stop:
                first_rows = self.rows.first_rows
                is_whole = self.rows.is_in_file_order and stop - start == first_rows[number + 1] - first_rows[number]
                yield self._shard(number).map() if is_whole else self[start:stop], self.keys[start:stop]

    def torch(self) -> Tensor:
        """Return all rows as a tensor."""
        if np.count_nonzero(np.diff(self.rows.borders)) == 1:
            return next(self.shards())[0]
        return self[:]

    def numpy(self) -> NDArray[Any]:
        """Return all rows as an array; bfloat16 and float8, which numpy lacks, become float32, with a warning."""
        return self._to_numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError(f"'{self.address}' is read from files, so an array of it is always a copy")
        return np.asarray(self._to_numpy(warn=dtype is None), dtype=dtype)

    def _to_numpy(self, warn: bool = True) -> NDArray[Any]:
        rows = self.torch()
        if (dtype := self.layer.dtype) in NOT_IN_NUMPY:
            if warn:
                what = f"'{self.address}' is {dtype}, which numpy lacks"
                warnings.warn(f"{what}: it becomes float32, exactly; .torch() keeps {dtype}", stacklevel=3)
            rows = rows.float()
        return rows.numpy()

    def prefetch(self, start: int, stop: int) -> None:
        """Start reading rows into the system's file cache, and return without waiting."""
        for shard, stretches in self._stretches(np.sort(self.rows.in_files(np.arange(start, stop)))):
            shard.prefetch(stretches)

    def _stretches(self, ascending: Positions) -> Iterator[tuple[ShardRows, list[Stretch]]]:
        """Group ascending rows of the files by shard, and in a shard into stretches of adjacent rows."""
        first_rows = self.rows.first_rows
        gaps = np.flatnonzero(np.diff(ascending) != 1) + 1
        cuts = np.union1d(gaps, np.searchsorted(ascending, first_rows))
        numbers = np.searchsorted(first_rows, ascending[cuts[:-1]], side="right") - 1
        firsts = ascending[cuts[:-1]] - first_rows[numbers]
        stretches = zip(firsts.tolist(), cuts[:-1].tolist(), cuts[1:].tolist(), strict=True)
        for number, of_shard in groupby(zip(numbers.tolist(), stretches, strict=True), key=itemgetter(0)):
            yield self._shard(number), [stretch for _, stretch in of_shard]

    def _shard(self, number: int) -> ShardRows:
        if number not in self._shards:
            start, stop = self.rows.first_rows[number : number + 2].tolist()
            fingerprint = self.rows.fingerprints[number] if self.rows.fingerprints else self.rows.plan.fingerprint
            self._shards[number] = ShardRows(self.rows.files[number], self.layer, stop - start, fingerprint)
        return self._shards[number]


def _positions(index: Any, length: int) -> Positions:
    """Return the row numbers that an index selects; an array without dimensions for a single integer."""
    if isinstance(index, slice):
        return np.arange(*index.indices(length))
    try:
        named = np.asarray(index.numpy(force=True) if isinstance(index, Tensor) else index)
    except ValueError:  # A list of lists of different lengths.
        named = np.array(None)
    if named.dtype == bool and named.shape == (length,):
        return np.flatnonzero(named)
    is_row_numbers = named.shape == (0,) or (named.ndim <= 1 and named.dtype.kind in "iu")
    if isinstance(index, tuple) or not is_row_numbers:
        expected = f"an integer, a slice, a list of integers or a mask of length {length}"
        raise TypeError(f"rows must be {expected}, {_describe(index)}")
    outside = named[(named < -length) | (named >= length)]
    if outside.size:
        raise IndexError(f"row {outside.flat[0]} is out of range for {length:,} rows")
    positions = named.astype(np.int64)
    return np.where(positions < 0, positions + length, positions)


def _describe(index: Any) -> str:
    if isinstance(index, str):
        return f"not {index!r}; look an image up by key with .of({index!r})"
    if isinstance(index, tuple):
        return f"not {index!r}; index the rows first, then their tensor: [rows][:, 0]"
    if isinstance(index, np.ndarray | Tensor):
        return f"not an array of {index.dtype} with shape {tuple(index.shape)}"
    return f"not {reprlib.repr(index)}"
